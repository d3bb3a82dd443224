"""Evaluation: a greedy completion for each expression, its box, its mask and the field's metrics.

    python tests/tiny/world.py runs/shapes                           # once: draws the images
    python evaluate.py --preset tiny --checkpoint runs/tiny/rl       # a table, in under a minute
    torchrun --nproc_per_node=8 evaluate.py --checkpoint runs/rl --splits all   # all benchmarks
    python evaluate.py --checkpoint runs/tiny/rl --image docs/shapes.png --text "the red circle"
    python tests/tools/gallery.py rows.jsonl gallery.html --data datasets    # see the predictions

`predict_both` is the method as it is used: Eqs. 1-4, then a mask at the image's own size. Each mask
is drawn twice, once with the context queries and once the Seg-Zero way, in which the predicted box
prompts an untouched SAM 2. `--sam-prompt` says which of the two is counted. `--sam-prompt box`
works without a checkpoint, with the MLLM and SAM as they were published.

The metrics are LISA's, as in the paper's Tables 1 and 2, and are defined in `summarize`. Every
expression is one row and no row is left out: a completion without a box still has a mask.
`--splits all` takes every evaluation split of every dataset below --data.

Departure from the released code: pixels that ReasonSeg labels "ignore" do not count. The released
code counts them as background (`--ignore background`).

A box is (x1, y1, x2, y2) in one of three frames: the MLLM's, SAM's or the image's own (data.py).
Letters: B prompts, D SAM's width, S the side of SAM's square image, (H, W) an image's own size.
"""
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from tqdm import tqdm

from align import (TINY, SharedArgs, at_least, flag, make_collator, parse_settings, run,
                   start_processes)
from data import (EvaluationRows, LensError, find_datasets, load_batches, load_image,
                  read_records, rescale_box, to_device, write_whole)
from model import SamHead, build_lens, load_sam
from rewards import box_iou, find_box, format_reward, full_size_masks, mask_counts
from train_rl import decoding_cache, predict


@torch.no_grad()
def predict_both(batch, lens, stock_sam, tokenizer, max_completion, cache=None):
    """Eqs. 1-4 for B prompts: a greedy completion, the box that it names, and two masks.

    batch: as data.Collator makes it. stock_sam: a SamHead that was never trained here. cache: for
    B sequences or more, see train_rl.decoding_cache.

    -> list of B {"completion" (its text), "box" (image frame, or None), "format" (R_format, 0.0 or
    1.0), "masks"}. The masks are (H, W) bool at the image's own size, one with the "queries" and
    one with the "box" as SAM's prompt. Where there is no box, the latter is empty.
    """
    batch = to_device(batch, lens.queries.device)
    # outside training the MLLM decodes itself; in train_rl.py a copy of it does
    samples, texts, mask_logits, features = predict(lens, lens.mllm, batch, tokenizer,
                                                    max_completion, cache)
    texts = [text for [text] in texts]                                          # G is 1 here
    boxes = [find_box(text, lens.prompt) for text in texts]                     # MLLM frame
    logits = {"queries": mask_logits,                                           # (B, S/4, S/4) each
              "box": prompt_with_boxes(stock_sam, batch, boxes, features)}
    predictions = []
    for b, (text, box) in enumerate(zip(texts, boxes)):
        H, W = batch["gt_masks"][b].shape
        masks = {way: full_size_masks(maps[b:b + 1], (H, W))[0].cpu()
                 for way, maps in logits.items()}
        if box is None:
            masks["box"][:] = False                                             # no prompt, no mask
        else:
            box = rescale_box(box, batch["mllm_frames"][b], (W, H))             # image frame
        # a completion that was cut at the limit has no end token, so its format is wrong
        predictions.append({"completion": text, "box": box, "masks": masks,
                            "format": format_reward(text) * samples.finished[b][0]})
    return predictions


def prompt_with_boxes(stock_sam, batch, boxes, features):
    """The way of Seg-Zero: B predicted boxes (MLLM frame) prompt an untouched SAM 2. features: from
    SAM's image encoder, which is never trained, so that of lens serves here too. -> mask logits
    (B, S/4, S/4), which mean nothing where a box is None"""
    S = batch["sam_pixels"].shape[-1]
    boxes = [rescale_box(box or (0, 0, 0, 0), frame, (S, S))
             for box, frame in zip(boxes, batch["mllm_frames"])]
    boxes = torch.tensor(boxes, device=features[0].device)                      # (B, 4), SAM frame
    # (B, 1, 3, D): one prompt per image, of two corners and SAM's padding point
    prompts = stock_sam.box_prompts(boxes)[:, None]
    return stock_sam(features, prompts)


