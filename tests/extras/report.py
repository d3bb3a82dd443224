"""What evaluate.py prints and draws besides overlays: tables beside the paper's, the gallery (--gallery), a run's curves
(--curves). No method in here."""
import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from data import LensError, write_whole
from evaluate import draw_overlay, mean_iou

# --- Tables ---------------------------------------------------------------------------------------

RES = ["refcoco val", "refcoco testA", "refcoco testB", "refcoco+ val", "refcoco+ testA", "refcoco+ testB", "refcocog val",
       "refcocog test"]
TABLE_1 = {"LENS-3B (paper)": [84.2, 85.3, 81.0, 79.4, 82.8, 74.3, 81.2, 81.0, 81.2],       # cIoU, the last is the average
           "LENS-2B (paper)": [80.7, 82.7, 77.1, 73.8, 78.0, 67.3, 75.7, 76.4, 76.5],
           "GLaMM": [79.5, 83.2, 76.9, 72.6, 78.7, 64.6, 74.2, 74.9, 75.6],
           "LISA": [74.1, 76.5, 71.1, 62.4, 67.4, 56.5, 66.4, 68.5, 67.9],
           "Seg-Zero-7B": [None, 80.3, None, None, 76.2, None, 72.6, None, None]}
TABLE_2 = {"reasonseg val": (62.1, 64.9), "reasonseg test": (57.2, 58.0),                   # LENS-3B
           "groundingsuite eval": (67.0, 78.3)}


def percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def tables(results):
    """results {set: summary} -> list of (title, header, rows), all strings. A part of a split is never set beside published
    numbers."""
    between = lambda pair: f" [{percent(pair[0])}, {percent(pair[1])}]" if pair else ""
    header = ["split", "gIoU", "cIoU", "box IoU", "Acc@0.5", "format", "n"]
    rows = [[name, *(percent(r[key]) + between(r[key + "_95"]) for key in ("giou", "ciou", "box_iou")), percent(r["acc50"]),
             percent(r["format"]), f"{r['n']}" + r.get("subset", "")] for name, r in results.items()]
    made = [("Results, with 95 % intervals", header, rows)]
    whole = {r.get("title"): r for r in results.values() if "subset" not in r}
    ours = [100 * whole[name]["ciou"] if name in whole else None for name in RES]
    if any(v is not None for v in ours):
        ours.append(None if None in ours else sum(ours) / len(RES))
        line = lambda values: ["-" if v is None else f"{v:.1f}" for v in values]
        made.append(("Table 1: cIoU", ["", *RES, "average"],
                     [[name, *line(values)] for name, values in {"ours": ours, **TABLE_1}.items()]))
    known = [name for name in TABLE_2 if name in whole]
    if known:
        made.append(("Table 2 and GroundingSuite: gIoU / cIoU", ["", *known],
                     [["ours", *(f"{percent(whole[name]['giou'])} / {percent(whole[name]['ciou'])}" for name in known)],
                      ["LENS-3B (paper)", *("{} / {}".format(*TABLE_2[name]) for name in known)]]))
    by_box = [[name, f"{i + 1}", "{:.2f} - {:.2f}".format(*q["box_iou"]), percent(q["context"]), percent(q["box_prompt"]),
               str(q["n"])] for name, r in results.items() for i, q in enumerate(r.get("quartiles", []))]
    if by_box:
        made.append(("Mask gIoU by quartile of box IoU: context queries, and the box itself, as SAM's prompt",
                     ["split", "quartile", "box IoU", "context", "box", "n"], by_box))
    return made


