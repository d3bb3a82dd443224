"""Misguided context (Figs. 3 and A4) as a curve: what of the mask when the answer's box is wrong?

    python tests/misguided.py --checkpoint runs/tiny/rl     # two minutes; needs matplotlib

Writes docs/misguided.{json,md,png}. The model's own greedy answers on 500 rows of the shapes
world's val whose box has found the object (IoU above 0.4). In each the four numbers of the box are
replaced, and nothing else, by a box that is shifted, shrunk, or that of another object of the
picture, which must lie elsewhere: two bars that cross share theirs. Then the mask is drawn twice:
by the context queries, which read the changed answer, and by an untouched SAM 2, which the changed
box prompts. Both see the same wrong box; only the queries see picture, question and reasoning as
well.

Then the other way round: the answer with its box but without its reasoning, with another row's
reasoning, with the reasoning alone, and no answer at all. What is left of the mask tells which of
them the queries read.
"""
import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tiny")]

import torch
import world

from data import EvaluationRows, load_item, read_records, rescale_box, select
from model import SamHead, context_positions, generate, load_sam, pack_groups, prompt_positions
from picture import open_run
from rewards import box_iou, find_box, full_size_masks, mask_iou

ROWS, BATCH = 500, 50
FOUND = 0.4                                # a box above this IoU has found its object
SHIFTS, SHRINKS = (0.25, 0.5, 0.75, 1.0), (0.75, 0.5, 0.25)      # of the box's size, of its sides
CORRUPTIONS = ["own box", *(f"shifted by {s}" for s in SHIFTS),
               *(f"shrunk to {s}" for s in SHRINKS), "another object's box"]
VARIANTS = ["without reasoning", "another row's reasoning", "reasoning alone", "no answer"]


def corrupted(box, other, rng):
    """Boxes (picture frame) in the order of CORRUPTIONS; a shift goes in a random direction and may
    leave the picture."""
    (x1, y1, x2, y2), (right, down) = box, rng.choice([(1, 0), (-1, 0), (0, 1), (0, -1)])
    width, height = x2 - x1, y2 - y1
    shifted = [(x1 + s * right * width, y1 + s * down * height,
                x2 + s * right * width, y2 + s * down * height) for s in SHIFTS]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    shrunk = [(x - s * width / 2, y - s * height / 2, x + s * width / 2, y + s * height / 2)
              for s in SHRINKS]
    return [box, *shifted, *shrunk, other]


def elsewhere(things, chosen):
    """Boxes of a picture's other things that would not count as having found the chosen one."""
    boxes = [thing["box"] for thing in things]
    return [box for box in boxes if box_iou(box, boxes[chosen]) <= FOUND]


def write_box(answer, box, size):
    """The answer with these numbers in its box's place, in the MLLM frame, inside the picture."""
    numbers = [min(max(round(v), 0), side) for v, side in zip(box, size * 2)]
    return re.sub(r'("bbox_2d": )\[[^\]]*\]', lambda m: f"{m[1]}{numbers}", answer)


def without_reasoning(answer):
    return "<answer>" + answer.partition("<answer>")[2]


def rewrite(batch, answers, ids, others, reasonings, rng):
    """-> the rows whose own box is right, and for each of them: the texts of CORRUPTIONS and
    VARIANTS, the boxes (picture frame) of CORRUPTIONS. `reasonings` of the rows before, the last of
    which each row borrows, grow by the rows' own. Rows without another object's box are left
    out."""
    kept, texts, boxes = [], [], []
    for b, answer in enumerate(answers):
        frame, size = batch["frames"][b], batch["masks"][b].shape[::-1]
        own = find_box(answer)
        if own is None or not others[ids[b]]:
            continue
        own = rescale_box(own, frame, size)
        if box_iou(own, batch["boxes"][b]) <= FOUND:
            continue
        reasoning = answer.partition("<answer>")[0]
        written = [write_box(answer, rescale_box(box, size, frame), frame)
                   for box in corrupted(own, rng.choice(others[ids[b]]), rng)]
        kept.append(b)
        texts.append([*written, without_reasoning(answer),
                      reasonings[-1] + without_reasoning(answer), reasoning.strip(), ""])
        boxes.append([rescale_box(find_box(text) or (0, 0, 0, 0), frame, size)
                      for text in written])
        reasonings.append(reasoning)
    return kept, texts, boxes


