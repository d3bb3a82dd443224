"""A web page of the best, the worst and some random predictions.

    python evaluate.py --preset tiny --checkpoint runs/tiny/rl --predictions rows.jsonl
    python tests/tools/gallery.py rows.jsonl gallery.html --data runs/shapes

For each of them the page shows the image, the ground truth, the predicted mask and box, the
expression and the whole completion. It is one file that needs no network, and the browser sorts and
filters it.
"""
import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from align import run
from data import LensError, load_item, read_records, write_whole
from evaluate import draw_overlay


def pick_cases(rows, number=8, seed=0):
    """-> list of (kind, row): the "best" and the "worst" by mask IoU, and "random" ones of the
    rest. `number` of each, or a third each of a short list."""
    ranked = sorted(rows, key=mask_iou, reverse=True)
    number = min(number, (len(ranked) + 2) // 3)
    best, rest = ranked[:number], ranked[number:]
    worst, rest = rest[-number:][::-1], rest[:-number]
    order = np.random.default_rng(seed).permutation(len(rest))
    kinds = {"best": best, "worst": worst, "random": [rest[i] for i in order[:number]]}
    return [(kind, row) for kind, rows in kinds.items() for row in rows]


def mask_iou(row):
    return row["intersection"] / row["union"] if row["union"] else 1.0


# --- The rows, and the images and ground truths that belong to them -------------------------------

NEEDED = {"id", "expression", "completion", "box", "gt_box", "box_iou", "intersection", "union",
          "mask", "split"}


def read_rows(path):
    """The file that evaluate.py --predictions wrote -> {split: its rows}, in the file's order."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LensError(f"{path}: not readable ({error}). Write it with evaluate.py --predictions "
                        f"{path}") from None
    splits = {}
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not NEEDED <= set(row):
            raise LensError(f"{path}, line {n}: not a row as evaluate.py --predictions writes it.")
        splits.setdefault(row["split"], []).append(row)
    return splits


def find_items(root, split, rows):
    """The images and ground truths of some rows of a split ("DATASET SPLIT") -> list of
    data.load_item's dicts."""
    dataset, _, name = split.rpartition(" ")
    records = {record["id"]: record for record in read_records(root, [dataset], [name])}
    items = []
    for row in rows:
        record_id, _, place = row["id"].rpartition("/")
        expressions = records[record_id]["expressions"] if record_id in records else []
        if row["expression"] not in expressions[int(place):][:1]:
            raise LensError(f"--data {root}: no row {row['id']} with the expression "
                            f"{row['expression']!r} there. Name the folder that was evaluated.")
        items.append(load_item(records[record_id], int(place)))
    return items


# --- The page -------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>LENS gallery</title>
<style>body{font:14px/1.4 system-ui,sans-serif;margin:1.2em;background:#f6f6f4;color:#222}
h1{font-size:1.3em}
main{display:grid;gap:1em;grid-template-columns:repeat(auto-fill,minmax(480px,1fr))}
figure{margin:0;padding:.8em;background:#fff;border:1px solid #ddd;border-top:4px solid #bbb}
[data-kind=best]{border-top-color:#2a9d5c}[data-kind=worst]{border-top-color:#d1495b}
figure div{display:flex;gap:4px;align-items:flex-start}img{width:33%%}
p,pre{margin:.7em 0}b{overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:20em;overflow:auto}
pre{background:#f3f3f3;padding:.6em}</style>
<h1>%s</h1><p>The image; in green the ground truth; in magenta the predicted mask; the box of each
in yellow. Sort by <select id="by"><option value="iou">mask IoU</option>
<option value="box">box IoU</option><option value="text">expression</option></select>
<select id="up"><option value="1">rising</option><option value="-1">falling</option></select>,
show <select id="show"><option>all</option><option>best</option><option>worst</option>
<option>random</option></select></p>
<main>%s</main><script>
const get = id => document.getElementById(id).value, main = document.querySelector("main");
function order() {
  const by = get("by"), up = Number(get("up")), show = get("show");
  const compare = (a, b) => by == "text" ? a.localeCompare(b) : a - b;
  const figures = [...main.children];
  figures.sort((a, b) => up * compare(a.dataset[by], b.dataset[by]));
  for (const f of figures) { main.append(f); f.hidden = show != "all" && f.dataset.kind != show; }
}
for (const id of ["by", "up", "show"]) document.getElementById(id).onchange = order;
order();</script>"""

def write_gallery(path, cases, title):
    """cases: list of (kind, row, item)."""
    figures = [draw_figure(kind, row, item) for kind, row, item in cases]
    write_whole(path, PAGE % (html.escape(title), "\n".join(figures)))


def draw_figure(kind, row, item):
    """One case as an element of the page. All text in it is escaped."""
    plain = draw_overlay(item["image"], np.zeros_like(item["gt_mask"]), None)
    dark = item["image"].point(lambda value: value // 2)  # so that a tint shows on any colour
    truth = draw_overlay(dark, item["gt_mask"], row["gt_box"], tint=(0, 200, 80))
    prediction = draw_overlay(dark, coco_mask.decode(row["mask"]).astype(bool), row["box"])
    images = "".join(inline(image) for image in (plain, truth, prediction))
    iou, box = mask_iou(row), row["box_iou"]
    expression, completion = html.escape(row["expression"]), html.escape(row["completion"])
    where = html.escape(f"{row['split']}, {row['id']}")
    return (f'<figure data-kind="{kind}" data-iou="{iou:.4f}" data-box="{box:.4f}" '
            f'data-text="{expression}"><div>{images}</div><p><b>{expression}</b><br>'
            f'{kind}: mask IoU {iou:.3f}, box IoU {box:.3f} <small>({where})</small></p>'
            f'<pre>{completion}</pre></figure>')


def inline(image):
    """An image as an element of the page, with the file inside it."""
    image.thumbnail((480, 480))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{code}" alt="">'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", help="the file that evaluate.py --predictions wrote")
    parser.add_argument("page", help="the page to write")
    parser.add_argument("--data", default="datasets", help="the folder that was evaluated")
    args = parser.parse_args()
    cases = []
    splits = read_rows(args.rows)
    for split, rows in splits.items():
        picked = pick_cases(rows)
        items = find_items(args.data, split, [row for _, row in picked])
        cases += [(kind, row, item) for (kind, row), item in zip(picked, items)]
    write_gallery(args.page, cases, f"{args.rows}: {', '.join(splits)}")


if __name__ == "__main__":
    run(main)