# --- Metrics --------------------------------------------------------------------------------------

def summarize(rows, draws=1000):
    """The metrics of n rows, which are dicts as `make_row` gives them.

        giou      1/n sum_i I_i / (U_i + 1e-5)      a term is 1 where both masks are empty (U_i = 0)
        ciou      sum_i I_i / sum_i U_i
        box_iou   1/n sum_i IoU(box_i, gt_box_i)    a term is 0 where there is no box
        acc50     1/n #{i: IoU(box_i, gt_box_i) > 0.5}
        format    1/n sum_i R_format(completion_i)
        n         the number of rows
        giou_95, ciou_95, box_iou_95    [low, high], see `bootstrap`

    I_i and U_i are the pixels in the intersection and the union of the mask and gt_mask.
    """
    I, U, boxes, formats = (np.array([row[name] for row in rows], dtype=float)
                            for name in ("intersection", "union", "box_iou", "format"))
    ious = np.where(U == 0, 1.0, I / (U + 1e-5))
    metrics = {"giou": float(ious.mean()), "ciou": float(I.sum() / max(U.sum(), 1)),
               "box_iou": float(boxes.mean()), "acc50": float((boxes > 0.5).mean()),
               "format": float(formats.mean()), "n": len(rows)}
    objects = [row["id"].rpartition("/")[0] for row in rows]                    # "OBJECT/number"
    return {**metrics, **bootstrap(ious, I, U, boxes, objects, draws)}


def bootstrap(ious, I, U, boxes, objects, draws):
    """95 % intervals: {"giou_95", "ciou_95", "box_iou_95"}, each [low, high].

    One draw takes as many objects as there are, with replacement, and computes the metrics of their
    rows. The interval runs from the 2.5 % to the 97.5 % quantile of all draws. Objects are drawn,
    not rows, since the expressions of one object are not independent. The four arrays (n,) hold a
    number for each row, `objects` the name of its object."""
    _, owner = np.unique(objects, return_inverse=True)
    columns = np.stack([ious, I, U, boxes, np.ones(len(U))], 1)                 # (rows, 5)
    sums = np.zeros((owner.max() + 1, 5))                                       # (objects, 5)
    np.add.at(sums, owner, columns)
    n = len(sums)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)   # (draws, objects)
    ious, I, U, boxes, rows = (times @ sums).T                                  # (draws,) each
    metrics = {"giou_95": ious / rows, "ciou_95": I / np.maximum(U, 1), "box_iou_95": boxes / rows}
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in metrics.items()}


def count(mask, gt_mask, ignore_mask, ignore):
    """Masks (H, W) bool -> {"intersection", "union"} in pixels. ignore: "out" leaves the pixels of
    ignore_mask out, "background" counts them as background."""
    intersection, union = mask_counts(mask, gt_mask, ignore_mask if ignore == "out" else None)
    return {"intersection": int(intersection), "union": int(union)}


# --- Splits and their rows ------------------------------------------------------------------------

@dataclass
class Split:
    name: str       # in the table: "val" if one dataset is evaluated, else "refcoco val"
    full_name: str  # "refcoco val"
    rows: EvaluationRows


def find_splits(shared, args):
    """What --datasets and --splits ask for: a list of Split."""
    if args.splits == ["all"]:
        split_names = {dataset: [name for name in names if name != "train"]
                       for dataset, names in find_datasets(shared.data).items()}
    else:
        split_names = {dataset: args.splits for dataset in shared.datasets}
    short_names = args.splits != ["all"] and len(split_names) == 1
    splits = []
    for dataset, names in split_names.items():
        records = read_records(shared.data, [dataset], names)
        for name in names:
            rows = EvaluationRows([record for record in records if record["split"] == name],
                                  shared.limit)
            full_name = f"{dataset} {name}"
            splits.append(Split(name if short_names else full_name, full_name, rows))
    if not splits:
        raise LensError(f"{shared.data}: no dataset with an evaluation split here. The first lines "
                        f"of data.py say where each dataset belongs, and python "
                        f"tests/tools/check_data.py {shared.data} says what is there.")
    return splits


