"""A page of best, worst and random cases, from the rows that evaluate.py kept.

    python evaluate.py --preset tiny --checkpoint runs/tiny/rl --predictions rows.jsonl
    python tests/gallery.py rows.jsonl gallery.html --data runs/shapes

Each case shows the picture, the truth, the predicted mask and box, the expression and the whole
answer. One page that needs no other file and no network; sorted and filtered in the browser.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from align import run
from data import LensError, load_item, read_records, write_whole
from evaluate import draw_overlay, mean_iou

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
<h1>%s</h1><p>The picture; in green the truth; in magenta the predicted mask; the box of each
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

NEEDED = {"set", "dataset", "split", "key", "text", "answer", "box", "true_box", "box_iou",
          "intersection", "union", "mask"}                             # of a row


def read_rows(path):
    """What evaluate.py --predictions wrote -> {set: its records}, in the file's order."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LensError(f"{path}: not readable ({error}). Write it with evaluate.py --predictions "
                        f"{path}") from None
    found = {}
    for n, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not NEEDED <= set(record):
            raise LensError(f"{path}, line {n}: not a row as evaluate.py --predictions leaves it. "
                            f"Let that evaluation run to its end first.")
        found.setdefault(record["set"], []).append(record)
    return found


def find_items(root, records):
    """The pictures and truths of some rows -> list of data.load_item's dicts, in their order."""
    annotations = {}
    for dataset, split in dict.fromkeys((row["dataset"], row["split"]) for row in records):
        for annotation in read_records(root, [dataset], [split]):
            annotations[annotation["id"]] = annotation
    items = []
    for row in records:
        name, _, text_index = row["key"].rpartition("/")
        texts = annotations[name]["texts"] if name in annotations else []
        if row["text"] not in texts[int(text_index):][:1]:
            raise LensError(f"--data {root}: no row {row['key']} with the expression "
                            f"{row['text']!r} there. Name the folder that was evaluated.")
        items.append(load_item(annotations[name], int(text_index)))
    return items


def iou_of(record):
    return mean_iou([(record["intersection"], record["union"])])


def pick_cases(records, number=8, seed=0):
    """-> list of (kind, record): the best, the worst and random ones of the rest, a third each of
    a short list. Left out: rows whose truth is a box alone, which have no mask IoU."""
    ranked = sorted((r for r in records if r["union"] is not None), key=iou_of, reverse=True)
    number = min(number, (len(ranked) + 2) // 3)
    best, rest = ranked[:number], ranked[number:]
    worst, rest = rest[-number:][::-1], rest[:-number]
    order = np.random.default_rng(seed).permutation(len(rest))
    some = [rest[i] for i in order[:number]]
    kinds = {"best": best, "worst": worst, "random": some}
    return [(kind, record) for kind, rows in kinds.items() for record in rows]


def inline(picture):
    """A picture as an element of the page, the file within it."""
    picture.thumbnail((480, 480))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{code}" alt="">'


def draw_figure(kind, record, item):
    """One case as an element of the page; all text in it is escaped."""
    plain = draw_overlay(item["image"], np.zeros_like(item["mask"]), None)
    dark = item["image"].point(lambda value: value // 2)  # on it a tint shows on any colour
    truth = draw_overlay(dark, item["mask"], record["true_box"], tint=(0, 200, 80))
    mask = coco_mask.decode(record["mask"]).astype(bool)
    drawn = draw_overlay(dark, mask, record["box"])
    pictures = "".join(inline(picture) for picture in (plain, truth, drawn))
    iou, box = iou_of(record), record["box_iou"]
    text, answer = html.escape(record["text"]), html.escape(record["answer"])
    where = html.escape(f"{record['set']}, {record['key']}")
    return (f'<figure data-kind="{kind}" data-iou="{iou:.4f}" data-box="{box:.4f}" '
            f'data-text="{text}"><div>{pictures}</div><p><b>{text}</b><br>'
            f'{kind}: mask IoU {iou:.3f}, box IoU {box:.3f} <small>({where})</small></p>'
            f'<pre>{answer}</pre></figure>')


def write_gallery(path, cases, title):
    """cases: list of (kind, record, item)."""
    figures = [draw_figure(kind, record, item) for kind, record, item in cases]
    write_whole(path, PAGE % (html.escape(title), "\n".join(figures)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", help="what evaluate.py --predictions wrote")
    parser.add_argument("page", help="the page to write")
    parser.add_argument("--data", default="datasets", help="the folder that was evaluated")
    args = parser.parse_args()
    cases = []
    sets = read_rows(args.rows)
    for records in sets.values():
        chosen = pick_cases(records)
        items = find_items(args.data, [record for _, record in chosen])
        cases += [(kind, record, item) for (kind, record), item in zip(chosen, items)]
    write_gallery(args.page, cases, f"{args.rows}: {', '.join(sets)}")


if __name__ == "__main__":
    run(main)
