"""Evaluation: a greedy answer, a mask at the picture's own size, the field's metrics and tables.

    python tests/tiny/world.py runs/shapes                                # once: the world to see
    python evaluate.py --preset tiny --checkpoint runs/tiny/rl            # a table, under a minute
    torchrun --nproc_per_node=8 evaluate.py --checkpoint runs/rl --splits all \\
        --predictions rows.jsonl                                          # Tables 1 and 2
    python evaluate.py --preset tiny --checkpoint runs/tiny/rl --image docs/shapes.png \\
        --text "the largest red circle" --output overlay.png              # one picture
    python evaluate.py --curves runs/tiny/rl --output docs/curves.png     # needs matplotlib
    python tests/gallery.py rows.jsonl gallery.html --data datasets       # what --predictions kept

Where it stands in the paper: inference (Eqs. 1-4), Tables 1 and 2. `--splits all` is every
evaluation split of every dataset found below --data: the columns of those tables and
GroundingSuite-Eval, ours beside the paper's.

Metrics (LISA's, the field's standard). Every expression is one row, and none is skipped: an answer
without a box still has a mask.
    giou      mean of I / (U + 1e-5) over the rows, 1 where both masks are empty
    ciou      sum of all I over the sum of all U
    box_iou   mean IoU of the boxes
    acc50     share of rows whose box IoU is above 0.5
    format    share of answers in Fig. 4's format
Pixels labelled "ignore" (ReasonSeg) are left out of I and U; `--ignore background` counts as the
released code does, `--ignore foreground` as Seg-Zero does.

Every answer is also segmented the Seg-Zero way: the predicted box prompts an untouched SAM 2
(--sam; a converted checkpoint brings a SAM of its own), without any context module. A table sets
both side by side for the quartiles of box IoU; `--prompt-with box` makes that way the one that is
counted, and needs no checkpoint.

Letters: B prompts, (H, W) a picture's own height and width, S SAM's picture side.
"""
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from tqdm import tqdm

from align import TINY, SharedArgs, fixed_cache, flag, parse_settings, run, start_processes
from data import (Collator, EvaluationRows, LensError, find_datasets, load_batches, load_picture,
                  read_records, rescale_box, to_device, write_whole)
from model import (SamHead, build_lens, context_positions, draw_uniforms, generate, load_sam,
                   pack_groups, prompt_positions)
from rewards import box_iou, find_box, format_reward, full_size_masks, mask_counts


@dataclass
class EvaluateArgs:
    checkpoint: str = flag("", "a run's folder; none with --prompt-with box: the MLLM and SAM as "
                               "they come")
    splits: list[str] = flag(["val"], "val, testA, testB (RefCOCO, RefCOCO+); val, test (RefCOCOg, "
                                      "ReasonSeg); eval (GroundingSuite); or all, of all datasets "
                                      "below --data")
    prompt_with: Literal["context", "box"] = flag(
        "context", "what is counted: SAM prompted with the context queries, or the predicted box")
    ignore: Literal["out", "background", "foreground"] = flag(
        "out", "pixels labelled ignore: left out, or counted as one")
    sample: bool = flag(False, "sample the answers at temperature 1 instead of greedy decoding")
    eval_batch: int = flag(8, "rows decoded together")
    json: str = flag("", "write the numbers to this file")
    markdown: str = flag("", "write the tables to this file")
    predictions: str = flag("", "keep one line per row in this file, and go on from it")
    image: Optional[str] = flag(None, "segment this one picture (with --text)")
    text: Optional[str] = flag(None, "the expression for --image")
    curves: str = flag("", "draw this run's metrics.jsonl")
    output: str = flag("overlay.png", "picture to write for --image or --curves")

    def __post_init__(self):
        if self.eval_batch < 1:
            raise LensError(f"--eval-batch must be at least 1, not {self.eval_batch}")
        if self.image is not None and not self.image.strip():
            raise LensError("--image is empty: name a picture")
        if self.text is not None and not self.text.strip():
            raise LensError("--text is empty: say which object of the picture is meant")
        if (self.image is None) != (self.text is None):
            raise LensError("--image and --text go together: a picture, and what to find in it")
        if not (self.checkpoint or self.curves or self.prompt_with == "box"):
            raise LensError("--checkpoint is missing: the folder of a run (train one with align.py "
                            "and train_rl.py; --preset tiny needs no download), or --prompt-with "
                            "box for the MLLM and SAM as they come")


