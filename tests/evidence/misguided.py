"""Misguided context (Figs. 3 and A4), measured: what is left of the mask if the box is wrong?

    python tests/evidence/misguided.py --checkpoint runs/tiny/rl   # two minutes; needs matplotlib
    python tests/evidence/misguided.py --figure                    # the figure, from misguided.json

On 500 rows of the shapes world's val, the model's greedy completions whose box has found the object
(IoU above 0.4). In each of them the four numbers of the box are replaced, and nothing else, by a
box that is shifted, shrunk, or that of another object of the image. The other object must lie
elsewhere: two bars that cross share their box. Then the mask is drawn twice, by the context
queries, which read the changed completion, and by an untouched SAM 2, which the changed box
prompts. Both get the same wrong box, but only the queries see image, expression and reasoning too.

Then the other way round: the completion without its reasoning, with another row's reasoning, with
its reasoning alone, and no completion at all. How much is left of the mask tells which of these the
queries read.

Writes docs/evidence/misguided.json and docs/misguided.png.
"""
import argparse
import random
import re

import torch
from tiny_runs import ROOT, markdown_table, open_run, read_json, write_json  # finds `world`

import world
from build import join_boxes
from data import EvaluationRows, load_item, read_records, rescale_box, select
from grpo import pack_groups
from model import SamHead, context_positions, load_sam, prompt_positions
from rewards import box_iou, find_box, full_size_masks, mask_iou
from train_rl import generate

ROWS, BATCH = 500, 50
FOUND = 0.4                                # a box above this IoU has found its object
SHIFTS, SHRINKS = (0.25, 0.5, 0.75, 1.0), (0.75, 0.5, 0.25)      # in parts of the box's sides
BOXES = ["own box", *(f"shifted by {s}" for s in SHIFTS), *(f"shrunk to {s}" for s in SHRINKS),
         "another object's box"]
TEXTS = ["without reasoning", "another row's reasoning", "reasoning alone", "no completion"]
FIRST_REASONING = "<think>\nIt is here.\n</think>\n"       # for the first row to borrow


def wrong_boxes(box, other, rng):
    """The boxes of BOXES, in the image frame. All shifts go in one random direction, and may leave
    the image."""
    (x1, y1, x2, y2), (right, down) = box, rng.choice([(1, 0), (-1, 0), (0, 1), (0, -1)])
    width, height = x2 - x1, y2 - y1
    shifted = [(x1 + s * right * width, y1 + s * down * height,
                x2 + s * right * width, y2 + s * down * height) for s in SHIFTS]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    shrunk = [(x - s * width / 2, y - s * height / 2, x + s * width / 2, y + s * height / 2)
              for s in SHRINKS]
    return [box, *shifted, *shrunk, other]


def boxes_elsewhere(things, meant):
    """The boxes of an image's things that would not count as having found what is meant."""
    box = join_boxes(things, meant)
    return [thing["box"] for i, thing in enumerate(things)
            if i not in meant and box_iou(thing["box"], box) <= FOUND]


def write_box(completion, box, size):
    """The completion with this box (MLLM frame of this size) in the place of its own."""
    numbers = [min(max(round(v), 0), side) for v, side in zip(box, size * 2)]
    return re.sub(r'("bbox_2d": )\[[^\]]*\]', lambda match: f"{match[1]}{numbers}", completion)


def without_reasoning(completion):
    return "<answer>" + completion.partition("<answer>")[2]


def change_completions(batch, completions, others, last_reasoning, rng):
    """-> (b, texts of BOXES and TEXTS, boxes of BOXES in the image frame) for every row b whose own
    box is right. others: for each row the boxes that lie elsewhere; rows without any are left out.
    Each row borrows the reasoning of the row before, the first one `last_reasoning`."""
    changed = []
    for b, completion in enumerate(completions):
        frame, size = batch["mllm_frames"][b], batch["gt_masks"][b].shape[::-1]
        own = find_box(completion)
        if own is None or not others[b]:
            continue
        own = rescale_box(own, frame, size)
        if box_iou(own, batch["gt_boxes"][b]) <= FOUND:
            continue
        reasoning = completion.partition("<answer>")[0]
        texts = [write_box(completion, rescale_box(box, size, frame), frame)
                 for box in wrong_boxes(own, rng.choice(others[b]), rng)]
        boxes = [rescale_box(find_box(text) or (0, 0, 0, 0), frame, size) for text in texts]
        texts += [without_reasoning(completion), last_reasoning + without_reasoning(completion),
                  reasoning.strip(), ""]
        changed.append((b, texts, boxes))
        last_reasoning = reasoning
    return changed