def evaluate_split(split, predict_batch, collate, shared, args, rank, world, device):
    """The rows of a split in order, the same on every process. This process predicts the rows rank,
    rank + world, ..., so no row is predicted twice, and none is missing."""
    own = range(rank, len(split.rows), world)
    batches = [own[i:i + args.batch] for i in range(0, len(own), args.batch)]
    loader = load_batches(split.rows, batches, collate, shared.workers, device)
    own_rows, all_rows = [], [None] * world
    for batch in tqdm(loader, desc=split.name, total=len(batches), disable=rank > 0):
        for b, prediction in enumerate(predict_batch(batch)):
            own_rows.append(make_row(batch, b, prediction, args))
    dist.all_gather_object(all_rows, own_rows)
    # row k is expression i of an object (record)
    rows = [all_rows[k % world][k // world] for k in range(len(split.rows))]
    for row, (record, i) in zip(rows, split.rows.rows):
        row.update(split=split.full_name, groups=record["groups"][i])
    return rows


def make_row(batch, b, prediction, args):
    """Prediction and ground truth of one row as plain values, a line of --predictions. Boxes are in
    the image frame. intersection, union and mask are those of --sam-prompt; "box_prompt" counts the
    mask with the box as prompt, to compare."""
    gt_mask, ignore_mask, gt_box = (batch[name][b]
                                    for name in ("gt_masks", "ignore_masks", "gt_boxes"))
    counts = {way: count(mask, gt_mask, ignore_mask, args.ignore)
              for way, mask in prediction["masks"].items()}
    mask = prediction["masks"][args.sam_prompt].numpy()
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"id": batch["row_ids"][b], "expression": batch["expressions"][b],
            "completion": prediction["completion"], "format": prediction["format"],
            "box": prediction["box"], "gt_box": gt_box,
            "box_iou": box_iou(prediction["box"], gt_box), **counts[args.sam_prompt],
            "mask": {"size": rle["size"], "counts": rle["counts"].decode()},
            "box_prompt": counts["box"]}


def summarize_split(split, rows):
    """-> {name: metrics} of a split, then of each group that its rows belong to: a named subset,
    such as GroundingSuite's "part", in the order of row["groups"]."""
    results = {split.name: summarize(rows)}
    groups = {(place, name) for row in rows for place, name in enumerate(row["groups"])}
    for _, name in sorted(groups):
        members = [row for row in rows if name in row["groups"]]
        results[f"{split.name}: {name}"] = summarize(members)
    return results


def results_table(results):
    """{name: metrics} -> a Markdown table whose columns are lined up, in per cent."""
    def percent(share):
        return f"{100 * share:.1f}"

    table = [["split", "gIoU", "cIoU", "box IoU", "Acc@0.5", "format", "n"]]
    for name, metrics in results.items():
        cells = [name]
        for metric in ("giou", "ciou", "box_iou"):
            low, high = map(percent, metrics[f"{metric}_95"])
            cells.append(f"{percent(metrics[metric])} [{low}, {high}]")
        cells += [percent(metrics["acc50"]), percent(metrics["format"])]
        table.append([*cells, str(metrics["n"])])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in table)


# --- One image ------------------------------------------------------------------------------------

def segment_image(shared, args, device):
    """Print the completion and the box for one image and one expression, and draw them."""
    image = load_image(args.image)
    predict_batch, collate = load_models(shared, args, device)
    no_truth = np.zeros(image.size[::-1], dtype=bool)                # the Collator needs a gt_mask
    item = {"id": args.image, "expression": args.text, "image": image, "gt_mask": no_truth,
            "ignore_mask": no_truth, "gt_box": None}
    prediction, = predict_batch(collate([item]))
    mask, box = prediction["masks"][args.sam_prompt].numpy(), prediction["box"]
    draw_overlay(image, mask, box).save(args.output)
    rounded = box and [round(value, 1) for value in box]
    print(prediction["completion"])
    print(f"box: {rounded}; mask: {mask.sum()} pixels; overlay: {args.output}")