@torch.no_grad()
def draw_masks(lens, stock, batch, positions, groups, boxes):
    """Mask logits of the context queries behind each of the answers `groups`, and of SAM prompted
    by each of the boxes -> two of (rows, answers or boxes, S/4, S/4)"""
    features = lens.encode_pictures(batch["sam_pixels"])
    packed = pack_groups(batch["ids"], context_positions(positions, lens.positions), groups, lens.M)
    read = lens(batch["pixel_values"], batch["grid_thw"], packed, features,
                with_log_probs=False)["mask_logits"]
    sam_frame = (lens.sam_size, lens.sam_size)
    moved = [rescale_box(box, mask.shape[::-1], sam_frame)
             for mask, of_row in zip(batch["masks"], boxes) for box in of_row]
    prompts = stock.box_prompts(torch.tensor(moved).float())
    drawn = stock(features, prompts.view(len(boxes), len(CORRUPTIONS), *prompts.shape[1:]))
    side = read.shape[-2:]
    return read.view(len(boxes), -1, *side), drawn.view(len(boxes), -1, *side)


def measure(lens, stock, processor, rows, collate, others, longest):
    """Over the rows whose own box is right -> {name: list of (box IoU, mask IoU of the queries,
    mask IoU of the box)}, of VARIANTS the queries' mask IoU alone"""
    rng, result = random.Random(0), {name: [] for name in (*CORRUPTIONS, *VARIANTS)}
    reasonings = ["<think>\nIt is here.\n</think>\n"]

    def tokenize(text):
        return torch.tensor(processor.tokenizer(text).input_ids + [lens.eos])
    for start in range(0, ROWS, BATCH):
        chosen = rows.rows[start:start + BATCH]
        batch = collate([load_item(*row) for row in chosen])
        positions = prompt_positions(lens.mllm, batch)
        completions = generate(lens.mllm, batch, positions, 1, longest, lens.eos,
                               lens.forbidden).completions
        answers = [processor.tokenizer.decode(group[0], skip_special_tokens=True)
                   for group in completions]
        ids = [record["id"] for record, _ in chosen]
        kept, texts, boxes = rewrite(batch, answers, ids, others, reasonings, rng)
        groups = [[tokenize(text) for text in row] for row in texts]
        batch = select(batch, kept)
        maps = draw_masks(lens, stock, batch, [positions[b] for b in kept], groups, boxes)
        for b, (ours, theirs) in enumerate(zip(*maps)):
            truth = batch["masks"][b]
            ours = mask_iou(full_size_masks(ours, truth.shape), truth).tolist()
            theirs = mask_iou(full_size_masks(theirs, truth.shape), truth).tolist()
            for i, name in enumerate(CORRUPTIONS):
                right = box_iou(boxes[b][i], batch["boxes"][b])
                result[name].append((right, ours[i], theirs[i]))
            for name, iou in zip(VARIANTS, ours[len(CORRUPTIONS):]):
                result[name].append(iou)
    return result


def table(means, n):
    lines = [f"Mean mask IoU over {n} rows of val whose own box was right (IoU above 0.4); "
             f"`python tests/misguided.py --checkpoint runs/tiny/rl`.", "",
             "| the answer's box | box IoU | context queries | SAM prompted by that box |",
             "|---|---|---|---|"]
    for name in CORRUPTIONS:
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in means[name]) + " |")
    lines += ["", "| what the queries read | mask IoU |", "|---|---|",
              f"| the whole answer | {means['own box'][1]:.3f} |"]
    lines += [f"| {name} | {means[name][0]:.3f} |" for name in VARIANTS]
    return "\n".join(lines) + "\n"


MARKERS = {"shifted": ("o", "-"), "shrunk": ("s", "--"), "another object": ("*", "")}


def draw(means, path):
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    for title, (marker, line) in MARKERS.items():
        names = [name for name in CORRUPTIONS if title in name]
        points = [means[name] for name in (["own box", *names] if len(names) > 1 else names)]
        for column, way, colour in ((1, "context queries", "#c2185b"),
                                    (2, "box into SAM", "#1565c0")):
            axis.plot([point[0] for point in points], [point[column] for point in points],
                      color=colour, label=f"{way}, {title}", marker=marker, linestyle=line)
    axis.set(xlabel="IoU of the answer's box with the true box", ylabel="mean mask IoU",
             ylim=(0, 1))
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(folder):
    lens, processor, collate, shared = open_run(folder)
    records = read_records(shared.data, shared.datasets, ["val"])
    others = {}                                                      # the picture's other objects
    for record, (_, things, chosen, _) in zip(records, world.scenes("val", len(records))):
        others[record["id"]] = elsewhere(things, chosen)
    rows = EvaluationRows(records, ROWS)
    stock = SamHead(load_sam(shared.sam)).eval()
    found = measure(lens, stock, processor, rows, collate, others, shared.max_completion)
    means = {name: torch.tensor(values).view(len(values), -1).mean(0).tolist()
             for name, values in found.items()}
    n = len(found["own box"])
    written = json.dumps({"rows": n, "means": means}, indent=1)
    (ROOT / "docs/misguided.json").write_text(written + "\n")
    (ROOT / "docs/misguided.md").write_text(table(means, n))
    draw(means, ROOT / "docs/misguided.png")
    print(table(means, n))


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--checkpoint") + 1])