@torch.no_grad()
def draw_masks(lens, stock_sam, batch, positions, completions, boxes):
    """Mask logits of the queries behind each of the completions, B x n x (T,), and of SAM prompted
    by each of the boxes, B x m (image frame) -> (B, n, S/4, S/4), (B, m, S/4, S/4)"""
    features = lens.encode_images(batch["sam_pixels"])
    positions = context_positions(positions, lens.mask_pass)
    packed = pack_groups(batch["prompt_ids"], positions, completions, lens.M)
    by_queries = lens(batch["pixel_values"], batch["grid_thw"], packed, features,
                      with_log_probs=False)["mask_logits"]
    sam_frame, B = (lens.sam_size, lens.sam_size), len(boxes)
    boxes = [rescale_box(box, mask.shape[::-1], sam_frame)
             for mask, row in zip(batch["gt_masks"], boxes) for box in row]
    prompts = stock_sam.box_prompts(torch.tensor(boxes).float())                 # (B * m, 3, D)
    by_boxes = stock_sam(features, prompts.view(B, -1, *prompts.shape[1:]))
    return by_queries.unflatten(0, (B, -1)), by_boxes.unflatten(0, (B, -1))


def measure(lens, stock_sam, processor, collate, records, others, max_completion):
    """Over the rows whose own box is right -> {name of BOXES: [(box IoU, mask IoU of the queries,
    mask IoU of the box)], name of TEXTS: [(mask IoU of the queries,)]}"""
    rng, reasoning = random.Random(0), FIRST_REASONING
    result = {name: [] for name in (*BOXES, *TEXTS)}
    rows = EvaluationRows(records, ROWS).rows
    for start in range(0, ROWS, BATCH):
        part = rows[start:start + BATCH]
        batch = collate([load_item(*row) for row in part])
        positions = prompt_positions(lens.mllm, batch)
        samples = generate(lens.mllm, batch, positions, 1, max_completion, lens.eos, lens.forbidden)
        texts = [processor.tokenizer.decode(group[0], skip_special_tokens=True)
                 for group in samples.completions]
        changed = change_completions(batch, texts, [others[record["id"]] for record, _ in part],
                                     reasoning, rng)
        places = [b for b, _, _ in changed]
        reasoning = texts[places[-1]].partition("<answer>")[0]
        completions = [[torch.tensor(processor.tokenizer(text).input_ids + [lens.eos])
                        for text in texts] for _, texts, _ in changed]
        batch = select(batch, places)
        logits = draw_masks(lens, stock_sam, batch, [positions[b] for b in places], completions,
                            [boxes for _, _, boxes in changed])
        for b, (_, _, boxes) in enumerate(changed):
            truth = batch["gt_masks"][b]
            by_queries, by_boxes = (mask_iou(full_size_masks(maps[b], truth.shape), truth).tolist()
                                    for maps in logits)
            for name, box, *ious in zip(BOXES, boxes, by_queries, by_boxes):
                result[name].append((box_iou(box, batch["gt_boxes"][b]), *ious))
            for name, iou in zip(TEXTS, by_queries[len(BOXES):], strict=True):
                result[name].append((iou,))
    return result


def box_table(means):
    rows = [[name, *(f"{value:.3f}" for value in means[name])] for name in BOXES]
    return markdown_table(["the completion's box", "its IoU", "mask IoU of the context queries",
                           "mask IoU of that box in SAM"], rows)


def text_table(means):
    rows = [["the whole completion", f"{means['own box'][1]:.3f}"]]
    rows += [[name, f"{means[name][0]:.3f}"] for name in TEXTS]
    return markdown_table(["what the queries read", "mask IoU"], rows)


def draw(means, path):
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for title, marker, line in (("shifted", "o", "-"), ("shrunk", "s", "--"),
                                ("another object", "*", "")):
        names = [name for name in BOXES if title in name]
        points = [means[name] for name in (["own box", *names] if len(names) > 1 else names)]
        for column, way, colour in ((1, "context queries", "#c2185b"),
                                    (2, "box into SAM", "#1565c0")):
            axis.plot([point[0] for point in points], [point[column] for point in points],
                      color=colour, label=f"{way}, {title}", marker=marker, linestyle=line)
    axis.set(xlabel="IoU of the completion's box with gt_box", ylabel="mean mask IoU", ylim=(0, 1))
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="folder of a finished run")
    parser.add_argument("--figure", action="store_true", help="only the figure")
    args = parser.parse_args()
    if not args.figure:
        lens, processor, collate, shared = open_run(args.checkpoint)
        records = read_records(shared.data, shared.datasets, ["val"])
        scenes = world.scenes("val", len(records))
        others = {record["id"]: boxes_elsewhere(things, meant)
                  for record, (_, things, meant, _) in zip(records, scenes)}
        stock_sam = SamHead(load_sam(shared.sam)).eval()
        result = measure(lens, stock_sam, processor, collate, records, others,
                         shared.max_completion)
        means = {name: torch.tensor(values).mean(0).tolist() for name, values in result.items()}
        write_json("misguided", {"rows": len(result["own box"]), "means": means})
    means = read_json("misguided")["means"]
    draw(means, ROOT / "docs/misguided.png")
    print(box_table(means), text_table(means), sep="\n")


if __name__ == "__main__":
    main()