PRESETS = {"tiny": dict(TINY, eval_batch=50, limit=1000)}


# --- Answers and masks ----------------------------------------------------------------------------

class Predictor:
    """The models of --checkpoint, and an untouched SAM 2 for the Seg-Zero way."""

    def __init__(self, shared, args, device):
        dtype = torch.bfloat16 if shared.precision == "bf16" else torch.float32
        self.shared, self.args, self.device = shared, args, device
        self.lens, self.processor = build_lens(shared, args.checkpoint, dtype)
        self.stock_sam = SamHead(load_sam(shared.sam)).to(device).eval()
        self.lens.to(device).eval()
        self.fixed = fixed_cache(self.lens.mllm, shared, args.eval_batch, device)
        self.collate = Collator(self.processor, self.lens.mllm.config.model_type,
                                self.lens.sam_size, shared.max_prompt, shared.prompt)
        self.counted = "context" if args.prompt_with == "context" else "box_prompt"

    @torch.no_grad()
    def predict(self, batch, places):
        """Answers and masks of B prompts; a drawn answer (--sample) belongs to its row's place.

        -> B dicts {"answer", "format" (0.0 or 1.0), "box" (picture frame, or None), "masks"}, the
        last by way of prompting, "box_prompt" and, with a checkpoint, "context": (H, W) bool."""
        lens = self.lens
        batch = to_device(batch, self.device)
        positions = prompt_positions(lens.mllm, batch)                          # B x (3, P_b)
        samples = generate(lens.mllm, batch, positions, 1, self.shared.max_completion, lens.eos,
                           lens.forbidden, self.uniforms(places), fixed=self.fixed)
        completions, finished = samples.completions, samples.finished
        decode = self.processor.tokenizer.decode
        answers = [decode(group[0], skip_special_tokens=True) for group in completions]
        boxes = [find_box(answer, lens.prompt) for answer in answers]           # MLLM frame
        features = lens.encode_pictures(batch["sam_pixels"])
        logits = {}                                                             # (B, S/4, S/4) each
        if self.args.checkpoint:
            logits["context"] = self.prompt_with_queries(batch, positions, completions, features)
        logits["box_prompt"] = self.prompt_with_boxes(boxes, batch["frames"], features)
        predictions = []
        for b, (answer, box) in enumerate(zip(answers, boxes)):
            height, width = batch["masks"][b].shape
            masks = {way: full_size_masks(maps[b:b + 1], (height, width))[0].cpu()
                     for way, maps in logits.items()}
            if box is None:
                masks["box_prompt"][:] = False                                  # no prompt, no mask
            else:
                box = rescale_box(box, batch["frames"][b], (width, height))     # picture frame
            predictions.append({"answer": answer, "format": format_reward(answer) * finished[b][0],
                                "box": box, "masks": masks})
        return predictions

    def uniforms(self, places):
        """(B, max completion) in [0, 1), a function of seed and place; None decodes greedily."""
        if not self.args.sample:
            return None
        longest = self.shared.max_completion
        return draw_uniforms(self.shared.seed, 0, places, 1, longest).to(self.device)

    def prompt_with_queries(self, batch, positions, completions, features):
        """The way of LENS (Eqs. 2-4) -> mask logits (B, S/4, S/4)."""
        lens = self.lens
        positions = context_positions(positions, lens.positions)
        packed = pack_groups(batch["ids"], positions, completions, lens.M, self.device)
        return lens(batch["pixel_values"], batch["grid_thw"], packed, features,
                    with_log_probs=False)["mask_logits"]

    def prompt_with_boxes(self, boxes, frames, features):
        """The way of Seg-Zero: B boxes (MLLM frame, or None) -> mask logits (B, S/4, S/4)."""
        sam_frame = (self.lens.sam_size, self.lens.sam_size)
        nothing = (0, 0, 0, 0)
        boxes = [rescale_box(box or nothing, frame, sam_frame) for box, frame in zip(boxes, frames)]
        boxes = torch.tensor(boxes, device=self.device).float()                 # (B, 4), SAM frame
        prompts = self.stock_sam.box_prompts(boxes)                             # (B, 3, D)
        return self.stock_sam(features, prompts[:, None])