def as_markdown(title, header, rows):
    """A table that reads well as it stands: Markdown with its columns lined up."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in lines]
    return "\n".join([f"**{title}**", "", *padded, ""])


def as_text(results):
    return "\n".join(as_markdown(*table) for table in tables(results))


# --- Gallery --------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>LENS gallery</title>
<style>body{font:14px/1.4 system-ui,sans-serif;margin:1.2em;background:#f6f6f4;color:#222}h1{font-size:1.3em}
main{display:grid;gap:1em;grid-template-columns:repeat(auto-fill,minmax(480px,1fr))}
figure{margin:0;padding:.8em;background:#fff;border:1px solid #ddd;border-top:4px solid #bbb}
[data-kind=best]{border-top-color:#2a9d5c}[data-kind=worst]{border-top-color:#d1495b}
figure div{display:flex;gap:4px;align-items:flex-start}img{width:33%%}p,pre{margin:.7em 0}b{overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:20em;overflow:auto;background:#f3f3f3;padding:.6em}</style>
<h1>%s</h1><p>The picture; in green the truth; in magenta the predicted mask; the box of each in yellow. Sort by
<select id="by"><option value="iou">mask IoU</option><option value="box">box IoU</option><option value="text">expression
</option></select> <select id="up"><option value="1">rising</option><option value="-1">falling</option></select>, show
<select id="show"><option>all</option><option>best</option><option>worst</option><option>random</option></select></p>
<main>%s</main><script>
const get = id => document.getElementById(id).value, main = document.querySelector("main");
function order() {
  const by = get("by"), up = Number(get("up")), compare = (a, b) => by == "text" ? a.localeCompare(b) : a - b;
  const figures = [...main.children].sort((a, b) => up * compare(a.dataset[by], b.dataset[by]));
  for (const f of figures) { main.append(f); f.hidden = get("show") != "all" && f.dataset.kind != get("show"); }
}
for (const id of ["by", "up", "show"]) document.getElementById(id).onchange = order;
order();</script>"""


def pick_cases(records, number=8, seed=0):
    """-> list of (kind, record): the best, the worst and random ones of the rest, a third each of a short list."""
    ranked = sorted((r for r in records if r["union"] is not None), key=iou_of, reverse=True)
    number = min(number, (len(ranked) + 2) // 3)
    best, rest = ranked[:number], ranked[number:]
    worst, rest = rest[-number:][::-1], rest[:-number]
    some = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))[:number]]
    return [(kind, r) for kind, rows in (("best", best), ("worst", worst), ("random", some)) for r in rows]


def iou_of(record):
    return mean_iou([(record["intersection"], record["union"])])


def write_gallery(path, cases, title):
    """cases: list of (kind, record, item). One page that needs no other file; all text in it is escaped."""
    def inline(picture):
        picture.thumbnail((480, 480))
        picture.save(buffer := io.BytesIO(), "JPEG", quality=85)
        return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'

    figures = []
    for kind, r, item in cases:
        dark = item["image"].point(lambda v: v // 2)                     # on it a tint shows, whatever the object's colour
        truth = draw_overlay(dark, item["mask"], r["true_box"], tint=(0, 200, 80))
        drawn = draw_overlay(dark, coco_mask.decode(r["mask"]).astype(bool), r["box"])
        plain = draw_overlay(item["image"], np.zeros_like(item["mask"]), None)
        iou, box = iou_of(r), r["box_iou"]
        text, answer, where = map(html.escape, (r["text"], r["answer"], f"{r['set']}, {r['key']}"))
        figures.append(f'<figure data-kind="{kind}" data-iou="{iou:.4f}" data-box="{box:.4f}" data-text="{text}">'
                       f'<div>{"".join(map(inline, (plain, truth, drawn)))}</div><p><b>{text}</b><br>{kind}: mask IoU '
                       f'{iou:.3f}, box IoU {box:.3f} <small>({where})</small></p><pre>{answer}</pre></figure>')
    write_whole(path, PAGE % (html.escape(title), "\n".join(figures)))


# --- Curves --------------------------------------------------------------------------------------

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
                               "completion_length", "zero_variance", "clip_fraction", "loss", "mask_iou", "grad_norm")
             if name in rows[0]]
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
    figure.savefig(output, dpi=90)
