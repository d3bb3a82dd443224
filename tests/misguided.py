"""Misguided context (the paper's Figs. 3 and A4) as a curve: what happens to the mask when the box in the answer is wrong?

    python tests/misguided.py --checkpoint runs/tiny/rl     # two minutes; docs/misguided.{json,md,png}; needs matplotlib

The model's own greedy answers on 500 rows of the shapes world's val whose box has found the object (IoU above 0.4). In each
the four numbers of the box are replaced, and nothing else, by a box that is shifted, shrunk, or that of another object of the
picture. Then the mask is drawn twice: by the context queries, which read the changed answer, and by an untouched SAM 2,
which the changed box prompts. Both see the same wrong box; only the queries see picture, question and reasoning as well.

Then the other way round: the answer with its box but without its reasoning, with another row's reasoning, with the reasoning
alone, and no answer at all. What is left of the mask tells which of them the queries read.
"""
import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from data import EvaluationRows, extra, load_item, read_records, rescale_box, select
from model import SamHead, context_positions, full_size_masks, generate, load_sam, pack_groups, prompt_positions
from picture import open_run
from rewards import box_iou, find_box, mask_iou

ROWS, BATCH = 500, 50
SHIFTS, SHRINKS = (0.25, 0.5, 0.75, 1.0), (0.75, 0.5, 0.25)          # of the box's size, of its sides
CORRUPTIONS = ["own box", *(f"shifted by {s}" for s in SHIFTS), *(f"shrunk to {s}" for s in SHRINKS), "another object's box"]
VARIANTS = ["without reasoning", "another row's reasoning", "reasoning alone", "no answer"]


def corrupted(box, other, rng):
    """Boxes (picture frame) in the order of CORRUPTIONS; a shift goes in a random direction and may leave the picture."""
    (x1, y1, x2, y2), angle = box, rng.choice([(1, 0), (-1, 0), (0, 1), (0, -1)])
    width, height = x2 - x1, y2 - y1
    shifted = [(x1 + s * angle[0] * width, y1 + s * angle[1] * height, x2 + s * angle[0] * width, y2 + s * angle[1] * height)
               for s in SHIFTS]
    middle, half = ((x1 + x2) / 2, (y1 + y2) / 2), (width / 2, height / 2)
    shrunk = [(middle[0] - s * half[0], middle[1] - s * half[1], middle[0] + s * half[0], middle[1] + s * half[1])
              for s in SHRINKS]
    return [box, *shifted, *shrunk, other]


def write_box(answer, box, size):
    """The answer with these numbers in its box's place, in the MLLM frame and inside the picture."""
    numbers = [min(max(round(v), 0), side) for v, side in zip(box, size * 2)]
    return re.sub(r'("bbox_2d": )\[[^\]]*\]', lambda m: f"{m[1]}{numbers}", answer)


def without_reasoning(answer):
    return "<answer>" + answer.partition("<answer>")[2]