def count(mask, truth, ignore, convention):
    """Masks (H, W) bool -> [intersection, union] in pixels, as --ignore says; None where the truth
    is a box alone (all of it is ignored)."""
    if ignore.all():
        return None
    if convention == "foreground":
        truth = truth | ignore
    left_out = ignore if convention == "out" else None
    intersection, union = mask_counts(mask, truth, left_out)
    return [int(intersection), int(union)]


# --- Rows of a split ------------------------------------------------------------------------------

@dataclass
class Split:
    """One split of one dataset; `name` is the bare split where one dataset is evaluated."""
    name: str
    dataset: str
    split: str
    rows: EvaluationRows

    @property
    def keys(self):
        return [self.rows.key(k) for k in range(len(self.rows))]


def find_splits(shared, args):
    """What --datasets and --splits ask for: list of Split."""
    if args.splits == ["all"]:
        wanted = {dataset: [split for split in splits if split != "train"]
                  for dataset, splits in find_datasets(shared.data).items()}
    else:
        wanted = {dataset: args.splits for dataset in shared.datasets}
    bare_names = args.splits != ["all"] and len(wanted) == 1
    found = []
    for dataset, splits in wanted.items():
        records = read_records(shared.data, [dataset], splits) if splits else []
        for split in dict.fromkeys(splits):
            of_split = [record for record in records if record["split"] == split]
            name = split if bare_names else f"{dataset} {split}"
            found.append(Split(name, dataset, split, EvaluationRows(of_split, shared.limit)))
    if not found:
        raise LensError(f"{shared.data}: no dataset with an evaluation split here. data.py's first "
                        f"lines say where each belongs; python data.py --check {shared.data} looks "
                        f"at what lies there.")
    return found


def evaluate_split(predictor, split, kept, rank, world):
    """-> one record per row, in order and the same on every rank. What `kept` lacks is predicted:
    each rank takes every world-th of those rows, none twice."""
    args, keys = predictor.args, split.keys
    texts = [annotation["texts"][text] for annotation, text in split.rows.rows]
    missing = [place for place, key in enumerate(keys)
               if kept.records.get(key, {}).get("text") != texts[place]]   # edited since, or new
    mine = missing[rank::world]
    parts = [mine[i:i + args.eval_batch] for i in range(0, len(mine), args.eval_batch)]
    loader = load_batches(split.rows, parts, predictor.collate, predictor.shared.workers,
                          predictor.device)
    made = []
    for batch, places in zip(tqdm(loader, desc=split.name, disable=rank > 0), parts):
        predictions = predictor.predict(batch, places)
        records = [make_record(batch, b, prediction, predictor)
                   for b, prediction in enumerate(predictions)]
        kept.append(records)
        made += records
    of_all_ranks = [None] * world
    dist.all_gather_object(of_all_ranks, made)
    for records in of_all_ranks:
        kept.records.update({record["key"]: record for record in records})
    in_order = []
    for place, (annotation, text) in enumerate(split.rows.rows):
        where = {"set": split.name, "dataset": split.dataset, "split": split.split, "place": place}
        in_order.append({**kept.records.pop(keys[place]), **where, **groups_of(annotation, text)})
    kept.records.update({record["key"]: record for record in in_order})  # the file's order as well
    return in_order


