"""Evaluation: a greedy answer, a mask at the picture's own size, the field's metrics; one picture; curves.

    python evaluate.py --preset tiny --checkpoint runs/tiny/rl                     # a table, under a minute
    torchrun --nproc_per_node=8 evaluate.py --checkpoint runs/rl --splits val testA testB --json result.json
    python evaluate.py --checkpoint runs/tiny/rl --image docs/shapes.png --text "the largest red circle" --output overlay.png
    python evaluate.py --curves runs/tiny/rl --output docs/curves.png              # needs matplotlib

Metrics (LISA's, the field's standard): every expression is one row; gIoU is the mean of I / (U + 1e-5), 1 where both masks
are empty; cIoU is the sum of all I over the sum of all U; box IoU and accuracy at box IoU 0.5; the share of answers in
Fig. 4's format. No row is skipped: an answer without a box still has a mask.

`--prompt-with box` evaluates the Seg-Zero way, the predicted box into SAM, without any context module: what the MLLM and
SAM do on their own. `--sample` draws the answers at temperature 1 in the place of greedy ones.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import Collator, EvaluationRows, LensError, load_picture, read_records, rescale_box, to_device
from model import (TINY, SharedArgs, build_lens, draw_uniforms, flag, full_size_masks, generate, on_device, pack_groups,
                   parse_settings, prompt_positions, run, start_processes)
from rewards import box_iou, format_reward, mask_counts, parse_box


@dataclass
class EvaluateArgs:
    checkpoint: str = flag("", "a run's folder (align.py's or train_rl.py's); none with --prompt-with box: the MLLM and "
                               "SAM as they come")
    splits: list[str] = flag(["val"], "splits to evaluate: val, testA, testB (RefCOCO, RefCOCO+); val, test (RefCOCOg)")
    prompt_with: Literal["context", "box"] = flag("context", "prompt SAM with the context queries, or with the predicted "
                                                             "box")
    sample: bool = flag(False, "sample the answers at temperature 1 in the place of greedy decoding")
    eval_batch: int = flag(8, "rows decoded together")
    json: str = flag("", "write the table to this file")
    predictions: str = flag("", "write one line per row (answer, box, mask, IoU) to this file")
    image: str = flag("", "segment this one picture (with --text)")
    text: str = flag("", "the expression for --image")
    output: str = flag("overlay.png", "picture to write for --image or --curves")
    curves: str = flag("", "draw this run's metrics.jsonl")

    def __post_init__(self):
        if self.eval_batch < 1:
            raise LensError(f"--eval-batch must be at least 1, not {self.eval_batch}")
        if bool(self.image) != bool(self.text):
            raise LensError("--image and --text go together")
        if not (self.checkpoint or self.curves or self.prompt_with == "box"):
            raise LensError("--checkpoint is missing: the folder of a run (train one with align.py and train_rl.py; "
                            "--preset tiny needs no download), or --prompt-with box for the MLLM and SAM as they come")


PRESETS = {"tiny": dict(TINY, eval_batch=50, limit=1000)}


# ----------------------------------------------------------------------------------------------------------------
# Answers and masks


@torch.no_grad()
def predict(lens, processor, batch, args, max_new, uniforms=None):
    """Answer and mask of B prompts. -> list of {"answer", "format", "box" (picture frame, or None), "mask" (H, W) bool}."""
    positions = prompt_positions(lens.mllm, batch)
    completions, finished = generate(lens.mllm, batch, positions, 1, max_new, lens.eos, lens.forbidden, uniforms)
    features, device = lens.encode_pictures(batch["sam_pixels"]), batch["pixel_values"].device
    answers = [processor.tokenizer.decode(group[0], skip_special_tokens=True) for group in completions]
    boxes = [parse_box(answer) for answer in answers]                                      # MLLM frame
    if args.prompt_with == "context":
        packed = on_device(pack_groups(batch["ids"], positions, completions, lens.M), device)
        logits = lens(batch, packed, features, with_log_probs=False)["mask_logits"]        # (B, S/4, S/4)
    else:
        side = (lens.sam_size, lens.sam_size)
        prompts = [rescale_box(box or (0, 0, 0, 0), frame, side) for box, frame in zip(boxes, batch["frames"])]
        logits = lens.sam(features, lens.sam.box_prompts(torch.tensor(prompts, device=device).float())[:, None])
    rows = []
    for b, (answer, box, size) in enumerate(zip(answers, boxes, (mask.shape for mask in batch["masks"]))):
        mask = full_size_masks(logits[b:b + 1], size)[0]
        if args.prompt_with == "box" and box is None:
            mask = torch.zeros_like(mask)                                # nothing to prompt with: nothing is segmented
        rows.append({"answer": answer, "format": format_reward(answer) * finished[b][0], "mask": mask,
                     "box": box and rescale_box(box, batch["frames"][b], (size[1], size[0]))})
    return rows


def evaluate_split(lens, processor, rows, collate, shared, args, rank, world, device, name):
    """-> one record per row in order, the same on every rank. Each rank takes every world-th row, none twice."""
    mine = Subset(rows, range(rank, len(rows), world))
    loader = DataLoader(mine, batch_size=args.eval_batch, collate_fn=collate, num_workers=shared.workers)
    records, place = [], rank
    for batch in tqdm(loader, desc=name, disable=rank > 0):
        places = range(place, place + world * len(batch["ids"]), world)
        place = places[-1] + world
        uniforms = draw_uniforms(shared.seed, 0, places, 1, shared.max_completion).to(device) if args.sample else None
        for b, row in enumerate(predict(lens, processor, to_device(batch, device), args, shared.max_completion, uniforms)):
            mask = row.pop("mask").cpu()
            intersection, union = (int(count) for count in mask_counts(mask, batch["masks"][b]))
            rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            records.append({"place": places[b], "key": batch["keys"][b], "text": batch["texts"][b], **row,
                            "true_box": batch["boxes"][b], "box_iou": box_iou(row["box"], batch["boxes"][b]),
                            "intersection": intersection, "union": union,
                            "mask": {"size": rle["size"], "counts": rle["counts"].decode()}})
    everyone = [None] * world
    dist.all_gather_object(everyone, records)
    return sorted((record for part in everyone for record in part), key=lambda record: record["place"])


def summarize(records):
    """Metrics of a list of rows: {"giou", "ciou", "box_iou", "acc50", "format", "n"}."""
    I, U = (np.array([record[name] for record in records], dtype=np.float64) for name in ("intersection", "union"))
    boxes = np.array([record["box_iou"] for record in records])
    return {"giou": float(np.where(U > 0, I / (U + 1e-5), 1.0).mean()), "ciou": float(I.sum() / max(U.sum(), 1)),
            "box_iou": float(boxes.mean()), "acc50": float((boxes > 0.5).mean()),
            "format": float(np.mean([record["format"] for record in records])), "n": len(records)}


def print_table(results, notes):
    print(f"{'split':24s}{'gIoU':>8s}{'cIoU':>8s}{'box IoU':>9s}{'Acc@0.5':>9s}{'format':>8s}{'n':>7s}")
    for split, row in results.items():
        print(f"{split:24s}" + "".join(f"{100 * row[name]:{width}.1f}" for name, width in (
            ("giou", 8), ("ciou", 8), ("box_iou", 9), ("acc50", 9), ("format", 8))) + f"{row['n']:7d}  {notes[split]}")


def write_whole(path, text):
    """Write beside and rename, so that a file that exists is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".tmp").write_text(text)
    path.with_name(path.name + ".tmp").replace(path)


