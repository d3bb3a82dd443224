"""The two numbers by which the laptop's world is designed: what can RL earn in masks?

    python tests/tiny/design.py look          # the ceiling: behind true answers that look
    python tests/tiny/design.py glance        # the floor: behind answers that glance

Stage 1's training (align.py), on answers written from the truth instead of by the model, before any
RL. RL can turn a model's answers from glances to looks; what lies between the two numbers is all
that this can do for the masks. 600 steps of 32 are one and a half times the main job's alignment.

Prints figures over held-out expressions, at the pictures' own size, of the queries' masks and of
the answer's box put into SAM: gIoU, and by kind of expression and by layout of the thing.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch

import build
import data
import world
from align import TINY, SharedArgs, learning_rate
from grpo import segmentation_loss
from model import (Lens, SamHead, context_module, forbidden_tokens, load_mllm, load_sam,
                   prompt_positions, read_answers)
from rewards import chat_messages, full_size_masks, mask_iou


def make_rows(scenes, processor, looks, seed):
    """Every expression of every scene -> dicts with prompt, answer and its scene's number."""
    rng, tokenizer, rows = random.Random(f"design {seed}"), processor.tokenizer, []
    for n, (arrays, picked, _) in enumerate(scenes):
        (height, width), table = arrays["picture"].shape[:2], arrays["table"].tolist()
        pieces = height * width // build.CELL ** 2
        for expression in picked:
            said = build.answer_of(table, expression, (width, height), looks, rng)
            prompt = processor.apply_chat_template(chat_messages(expression["text"]),
                                                   add_generation_prompt=True)
            prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * pieces)
            ids, _ = build.tokenise(said, tokenizer)
            rows.append({"scene": n, "thing": expression["thing"], "kind": expression["kind"],
                         "text": "".join(part for part, _ in said), "answer": torch.tensor(ids),
                         "ids": torch.tensor(tokenizer(prompt)["input_ids"])})
    return rows