def groups_of(annotation, text):
    """{what a row is also counted under: its name there, or None}: GroundingSuite's class, and the
    shapes world's kind of expression and layout. text: index of the row's expression."""
    kinds = annotation.get("kinds")
    return {"class": annotation.get("class"), "kind": kinds[text] if kinds else None,
            "layout": annotation.get("layout")}


def make_record(batch, b, prediction, predictor):
    """Prediction and truth of one row as plain values, for JSON; boxes in the picture frame."""
    truth, ignore, true_box = batch["masks"][b], batch["ignores"][b], batch["boxes"][b]
    counts = {way: count(mask, truth, ignore, predictor.args.ignore)
              for way, mask in prediction["masks"].items()}
    intersection, union = counts[predictor.counted] or (None, None)
    mask = prediction["masks"][predictor.counted].numpy().astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"key": batch["keys"][b], "text": batch["texts"][b], "answer": prediction["answer"],
            "format": prediction["format"], "box": prediction["box"], "true_box": true_box,
            "box_iou": box_iou(prediction["box"], true_box),
            "intersection": intersection, "union": union, "counts": counts,
            "mask": {"size": rle["size"], "counts": rle["counts"].decode()}}


def weights_in(places):
    """The files of weights among local files and folders; hub ids are neither."""
    files = [path for place in map(Path, places)
             for path in (place.iterdir() if place.is_dir() else [place]) if path.is_file()]
    return sorted(path for path in files if path.suffix in (".safetensors", ".pt"))


class KeptPredictions:
    """Records by key, kept in --predictions, so that an evaluation that was killed goes on.

    While it runs, each rank adds its lines to FILE.RANK; at the end rank 0 joins all into FILE.
    Every line carries the fingerprint of what decides a prediction: a file of another checkpoint
    or other settings is refused."""
    FREE = ("preset", "profile", "splits", "datasets", "workers", "eval_batch", "json", "markdown",
            "predictions", "image", "text", "curves", "output")        # settings that decide none

    def __init__(self, shared, args, rank):
        self.path = Path(args.predictions) if args.predictions else None
        self.rank = rank
        self.run = self.fingerprint(shared, args)
        self.records, problem = {}, None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path and rank == 0:
            try:
                self.read_files()
            except LensError as error:
                problem = str(error)
        of_rank_0 = [self.records, problem]                            # every rank stops, or none
        dist.broadcast_object_list(of_rank_0, src=0)
        self.records, problem = of_rank_0
        if problem:
            raise LensError(problem)

    def fingerprint(self, shared, args):
        settings = {**asdict(shared), **asdict(args)}
        decides = {name: value for name, value in settings.items() if name not in self.FREE}
        places = [shared.mllm, shared.sam]
        if args.checkpoint:
            places += [args.checkpoint, f"{args.checkpoint}/mllm", f"{args.checkpoint}/sam"]
        decides["weights"] = [(str(path), path.stat().st_mtime_ns) for path in weights_in(places)]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    def parts(self):
        return list(self.path.parent.glob(self.path.name + ".[0-9]*"))

    def read_files(self):
        for path in [self.path, *self.parts()]:
            for line in path.read_text().splitlines() if path.exists() else []:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue                                           # cut by a kill: made again
                if not isinstance(record, dict) or record.pop("run", None) != self.run:
                    raise LensError(f"{path} holds the predictions of another checkpoint or other "
                                    f"settings: name another file")
                self.records[record["key"]] = record

    def append(self, records):
        if self.path:
            lines = [json.dumps({**record, "run": self.run}) for record in records]
            with open(f"{self.path}.{self.rank}", "a") as file:
                # a newline first: the last line there may be one that was cut
                file.write("".join("\n" + line for line in lines))

    def finish(self):
        """On rank 0 alone."""
        if self.path:
            lines = [json.dumps({**record, "run": self.run}) for record in self.records.values()]
            write_whole(self.path, "".join(line + "\n" for line in lines))
            for part in self.parts():
                os.remove(part)


# --- Numbers --------------------------------------------------------------------------------------

