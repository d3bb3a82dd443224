"""Evaluation: a greedy answer, a mask at the picture's own size, the field's metrics; one picture; a gallery.

    python evaluate.py --preset tiny --checkpoint runs/tiny/rl                       # a table, under a minute
    torchrun --nproc_per_node=8 evaluate.py --checkpoint runs/rl --splits all --limit 0 --predictions rows.jsonl
    python evaluate.py --preset tiny --checkpoint runs/tiny/rl --gallery out.html    # best, worst and random cases
    python evaluate.py --checkpoint runs/tiny/rl --image docs/shapes.png --text "the largest red circle" --output overlay.png
    python evaluate.py --curves runs/tiny/rl --output docs/curves.png                # needs matplotlib

`--checkpoint` takes a run's folder or one as the paper's authors published it. `--splits all` is every evaluation split of
every dataset found below --data: the columns of Tables 1 and 2 and GroundingSuite-Eval, ours beside the paper's.

Metrics (LISA's, the field's standard): every expression is one row; gIoU is the mean of I / (U + 1e-5), 1 where both masks
are empty; cIoU is the sum of all I over the sum of all U; box IoU and accuracy at box IoU 0.5; the share of answers in
Fig. 4's format. No row is skipped: an answer without a box still has a mask. Pixels labelled "ignore" (ReasonSeg) are left
out of I and U; `--ignore background` counts as the released code does, `--ignore foreground` as Seg-Zero does. Intervals
are 95 % bootstrap intervals over objects.

Every answer is also segmented the Seg-Zero way: the predicted box prompts an untouched SAM 2 (of a published checkpoint:
the one it holds), without any context module. A table sets both side by side for the quartiles of box IoU; `--prompt-with
box` makes that way the one that is counted, and needs no checkpoint.
"""
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import (Collator, EvaluationRows, LensError, extra, find_datasets, load_item, load_picture, read_records,
                  rescale_box, to_device, write_whole)
from model import (TINY, SamHead, SharedArgs, build_lens, context_positions, draw_uniforms, flag, full_size_masks, generate,
                   is_released, load_sam, pack_groups, parse_settings, prompt_positions, run, start_processes)
from rewards import box_iou, find_box, format_reward, mask_counts


@dataclass
class EvaluateArgs:
    checkpoint: str = flag("", "a run's folder (align.py's or train_rl.py's) or a published one; none with --prompt-with "
                               "box: the MLLM and SAM as they come")
    splits: list[str] = flag(["val"], "splits to evaluate: val, testA, testB (RefCOCO, RefCOCO+); val, test (RefCOCOg, "
                                      "ReasonSeg); eval (GroundingSuite); or all, of all datasets below --data")
    prompt_with: Literal["context", "box"] = flag("context", "what is counted: SAM prompted with the context queries, or "
                                                             "with the predicted box")
    ignore: Literal["out", "background", "foreground"] = flag("out", "pixels labelled ignore: left out, or counted as one")
    sample: bool = flag(False, "sample the answers at temperature 1 in the place of greedy decoding")
    eval_batch: int = flag(8, "rows decoded together")
    json: str = flag("", "write the numbers to this file")
    markdown: str = flag("", "write the tables to this file")
    predictions: str = flag("", "keep one line per row (answer, box, mask, IoU) in this file, and go on from it")
    gallery: str = flag("", "write a page of best, worst and random cases to this file")
    image: str = flag("", "segment this one picture (with --text)")
    text: str = flag("", "the expression for --image")
    curves: str = flag("", "draw this run's metrics.jsonl")
    output: str = flag("overlay.png", "picture to write for --image or --curves")

    def __post_init__(self):
        if self.eval_batch < 1:
            raise LensError(f"--eval-batch must be at least 1, not {self.eval_batch}")
        if bool(self.image) != bool(self.text):
            raise LensError("--image and --text go together")
        if not (self.checkpoint or self.curves or self.prompt_with == "box"):
            raise LensError("--checkpoint is missing: the folder of a run (train one with align.py and train_rl.py; "
                            "--preset tiny needs no download), or --prompt-with box for the MLLM and SAM as they come")


PRESETS = {"tiny": dict(TINY, eval_batch=50, limit=1000)}


# --- Answers and masks ----------------------------------------------------------------------------

