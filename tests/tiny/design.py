"""How much can stage 2 gain in masks on the laptop's world? A yardstick and a floor.

    python tests/tiny/design.py look          # the yardstick: stage 1 after completions that look
    python tests/tiny/design.py glance        # the floor: stage 1 after completions that glance

Ten minutes of one core each. docs/world.md says what follows from the yardstick.

This is stage 1 as in the README's job, but behind completions that are written from the truth, with
one habit or the other. Stage 2 can turn the MLLM's completions from glances into looks. What lies
between the two numbers is about what this can do for the masks.

Prints the mean mask IoU (gIoU) over held-out expressions, in all, by kind and by layout: of the
context queries' masks, and of SAM's masks when the completion's box prompts it.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch
from PIL import Image

import build
import world
from align import PRESETS, SharedArgs, TrainArgs, align_step, learning_rate, make_optimizer
from data import Collator
from evaluate import prompt_with_boxes
from model import SamHead, build_lens, load_sam, prefill, prompt_positions, set_trainable
from rewards import full_size_masks, mask_iou, parse_box


def make_rows(split, scenes, looks, lens, tokenizer):
    """Every expression of a split's first scenes -> list of rows: an item as data.load_item gives
    it, with the completion's text and tokens, and the groups that are counted apart."""
    rng, rows = random.Random(f"design {split}"), []
    for image, things, meant, expressions in world.scenes(split, scenes):
        size, target = image.shape[1::-1], world.join_things(things, meant)
        nothing = target["mask"] & False
        for expression in expressions:
            spans = build.write_completion(build.mllm_things(things, size), expression,
                                           build.mllm_size(size), looks, rng)
            text = "".join(part for part, _ in spans)
            rows.append({
                "id": f"{split}/{len(rows)}", "expression": expression["words"],
                "image": Image.fromarray(image), "gt_mask": target["mask"], "ignore_mask": nothing,
                "gt_box": target["box"], "completion": text,
                "tokens": torch.tensor(tokenizer(text).input_ids + [lens.eos]),
                "groups": ("all", expression["kind"], target["layout"])})
    return rows


def train(lens, rows, collate, args):
    """Stage 1: the queries and the connector learn behind the rows' completions. args: TrainArgs"""
    set_trainable(lens, "align")
    trained = [p for p in lens.parameters() if p.requires_grad]
    optimizer = make_optimizer([{"params": trained}], args, torch.device("cpu"))
    rng, sums, began = random.Random("design"), torch.zeros(2), time.time()
    for step in range(args.steps):
        items = rng.choices(rows, k=args.batch)
        sums += align_step(lens, collate(items), [item["tokens"] for item in items], 1, args)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * learning_rate(step, args.steps, args.warmup,
                                                                  "cosine")
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            loss, iou = (sums / (args.batch * (step % 100 + 1))).tolist()
            print(f"step {step + 1}: loss {loss:.3f}, mask IoU {iou:.3f}, "
                  f"{time.time() - began:.0f} s", flush=True)
            sums.zero_()


@torch.no_grad()
def evaluate(lens, stock_sam, rows, collate):
    """-> {"queries", "box": {group: mean mask IoU}}, at the images' own size"""
    ious = {"queries": {}, "box": {}}
    for k in range(0, len(rows), 50):
        items = rows[k:k + 50]
        batch = collate(items)
        features = lens.encode_images(batch["sam_pixels"])
        boxes = [parse_box(row["completion"]) for row in items]               # MLLM frame
        prefilled = prefill(lens.mllm, batch, prompt_positions(lens.mllm, batch),
                            [row["tokens"] for row in items])
        logits = {"queries": lens.align_forward(prefilled, features),
                  "box": prompt_with_boxes(stock_sam, batch, boxes, features)}
        for way, maps in logits.items():
            for b, row in enumerate(items):
                gt_mask = batch["gt_masks"][b]
                iou = mask_iou(full_size_masks(maps[b:b + 1], gt_mask.shape)[0], gt_mask)
                if way == "box" and boxes[b] is None:                        # no box, no mask
                    iou = 0.0
                for group in row["groups"]:
                    ious[way].setdefault(group, []).append(iou)
    names = dict.fromkeys(["all", *world.KINDS, *world.LAYOUTS])
    return {way: {name: round(sum(groups[name]) / len(groups[name]), 3)
                  for name in names if name in groups} for way, groups in ious.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("habit", choices=["look", "glance"])
    parser.add_argument("--steps", type=int, default=PRESETS["tiny"]["steps"])
    parser.add_argument("--scenes", type=int, default=2000, help="of the train split, at most 4000")
    parser.add_argument("--held-out", type=int, default=300, help="scenes of val")
    flags = parser.parse_args(argv)
    settings = {**PRESETS["tiny"], "steps": flags.steps}
    shared, args = (cls(**{name: value for name, value in settings.items()
                           if name in cls.__dataclass_fields__}) for cls in (SharedArgs, TrainArgs))
    lens, processor = build_lens(shared)
    lens.eval()
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt)
    rows, held_out = (make_rows(split, scenes, flags.habit == "look", lens, processor.tokenizer)
                      for split, scenes in (("train", flags.scenes), ("val", flags.held_out)))
    train(lens, rows, collate, args)
    stock_sam = SamHead(load_sam(shared.sam)).eval()
    print(f"{len(held_out)} held-out expressions, behind completions that {flags.habit}")
    for way, means in evaluate(lens, stock_sam, held_out, collate).items():
        print(f"  SAM prompted with the {way}: {json.dumps(means)}", flush=True)


if __name__ == "__main__":
    main()