def make_batch(rows, scenes, processor, picture_token):
    """Rows -> a batch as data.Collator makes it, with what stage 1 reads."""
    arrays = [scenes[row["scene"]][0] for row in rows]
    patches = [build.patchify(torch.from_numpy(a["picture"])[None], processor.image_processor)[0]
               for a in arrays]
    squares = torch.from_numpy(np.stack([a["square"] for a in arrays]))
    sizes = [[1, *(side // build.PATCH for side in a["picture"].shape[:2])] for a in arrays]
    low = [torch.from_numpy(a["low"][row["thing"]]).float() / 255 for a, row in zip(arrays, rows)]
    return {"ids": [row["ids"] for row in rows],
            "types": [(row["ids"] == picture_token).long() for row in rows],
            "pixel_values": torch.cat(patches), "grid_thw": torch.tensor(sizes),
            "sam_pixels": build.sam_pixels(squares), "low_masks": torch.stack(low)}


def draw_masks(lens, batch, answers):
    """-> mask logits (B, S/4, S/4) behind given answers."""
    with torch.no_grad():
        positions = prompt_positions(lens.mllm, batch)
        read = read_answers(lens.mllm, batch, positions, answers)
        features = lens.encode_pictures(batch["sam_pixels"])
    return lens.align_forward(read, features), features


@torch.no_grad()
def evaluate(lens, stock, scenes, rows, processor):
    """-> {"queries": figures, "box": figures}; the box is the one the answer names, in SAM."""
    found = {"queries": [], "box": []}
    for k in range(0, len(rows), 50):
        part = rows[k:k + 50]
        batch = make_batch(part, scenes, processor, lens.mllm.config.image_token_id)
        logits, features = draw_masks(lens, batch, [row["answer"] for row in part])
        boxes = []
        for row in part:
            height, width = scenes[row["scene"]][0]["picture"].shape[:2]
            numbers = row["text"].split('bbox_2d": [')[1].split("]")[0].split(", ")
            box = [int(n) for n in numbers]
            boxes.append(data.rescale_box(box, (width, height), (build.SIDE, build.SIDE)))
        prompted = stock(features, stock.box_prompts(torch.tensor(boxes))[:, None])
        for name, maps in (("queries", logits), ("box", prompted)):
            for b, row in enumerate(part):
                truth = torch.from_numpy(scenes[row["scene"]][2]["masks"][row["thing"]])
                found[name].append(mask_iou(full_size_masks(maps[b:b + 1], truth.shape)[0], truth))
    layouts = [scenes[row["scene"]][2]["things"][row["thing"]]["layout"] for row in rows]
    kinds = [row["kind"] for row in rows]
    return {name: figures(ious, kinds, layouts) for name, ious in found.items()}


def figures(ious, kinds, layouts):
    """Mean IoU over all rows, the median, the share under a half; the mean by kind and layout."""
    ious = np.array(ious)
    by = {name: round(float(ious[np.array(labels) == name].mean()), 3)
          for labels, names in ((kinds, world.KINDS), (layouts, world.LAYOUTS)) for name in names
          if name in labels}
    return {"giou": round(float(ious.mean()), 4), "median": round(float(np.median(ious)), 3),
            "under half": round(float((ious < 0.5).mean()), 3), **by}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("habit", choices=["look", "glance"])
    parser.add_argument("--mllm", default=str(Path(__file__).parent / "mllm"))
    parser.add_argument("--sam", default=str(Path(__file__).parent / "sam"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num-queries", type=int, default=TINY["num_queries"])
    parser.add_argument("--scenes", type=int, default=2000, help="pictures, 6 expressions each")
    parser.add_argument("--held-out", type=int, default=300, help="pictures, 2 expressions each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=125, help="steps between printed lines")
    parser.add_argument("--decoder", type=float, default=0.0, help="rate of SAM's decoder")
    parser.add_argument("--cache", help="folder that keeps the scenes for the next call")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    mllm, processor = load_mllm(args.mllm, torch.float32)
    settings = SharedArgs(**{**TINY, "num_queries": args.num_queries})
    forbidden = forbidden_tokens(processor.tokenizer, mllm.lm_head.out_features)
    eos = processor.tokenizer.eos_token_id
    lens = Lens(mllm, load_sam(args.sam), settings, forbidden, eos).eval()
    stock = SamHead(load_sam(args.sam)).eval()
    scenes = build.make_scenes(args.scenes, f"design {args.seed}", cache=args.cache)
    held_out = build.make_scenes(args.held_out, "design held out", True, args.cache)
    rows = make_rows(scenes, processor, args.habit == "look", args.seed)
    held = make_rows([(a, e[:2], w) for a, e, w in held_out], processor, args.habit == "look", 0)
    align(lens, scenes, rows, processor, args)
    print(" ".join(sys.argv))
    for name, row in evaluate(lens, stock, held_out, held, processor).items():
        print(f"{args.habit} {name}: {json.dumps(row)}", flush=True)


def align(lens, scenes, rows, processor, args):
    """Stage 1: queries and connector learn behind the rows' answers."""
    lens.requires_grad_(False)
    trained = [(context_module(lens), args.lr)] + [(lens.sam, args.decoder)] * (args.decoder > 0)
    groups = [{"params": list(module.requires_grad_(True).parameters()), "peak_lr": rate}
              for module, rate in trained]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    began, sums = time.time(), []
    for step in range(args.steps):
        torch.manual_seed(args.seed * 1000003 + step)
        part = [rows[i] for i in torch.randint(len(rows), (args.batch,))]
        batch = make_batch(part, scenes, processor, lens.mllm.config.image_token_id)
        logits, _ = draw_masks(lens, batch, [row["answer"] for row in part])
        loss = segmentation_loss(logits, batch["low_masks"]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate(step, args.steps, 10, "cosine")
        optimizer.step()
        optimizer.zero_grad()
        iou = mask_iou(logits > 0, batch["low_masks"] > 0.5).mean()
        sums.append((loss.item(), iou.item()))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            pace, (loss, iou) = (time.time() - began) / (step + 1), np.mean(sums, 0)
            print(f"step {step + 1}: loss {loss:.3f}, IoU {iou:.3f}, {pace:.2f} s each", flush=True)
            sums = []


if __name__ == "__main__":
    main()