@torch.no_grad()
def predict(lens, stock, processor, batch, args, max_new, uniforms=None):
    """Answer and masks of B prompts; `stock` is the SamHead that boxes prompt.

    -> list of {"answer", "format", "box" (picture frame, or None), "context" and "box_prompt": masks (H, W) bool}; no
    "context" without a checkpoint."""
    positions = prompt_positions(lens.mllm, batch)
    completions, finished = generate(lens.mllm, batch, positions, 1, max_new, lens.eos, lens.forbidden, uniforms)
    features, device = lens.encode_pictures(batch["sam_pixels"]), batch["pixel_values"].device
    answers = [processor.tokenizer.decode(group[0], skip_special_tokens=True) for group in completions]
    boxes = [find_box(answer, lens.prompt) for answer in answers]                          # MLLM frame
    side = (lens.sam_size, lens.sam_size)
    prompts = [rescale_box(box or (0, 0, 0, 0), frame, side) for box, frame in zip(boxes, batch["frames"])]
    logits = {"box_prompt": stock(features, stock.box_prompts(torch.tensor(prompts, device=device).float())[:, None])}
    if args.checkpoint:
        packed = pack_groups(batch["ids"], context_positions(positions, lens.positions), completions, lens.M, device)
        logits["context"] = lens(batch, packed, features, with_log_probs=False)["mask_logits"]
    rows = []
    for b, (answer, box, size) in enumerate(zip(answers, boxes, (mask.shape for mask in batch["masks"]))):
        masks = {kind: full_size_masks(maps[b:b + 1], size)[0].cpu() for kind, maps in logits.items()}
        masks["box_prompt"] &= box is not None                           # nothing to prompt with: nothing is segmented
        rows.append({"answer": answer, "format": format_reward(answer) * finished[b][0], **masks,
                     "box": box and rescale_box(box, batch["frames"][b], (size[1], size[0]))})
    return rows


def count(mask, truth, ignore, convention):
    """Intersection and union as a list of two ints, or None where the truth is a box alone (all of it is ignored)."""
    if ignore.all():
        return None
    truth = truth | ignore if convention == "foreground" else truth
    return [int(n) for n in mask_counts(mask, truth, ignore if convention == "out" else None)]


def evaluate_rows(lens, stock, processor, rows, collate, shared, args, rank, world, device, name, known):
    """-> one record per row in order, the same on every rank; `known` holds what an interrupted evaluation had done. Each
    rank takes every world-th of the remaining rows, none twice."""
    keys = [f"{record['id']}/{i}" for record, i in rows.rows]
    mine = [place for place, key in enumerate(keys) if key not in known][rank::world]
    loader = DataLoader(Subset(rows, mine), batch_size=args.eval_batch, collate_fn=collate, num_workers=shared.workers)
    made, kind = [], "context" if args.prompt_with == "context" else "box_prompt"
    for n, batch in enumerate(tqdm(loader, desc=name, disable=rank > 0)):
        places = mine[n * args.eval_batch:(n + 1) * args.eval_batch]
        uniforms = draw_uniforms(shared.seed, 0, places, 1, shared.max_completion).to(device) if args.sample else None
        found = predict(lens, stock, processor, to_device(batch, device), args, shared.max_completion, uniforms)
        for b, row in enumerate(found):
            masks = {kind: row.pop(kind) for kind in ("context", "box_prompt") if kind in row}
            counts = {k: count(mask, batch["masks"][b], batch["ignores"][b], args.ignore) for k, mask in masks.items()}
            rle = coco_mask.encode(np.asfortranarray(masks[kind].numpy().astype(np.uint8)))
            made.append({"set": name, "key": batch["keys"][b], "text": batch["texts"][b], **row,
                         "true_box": batch["boxes"][b], "box_iou": box_iou(row["box"], batch["boxes"][b]),
                         "intersection": counts[kind] and counts[kind][0], "union": counts[kind] and counts[kind][1],
                         "counts": counts, "class": rows.rows[places[b]][0].get("class"),
                         "mask": {"size": rle["size"], "counts": rle["counts"].decode()}})
        if args.predictions:
            with open(f"{args.predictions}.{rank}", "a") as file:       # a newline first: the last line there may be cut
                file.write("".join("\n" + json.dumps({**record, "run": known["run"]}) for record in made[-len(found):]))
    everyone = [None] * world
    dist.all_gather_object(everyone, made)
    known.update({record["key"]: record for part in everyone for record in part})
    known.update({key: {**known.pop(key), "set": name, "place": place} for place, key in enumerate(keys)})    # now in order
    return [known[key] for key in keys]