def summarize_split(split, records):
    """-> {name: summary} of the split and of each group of its rows, see groups_of."""
    subset = {}
    if len(split.rows) < split.rows.total:
        subset = {"subset": f" (subset, n = {len(split.rows)} of {split.rows.total})"}
    results = {split.name: {**summarize(records), "quartiles": quartiles(records),
                            "title": f"{split.dataset} {split.split}", **subset}}
    for sort in ("class", "kind", "layout"):
        for group in sorted({record[sort] for record in records if record[sort]}):
            of_group = [record for record in records if record[sort] == group]
            results[f"{split.name}: {group}"] = {**summarize(of_group), **subset}
    return results


def summarize(records, draws=1000):
    """Metrics of a list of rows: {"giou", "ciou", "box_iou", "acc50", "format", "n"}, the first two
    None where no row has a mask, and 95 % intervals under NAME_95."""
    columns = columns_of(records)
    iou, I, U, boxes = columns.T
    giou = ciou = None
    if not np.isnan(U).all():
        giou = float(np.nanmean(iou))
        ciou = float(np.nansum(I) / max(np.nansum(U), 1))
    found = {"giou": giou, "ciou": ciou, "box_iou": float(boxes.mean()),
             "acc50": float((boxes > 0.5).mean()),
             "format": float(np.mean([record["format"] for record in records])), "n": len(records)}
    objects = [record["key"].rpartition("/")[0] for record in records]
    for name, interval in bootstrap(columns, objects, draws).items():
        found[name + "_95"] = None if found[name] is None else interval
    return found


def columns_of(records):
    """(rows, 4): mask IoU as gIoU counts it, I, U, box IoU. A row whose truth is a box alone has
    NaN for the first three."""
    I = np.array([record["intersection"] for record in records], dtype=float)        # None is NaN
    U = np.array([record["union"] for record in records], dtype=float)
    boxes = np.array([record["box_iou"] for record in records])
    return np.stack([np.where(U == 0, 1.0, I / (U + 1e-5)), I, U, boxes], 1)


def bootstrap(columns, objects, draws):
    """95 % intervals of giou, ciou and box_iou: {name: [low, high]}. Objects are drawn with
    replacement, not rows: the expressions of one object are not independent.

    columns (rows, 4) of `columns_of`; objects: the name of each row's object."""
    _, owner = np.unique(objects, return_inverse=True)
    has_mask = ~np.isnan(columns[:, 2])
    sums = np.zeros((owner.max() + 1, 6))                 # per object: iou, I, U, box, masks, rows
    np.add.at(sums, owner, np.column_stack([np.nan_to_num(columns), has_mask, np.ones(len(owner))]))
    n = len(sums)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)        # (draws, n)
    iou, I, U, boxes, masks, rows = (times @ sums).T                                 # (draws,) each
    drawn = {"giou": iou / np.maximum(masks, 1), "ciou": I / np.maximum(U, 1),
             "box_iou": boxes / np.maximum(rows, 1)}
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}


def quartiles(records):
    """Mean mask IoU of both ways of prompting, for the four quarters of the rows by box IoU, worst
    boxes first: list of {"n", "box_iou" ([lowest, highest]), "context", "box_prompt"}."""
    both_ways = [r for r in records if len(r["counts"]) == 2 and r["union"] is not None]
    both_ways.sort(key=lambda record: record["box_iou"])
    found = []
    for places in np.array_split(np.arange(len(both_ways)), 4):
        if len(places):
            rows = [both_ways[place] for place in places]
            found.append({"n": len(rows), "box_iou": [rows[0]["box_iou"], rows[-1]["box_iou"]],
                          "context": mean_iou([row["counts"]["context"] for row in rows]),
                          "box_prompt": mean_iou([row["counts"]["box_prompt"] for row in rows])})
    return found


def mean_iou(counts):
    """gIoU of a list of [intersection, union]."""
    return float(np.mean([I / (U + 1e-5) if U else 1.0 for I, U in counts]))


# --- Tables ---------------------------------------------------------------------------------------