@torch.no_grad()
def measure(lens, stock, processor, rows, collate, others):
    """-> {name: list of (box IoU, mask IoU of the queries, mask IoU of the box)} over the rows whose own box is right"""
    rng, result = random.Random(0), {name: [] for name in (*CORRUPTIONS, *VARIANTS)}
    spare = "<think>\nIt is here.\n</think>\n"
    tokenize = lambda text: torch.tensor(processor.tokenizer(text).input_ids + [lens.eos])
    for start in range(0, ROWS, BATCH):
        chosen = rows.rows[start:start + BATCH]
        batch = collate([load_item(*row) for row in chosen])
        positions = prompt_positions(lens.mllm, batch)
        completions, _ = generate(lens.mllm, batch, positions, 1, 64, lens.eos, lens.forbidden)
        answers = [processor.tokenizer.decode(group[0], skip_special_tokens=True) for group in completions]
        groups, boxes, kept = [], [], []
        for b, (answer, row) in enumerate(zip(answers, chosen)):
            frame, size = batch["frames"][b], batch["masks"][b].shape[::-1]
            own = find_box(answer)
            if own is None or box_iou(rescale_box(own, frame, size), batch["boxes"][b]) <= 0.4:
                continue
            wrong = corrupted(rescale_box(own, frame, size), rng.choice(others[row[0]["id"]]), rng)
            written = [write_box(answer, rescale_box(box, size, frame), frame) for box in wrong]
            texts = written + [without_reasoning(answer), spare + without_reasoning(answer),
                               answer.partition("<answer>")[0].strip(), ""]
            spare = answer.partition("<answer>")[0]
            kept, groups = kept + [b], groups + [[tokenize(text) for text in texts]]
            boxes.append([rescale_box(find_box(text) or (0, 0, 0, 0), frame, size) for text in written])
        sub = select(batch, kept)
        features = lens.encode_pictures(sub["sam_pixels"])
        packed = pack_groups(sub["ids"], context_positions([positions[b] for b in kept], lens.positions), groups, lens.M)
        read = lens(sub, packed, features, with_log_probs=False)["mask_logits"]
        scale = lens.sam_size / sub["masks"][0].shape[0]                                     # pictures here are square
        prompts = stock.box_prompts(torch.tensor(boxes).flatten(0, 1).float() * scale)
        drawn = stock(features, prompts.view(len(kept), len(CORRUPTIONS), *prompts.shape[1:]))
        per_row = read.view(len(kept), -1, *read.shape[1:]), drawn.view(len(kept), -1, *drawn.shape[1:])
        for b, (ours, theirs) in enumerate(zip(*per_row)):
            truth = sub["masks"][b]
            ours, theirs = (mask_iou(full_size_masks(maps, truth.shape), truth).tolist() for maps in (ours, theirs))
            for i, name in enumerate(result):
                by_box = (box_iou(boxes[b][i], sub["boxes"][b]), ours[i], theirs[i]) if i < len(CORRUPTIONS) else ours[i]
                result[name].append(by_box)
    return result


def table(means, n):
    lines = [f"Mean mask IoU over {n} rows of val whose own box was right (IoU above 0.4); `python tests/misguided.py "
             f"--checkpoint runs/tiny/rl`.", "", "| the answer's box | box IoU | context queries | SAM prompted by that box |",
             "|---|---|---|---|"]
    for name in CORRUPTIONS:
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in means[name]) + " |")
    lines += ["", "| what the queries read | mask IoU |", "|---|---|", f"| the whole answer | {means['own box'][1]:.3f} |"]
    return "\n".join(lines + [f"| {name} | {means[name][0]:.3f} |" for name in VARIANTS]) + "\n"


def draw(means, path):
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    kinds = {kind: [name for name in CORRUPTIONS if kind in name] for kind in ("shifted", "shrunk", "another object")}
    for title, names in kinds.items():
        for column, way, colour in ((1, "context queries", "#c2185b"), (2, "box into SAM", "#1565c0")):
            points = [means[name] for name in (["own box", *names] if len(names) > 1 else names)]
            axis.plot([p[0] for p in points], [p[column] for p in points], color=colour, label=f"{way}, {title}",
                      marker={"shifted": "o", "shrunk": "s", "another object": "*"}[title],
                      linestyle={"shifted": "-", "shrunk": "--", "another object": ""}[title])
    axis.set(xlabel="IoU of the answer's box with the true box", ylabel="mean mask IoU", ylim=(0, 1))
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(folder):
    lens, processor, collate, shared = open_run(folder)
    world = extra("shapes_world")
    records = read_records(shared.data, shared.datasets, ["val"])
    others = {}                                                                    # the picture's other objects
    for record, (_, things, chosen, _) in zip(records, world.scenes("val", len(records))):
        others[record["id"]] = [thing["box"] for i, thing in enumerate(things) if i != chosen]
    rows = EvaluationRows(records, ROWS)
    stock = SamHead(load_sam(shared.sam)).eval()
    found = measure(lens, stock, processor, rows, collate, others)
    means = {name: torch.tensor(values).view(len(values), -1).mean(0).tolist() for name, values in found.items()}
    n = len(found["own box"])
    (ROOT / "docs/misguided.json").write_text(json.dumps({"rows": n, "means": means}, indent=1) + "\n")
    (ROOT / "docs/misguided.md").write_text(table(means, n))
    draw(means, ROOT / "docs/misguided.png")
    print(table(means, n))


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--checkpoint") + 1])