def read_predictions(shared, args, rank):
    """What an earlier call of the same evaluation kept: {key: record}, and "run", the fingerprint of what decides a
    prediction. Rank 0 reads for all. Raises LensError if the file is another evaluation's."""
    folder = Path(args.checkpoint)
    free = ("splits", "datasets", "workers", "eval_batch", "json", "markdown", "predictions", "gallery", "output")
    decides = {name: value for name, value in {**asdict(shared), **asdict(args)}.items() if name not in free}
    weights = sorted(folder.glob("*.safetensors")) if args.checkpoint else []
    decides["weights"] = [(path.name, path.stat().st_mtime_ns) for path in weights]
    known = {"run": hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]}
    path = Path(args.predictions)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in [path, *path.parent.glob(path.name + ".[0-9]*")] if args.predictions and rank == 0 else []:
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue                                                 # a line cut by a kill: made again
            if record.pop("run", None) != known["run"]:
                known = f"{file} holds the predictions of another checkpoint or other settings: name another file"
                break
            known[record["key"]] = record
    shared_by_all = [known]
    dist.broadcast_object_list(shared_by_all, src=0)
    if isinstance(shared_by_all[0], str):
        raise LensError(shared_by_all[0])
    return shared_by_all[0]


# --- Numbers and tables ---------------------------------------------------------------------------

def columns_of(records):
    """(rows, 4): mask IoU as gIoU counts it, I, U, box IoU. A row whose truth is a box alone has NaN for the first three."""
    I, U = (np.array([r[name] for r in records], dtype=float) for name in ("intersection", "union"))       # None is NaN
    return np.stack([np.where(U == 0, 1.0, I / (U + 1e-5)), I, U, np.array([r["box_iou"] for r in records])], 1)


def summarize(records, draws=1000):
    """Metrics of a list of rows: {"giou", "ciou", "box_iou", "acc50", "format", "n"}, the first two None where no row has a
    mask; "NAME_95" are bootstrap intervals: objects are drawn with replacement, for the expressions of one object are not
    independent."""
    columns = columns_of(records)
    iou, I, U, boxes = columns.T
    has_masks = not np.isnan(U).all()
    found = {"giou": float(np.nanmean(iou)) if has_masks else None,
             "ciou": float(np.nansum(I) / max(np.nansum(U), 1)) if has_masks else None, "box_iou": float(boxes.mean()),
             "acc50": float((boxes > 0.5).mean()), "format": float(np.mean([r["format"] for r in records])),
             "n": len(records)}
    _, owner = np.unique([r["key"].rpartition("/")[0] for r in records], return_inverse=True)
    sums = np.zeros((owner.max() + 1, 6))                       # per object: the columns, rows with a mask, rows
    np.add.at(sums, owner, np.column_stack([np.nan_to_num(columns), ~np.isnan(U), np.ones(len(U))]))
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), draws) @ sums     # (draws, 6)
    for name, top, bottom in ("giou", 0, 4), ("ciou", 1, 2), ("box_iou", 3, 5):
        interval = np.percentile(drawn[:, top] / np.maximum(drawn[:, bottom], 1), [2.5, 97.5]).tolist()
        found[name + "_95"] = None if found[name] is None else interval
    return found


def quartiles(records):
    """Mean mask IoU of both ways of prompting, for the four quarters of the rows by box IoU, worst boxes first."""
    records = sorted((r for r in records if len(r["counts"]) == 2 and r["union"] is not None), key=lambda r: r["box_iou"])
    way = lambda rows, kind: mean_iou([r["counts"][kind] for r in rows])
    return [{"n": len(rows), "box_iou": [rows[0]["box_iou"], rows[-1]["box_iou"]], "context": way(rows, "context"),
             "box_prompt": way(rows, "box_prompt")} for rows in np.array_split(np.array(records, object), 4) if len(rows)]


def mean_iou(counts):
    return float(np.mean([I / (U + 1e-5) if U else 1.0 for I, U in counts]))


# --- Pictures -------------------------------------------------------------------------------------