# cIoU; the last is the average
TABLE_1_COLUMNS = ["refcoco val", "refcoco testA", "refcoco testB", "refcoco+ val",
                   "refcoco+ testA", "refcoco+ testB", "refcocog val", "refcocog test"]
TABLE_1 = {"LENS-3B (paper)": [84.2, 85.3, 81.0, 79.4, 82.8, 74.3, 81.2, 81.0, 81.2],
           "LENS-2B (paper)": [80.7, 82.7, 77.1, 73.8, 78.0, 67.3, 75.7, 76.4, 76.5],
           "GLaMM": [79.5, 83.2, 76.9, 72.6, 78.7, 64.6, 74.2, 74.9, 75.6],
           "LISA": [74.1, 76.5, 71.1, 62.4, 67.4, 56.5, 66.4, 68.5, 67.9],
           "Seg-Zero-7B": [None, 80.3, None, None, 76.2, None, 72.6, None, None]}
# gIoU and cIoU of LENS-3B
TABLE_2 = {"reasonseg val": (62.1, 64.9), "reasonseg test": (57.2, 58.0),
           "groundingsuite eval": (67.0, 78.3)}


def tables(results):
    """{name: summary} -> list of tables (title, header, rows), all strings. A part of a split is
    never set beside published numbers."""
    whole = {summary.get("title"): summary for summary in results.values()
             if "subset" not in summary}
    made = [results_table(results), table_1(whole), table_2(whole), quartile_table(results)]
    return [(title, header, rows) for title, header, rows in made if rows]


def number(value):
    """Per cent, or "-" for None."""
    return "-" if value is None else f"{value:.1f}"


def percent(share):
    return number(None if share is None else 100 * share)


def results_table(results):
    header = ["split", "gIoU", "cIoU", "box IoU", "Acc@0.5", "format", "n"]
    rows = []
    for name, summary in results.items():
        row = [name]
        for metric in ("giou", "ciou", "box_iou"):
            cell, interval = percent(summary[metric]), summary[metric + "_95"]
            if interval:
                cell += f" [{percent(interval[0])}, {percent(interval[1])}]"
            row.append(cell)
        row += [percent(summary["acc50"]), percent(summary["format"])]
        rows.append([*row, f"{summary['n']}{summary.get('subset', '')}"])
    return "Results, with 95 % intervals", header, rows


def table_1(whole):
    """No rows where none of its splits is in `whole`; no average where one is missing."""
    ours = [100 * whole[name]["ciou"] if name in whole else None for name in TABLE_1_COLUMNS]
    rows = []
    if any(value is not None for value in ours):
        average = None if None in ours else sum(ours) / len(ours)
        for name, values in {"ours": [*ours, average], **TABLE_1}.items():
            rows.append([name, *map(number, values)])
    return "Table 1: cIoU", ["", *TABLE_1_COLUMNS, "average"], rows


def table_2(whole):
    names = [name for name in TABLE_2 if name in whole]
    rows = []
    if names:
        summaries = [whole[name] for name in names]
        ours = [f"{percent(one['giou'])} / {percent(one['ciou'])}" for one in summaries]
        paper = ["{} / {}".format(*TABLE_2[name]) for name in names]
        rows = [["ours", *ours], ["LENS-3B (paper)", *paper]]
    return "Table 2 and GroundingSuite: gIoU / cIoU", ["", *names], rows


def quartile_table(results):
    header = ["split", "quartile", "box IoU", "context", "box", "n"]
    rows = []
    for name, summary in results.items():
        for i, quarter in enumerate(summary.get("quartiles", []), 1):
            rows.append([name, f"{i}", "{:.2f} - {:.2f}".format(*quarter["box_iou"]),
                         percent(quarter["context"]), percent(quarter["box_prompt"]),
                         f"{quarter['n']}"])
    title = "Mask gIoU by quartile of box IoU: context queries, and the box itself, as SAM's prompt"
    return title, header, rows