# ----------------------------------------------------------------------------------------------------------------
# Pictures


def draw_overlay(image, mask, box):
    """The picture, enlarged if small, with the mask tinted and the predicted box (picture frame) in yellow."""
    scale = max(1, 512 // max(image.size))
    size = (image.width * scale, image.height * scale)
    inside = np.kron(mask, np.ones((scale, scale), bool))
    pixels = np.array(image.resize(size)).astype(float)
    pixels[inside] = 0.45 * pixels[inside] + 0.55 * np.array([255, 0, 200])
    picture = Image.fromarray(pixels.astype(np.uint8))
    if box and box[0] <= box[2] and box[1] <= box[3]:
        ImageDraw.Draw(picture).rectangle([v * scale for v in box], outline=(255, 230, 0), width=max(2, size[0] // 250))
    return picture


def segment_one(lens, processor, collate, picture, shared, args, device):
    """One picture from the command line: print the reasoning and the box, write the overlay."""
    nothing = np.zeros(picture.size[::-1], dtype=bool)                  # Collator wants a truth; there is none
    batch = collate([{"id": args.image, "text": args.text, "image": picture, "mask": nothing, "box": None}])
    uniforms = draw_uniforms(shared.seed, 0, [0], 1, shared.max_completion).to(device) if args.sample else None
    row = predict(lens, processor, to_device(batch, device), args, shared.max_completion, uniforms)[0]
    mask = row["mask"].cpu().numpy()
    draw_overlay(picture, mask, row["box"]).save(args.output)
    print(row["answer"])
    print(f"box: {row['box'] and [round(v, 1) for v in row['box']]}; mask: {int(mask.sum())} pixels; overlay: {args.output}")


def draw_curves(folder, output):
    """The reward parts and the policy's vital signs over the steps of a run, from its metrics.jsonl."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise LensError(f"{path} is missing: --curves takes the folder of a run")
    try:
        import matplotlib
    except ImportError:
        raise LensError("--curves needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in ("reward", "reward_format", "reward_box", "reward_mask", "loss_seg", "kl", "entropy",
                               "completion_length", "loss", "mask_iou", "grad_norm") if name in rows[0]]
    figure, axes = pyplot.subplots(2, (len(names) + 1) // 2, figsize=(16, 6), squeeze=False)
    window = max(1, len(rows) // 20)
    for axis, name in zip(axes.flat, names):
        values = np.array([row[name] for row in rows])
        steps = np.arange(window, len(values) + 1)
        axis.plot(np.arange(1, len(values) + 1), values, color="#c8d3e0", linewidth=1)
        axis.plot(steps, np.convolve(values, np.ones(window) / window, "valid"), color="#1f4e8c", linewidth=2)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
    for axis in list(axes.flat)[len(names):]:
        axis.axis("off")
    figure.suptitle(f"{folder}: every step, and its mean over {window}")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main():
    shared, args = parse_settings([SharedArgs, EvaluateArgs], PRESETS, __doc__.splitlines()[0])
    if args.curves:
        return draw_curves(args.curves, args.output)
    rank, world, device, _ = start_processes()
    splits = {} if args.image else {split: EvaluationRows(read_records(shared.data, shared.datasets, split), shared.limit)
                                    for split in args.splits}
    picture = load_picture(args.image) if args.image else None
    lens, processor = build_lens(shared, args.checkpoint, torch.bfloat16 if shared.precision == "bf16" else torch.float32)
    lens.to(device).eval()
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt)
    if args.image:
        return segment_one(lens, processor, collate, picture, shared, args, device)
    results, notes = {}, {}
    for split, rows in splits.items():
        records = evaluate_split(lens, processor, rows, collate, shared, args, rank, world, device, split)
        results[split] = summarize(records)
        notes[split] = "" if len(rows) == rows.total else f"subset, n = {len(rows)} of {rows.total}"
        if args.predictions and rank == 0:
            path = Path(args.predictions) if len(splits) == 1 else Path(args.predictions).with_suffix(f".{split}.jsonl")
            write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    if rank == 0:
        print_table(results, notes)
        if args.json:
            write_whole(args.json, json.dumps(results, indent=2))


if __name__ == "__main__":
    run(main)