def draw_overlay(image, mask, box, tint=(255, 0, 200)):
    """The picture, enlarged if small, with the mask tinted and the box (picture frame) in yellow."""
    scale = max(1, 512 // max(image.size))
    size = (image.width * scale, image.height * scale)
    inside = np.kron(mask, np.ones((scale, scale), bool))
    pixels = np.array(image.resize(size)).astype(float)
    pixels[inside] = 0.45 * pixels[inside] + 0.55 * np.array(tint)
    picture = Image.fromarray(pixels.astype(np.uint8))
    if box and box[0] <= box[2] and box[1] <= box[3]:
        near = np.clip(box, -max(size), 2 * max(size)) * scale           # PIL takes minutes for a number of ten digits
        ImageDraw.Draw(picture).rectangle(near.tolist(), outline=(255, 230, 0), width=max(2, size[0] // 250))
    return picture


def segment_one(lens, stock, processor, collate, picture, shared, args, device):
    """One picture from the command line: print the reasoning and the box, write the overlay."""
    nothing = np.zeros(picture.size[::-1], dtype=bool)                  # Collator wants a truth; there is none
    item = {"id": args.image, "text": args.text, "image": picture, "mask": nothing, "ignore": nothing, "box": None}
    uniforms = draw_uniforms(shared.seed, 0, [0], 1, shared.max_completion).to(device) if args.sample else None
    row = predict(lens, stock, processor, to_device(collate([item]), device), args, shared.max_completion, uniforms)[0]
    mask = row["context" if args.prompt_with == "context" else "box_prompt"].numpy()
    draw_overlay(picture, mask, row["box"]).save(args.output)
    print(row["answer"])
    print(f"box: {row['box'] and [round(v, 1) for v in row['box']]}; mask: {int(mask.sum())} pixels; overlay: {args.output}")


# --- The script -----------------------------------------------------------------------------------

def evaluation_sets(shared, args):
    """-> {"SPLIT" or "DATASET SPLIT": EvaluationRows}."""
    every = args.splits == ["all"]
    wanted = find_datasets(shared.data) if every else {dataset: args.splits for dataset in shared.datasets}
    wanted = {dataset: [split for split in splits if split != "train" or not every] for dataset, splits in wanted.items()}
    if not any(wanted.values()):
        raise LensError(f"{shared.data}: no dataset with an evaluation split here. data.py's first lines say where each "
                        f"belongs; python data.py --check {shared.data} looks at what lies there.")
    found = {}
    for dataset, splits in wanted.items():
        records = read_records(shared.data, [dataset], splits) if splits else []
        for split in splits:
            name = split if len(wanted) == 1 and not every else f"{dataset} {split}"
            found[name] = EvaluationRows([record for record in records if record["split"] == split], shared.limit)
            found[name].title = f"{dataset} {split}"
    return found


def main():
    shared, args = parse_settings([SharedArgs, EvaluateArgs], PRESETS, __doc__.splitlines()[0])
    if args.curves:
        return extra("report").draw_curves(args.curves, args.output)
    rank, world, device, _ = start_processes()
    picture = load_picture(args.image) if args.image else None
    sets = {} if args.image else evaluation_sets(shared, args)
    known = read_predictions(shared, args, rank)
    lens, processor = build_lens(shared, args.checkpoint, torch.bfloat16 if shared.precision == "bf16" else torch.float32)
    stock = lens.sam if is_released(args.checkpoint) else SamHead(load_sam(shared.sam)).to(device).eval()
    lens.to(device).eval()
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt, shared.prompt)
    if args.image:
        return segment_one(lens, stock, processor, collate, picture, shared, args, device)
    results, cases, report = {}, [], extra("report")
    for name, rows in sets.items():
        records = evaluate_rows(lens, stock, processor, rows, collate, shared, args, rank, world, device, name, known)
        subset = {"subset": f" (subset, n = {len(rows)} of {rows.total})"} if len(rows) < rows.total else {}
        results[name] = summarize(records) | {"quartiles": quartiles(records), "title": rows.title, **subset}
        for group in sorted({record["class"] for record in records if record["class"]}):
            results[f"{name}: {group}"] = summarize([record for record in records if record["class"] == group]) | subset
        if args.gallery and rank == 0:
            cases += [(kind, record, load_item(*rows.rows[record["place"]]))
                      for kind, record in report.pick_cases(records)]
    if rank == 0:
        text = report.as_text(results)
        print(text)
        if args.json:
            write_whole(args.json, json.dumps(results, indent=2))
        if args.markdown:
            write_whole(args.markdown, text)
        if args.gallery:
            report.write_gallery(args.gallery, cases, f"{args.checkpoint or shared.mllm}: {', '.join(sets)}")
        if args.predictions:
            run_id = known.pop("run")
            write_whole(args.predictions, "".join(json.dumps({**r, "run": run_id}) + "\n" for r in known.values()))
            for part in Path(args.predictions).parent.glob(Path(args.predictions).name + ".[0-9]*"):
                os.remove(part)


if __name__ == "__main__":
    run(main)