def as_markdown(title, header, rows):
    """A table that reads well as it stands: Markdown with its columns lined up."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [f"**{title}**", ""]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def as_text(results):
    return "\n".join(as_markdown(*table) for table in tables(results))


# --- Pictures -------------------------------------------------------------------------------------

def draw_overlay(image, mask, box, tint=(255, 0, 200)):
    """The picture, enlarged if small, with mask (H, W) bool tinted and the box (picture frame, or
    None) in yellow."""
    scale = max(1, 512 // max(image.size))
    size = (image.width * scale, image.height * scale)
    inside = np.kron(mask, np.ones((scale, scale), bool))
    pixels = np.array(image.resize(size)).astype(float)
    pixels[inside] = 0.45 * pixels[inside] + 0.55 * np.array(tint)
    picture = Image.fromarray(pixels.astype(np.uint8))
    if box and box[0] <= box[2] and box[1] <= box[3]:
        # PIL takes minutes for a number of ten digits
        near = np.clip(box, -max(size), 2 * max(size)) * scale
        line = max(2, size[0] // 250)
        ImageDraw.Draw(picture).rectangle(near.tolist(), outline=(255, 230, 0), width=line)
    return picture


def segment_one(shared, args, device):
    """One picture from the command line: print the reasoning and the box, write the overlay."""
    if Path(args.output).suffix.lower() not in Image.registered_extensions():
        raise LensError(f"--output {args.output}: a picture's name ends with .png or .jpg")
    picture = load_picture(args.image)
    predictor = Predictor(shared, args, device)
    no_truth = np.zeros(picture.size[::-1], dtype=bool)                 # Collator wants one
    item = {"id": args.image, "text": args.text, "image": picture, "mask": no_truth,
            "ignore": no_truth, "box": None}
    prediction = predictor.predict(predictor.collate([item]), places=[0])[0]
    mask, box = prediction["masks"][predictor.counted].numpy(), prediction["box"]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw_overlay(picture, mask, box).save(args.output)
    rounded = None if box is None else [round(value, 1) for value in box]
    print(prediction["answer"])
    print(f"box: {rounded}; mask: {int(mask.sum())} pixels; overlay: {args.output}")


CURVES = ("reward", "reward_format", "reward_box", "reward_mask", "loss_seg", "kl", "entropy",
          "completion_length", "zero_variance", "clip_fraction", "loss", "mask_iou", "grad_norm")


def draw_curves(folder, output):
    """The reward parts and the policy's vital signs over the steps of a run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists() or not path.read_text().strip():
        raise LensError(f"{path} is missing or empty: --curves takes the folder of a run")
    try:
        import matplotlib
    except ImportError:
        raise LensError("--curves needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in CURVES if name in rows[0]]
    figure, axes = pyplot.subplots(2, (len(names) + 1) // 2, figsize=(16, 6), squeeze=False)
    window = max(1, len(rows) // 20)
    steps = np.arange(1, len(rows) + 1)
    for axis, name in zip(axes.flat, names):
        values = np.array([row[name] for row in rows])
        means = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(steps, values, color="#c8d3e0", linewidth=1)
        axis.plot(steps[window - 1:], means, color="#1f4e8c", linewidth=2)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    figure.suptitle(f"{folder}: every step, and its mean over {window}")
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


# --- The script -----------------------------------------------------------------------------------

def main():
    shared, args = parse_settings([SharedArgs, EvaluateArgs], PRESETS, __doc__.splitlines()[0])
    if args.curves:
        draw_curves(args.curves, args.output)
        return
    rank, world, device, _ = start_processes(shared)
    if args.image is not None:
        segment_one(shared, args, device)
        return
    splits = find_splits(shared, args)
    kept = KeptPredictions(shared, args, rank)
    predictor = Predictor(shared, args, device)
    results = {}
    for split in splits:
        records = evaluate_split(predictor, split, kept, rank, world)
        results.update(summarize_split(split, records))
    if rank == 0:
        text = as_text(results)
        print(text)
        if args.json:
            write_whole(args.json, json.dumps(results, indent=2))
        if args.markdown:
            write_whole(args.markdown, text)
        kept.finish()


if __name__ == "__main__":
    run(main)