def draw_overlay(image, mask, box, tint=(255, 0, 200)):
    """The image, enlarged if it is small, with the mask (H, W) bool tinted inside a black edge and
    the box (image frame, or None) in yellow."""
    scale = max(1, 512 // max(image.size))
    size = (image.width * scale, image.height * scale)
    overlay = image.resize(size)
    mask = Image.fromarray(np.asarray(mask)).resize(size, Image.NEAREST).convert("L")
    tinted = Image.blend(overlay, Image.new("RGB", size, tint), 0.55)
    overlay.paste(0, mask=mask)  # black, which only stays at the edge
    overlay.paste(tinted, mask=mask.filter(ImageFilter.MinFilter(5)))
    if box and box[0] <= box[2] and box[1] <= box[3]:
        # PIL would take minutes to draw to a coordinate of ten digits
        near = np.clip(box, -max(size), 2 * max(size)) * scale
        ImageDraw.Draw(overlay).rectangle(near.tolist(), outline=(255, 230, 0),
                                          width=max(2, size[0] // 250))
    return overlay


# --- The script -----------------------------------------------------------------------------------

@dataclass
class EvaluateArgs:
    checkpoint: str = flag("", "folder of a finished run; may be left out with --sam-prompt box")
    splits: list[str] = flag(["val"], "val, testA, testB (RefCOCO, RefCOCO+); val, test (RefCOCOg, "
                                      "ReasonSeg); eval (GroundingSuite); or all, of all datasets "
                                      "below --data")
    sam_prompt: Literal["queries", "box"] = flag(
        "queries", "what prompts SAM for the masks that are counted: the context queries, or the "
                   "predicted box")
    ignore: Literal["out", "background"] = flag(
        "out", "pixels labelled ignore: left out, or counted as background (released code)")
    batch: int = flag(8, "expressions that one process decodes together")
    json: str = flag("", "file for the numbers")
    predictions: str = flag("", "file for the predictions, one line per expression")
    image: str = flag("", "segment this one image (with --text)")
    text: str = flag("", "the expression for --image")
    output: str = flag("overlay.png", "image file that --image draws")

    def __post_init__(self):
        at_least(1, self, "batch")
        if bool(self.image.strip()) != bool(self.text.strip()):
            raise LensError("--image and --text go together: an image, and the expression of what "
                            "to find in it")
        if not self.checkpoint and self.sam_prompt == "queries":
            raise LensError("--checkpoint is missing: the folder of a run (train one with align.py "
                            "and train_rl.py; --preset tiny needs no download). Or take "
                            "--sam-prompt box, for the MLLM and SAM as they were published")


PRESETS = {"tiny": dict(TINY, batch=50, limit=1000)}


def load_models(shared, args, device):
    """-> `predict_both` with everything but its batch, and the Collator that makes such a batch."""
    dtype = torch.bfloat16 if shared.precision == "bf16" else torch.float32
    lens, processor = build_lens(shared, args.checkpoint, dtype)
    lens.to(device).eval()
    stock_sam = SamHead(load_sam(shared.sam)).to(device).eval()
    # decoding in the cache is compiled; for one image that would take longer
    cache = None if args.image else decoding_cache(lens.mllm, shared, args.batch, device)
    collate = make_collator(shared, lens, processor)
    return partial(predict_both, lens=lens, stock_sam=stock_sam, tokenizer=processor.tokenizer,
                   max_completion=shared.max_completion, cache=cache), collate


def check_file(name, path):
    """LensError if the file of flag --name cannot be written, now rather than after the work."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=path.suffix) as file:
            if name == "output":                    # its ending must be that of an image format
                Image.new("RGB", (1, 1)).save(file.name)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except (OSError, ValueError, KeyError) as error:
        hint = "; an image's name ends with .png or .jpg" if name == "output" else ""
        raise LensError(f"--{name} {path}: cannot be written ({error}){hint}") from None


def main():
    shared, args = parse_settings([SharedArgs, EvaluateArgs], PRESETS, __doc__.splitlines()[0])
    for name in ("output",) if args.image else ("json", "predictions"):
        if getattr(args, name):
            check_file(name, getattr(args, name))
    rank, world, device, _ = start_processes(shared)
    if args.image:
        return segment_image(shared, args, device)
    splits = find_splits(shared, args)
    predict_batch, collate = load_models(shared, args, device)
    results, predictions = {}, []
    for split in splits:
        rows = evaluate_split(split, predict_batch, collate, shared, args, rank, world, device)
        results |= summarize_split(split, rows)
        predictions += rows
    if rank == 0:
        print(results_table(results))
        if args.json:
            write_whole(args.json, json.dumps(results, indent=2))
        if args.predictions:
            write_whole(args.predictions, "".join(json.dumps(row) + "\n" for row in predictions))


if __name__ == "__main__":
    run(main)
