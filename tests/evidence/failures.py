"""Three ways in which stage 2 fails, made on purpose, and how they look in metrics.jsonl.

    python tests/evidence/failures.py     # after stage 1; a quarter of an hour of one core; needs matplotlib

Each run is 50 steps of the tiny preset's stage 2, from runs/tiny/align, with one thing wrong. A
healthy run of the same length is beside them. docs/results.md says what happens in each.

Writes docs/evidence/failures.json (means of the last 25 steps, and IoU and area of the sampled
boxes on 200 rows) and docs/failures.png.
"""
import numpy as np
from tiny_runs import ROOT, evaluate, markdown_table, read_lines, train, write_json

RUNS = ROOT / "runs/failures"
CAUSES = {"healthy": "",
          "no room": "--max-completion 20",
          "steps too large": "--lr 3e-3 --beta 0",
          "format alone": "--lambda-box 0 --lambda-mask 0"}
COLUMNS = ["reward", "reward_format", "reward_box", "completion_length", "entropy", "kl",
           "zero_variance", "grad_norm"]


def box_area(row):
    """The share of the image that the predicted box covers."""
    height, width = row["mask"]["size"]
    x1, y1, x2, y2 = np.clip(row["box"] or (0, 0, 0, 0), 0, [width, height, width, height])
    return max(x2 - x1, 0) * max(y2 - y1, 0) / (height * width)


def measure(name, flags):
    """-> the lines of metrics.jsonl; mean IoU and mean area of the sampled boxes"""
    folder = RUNS / name.replace(" ", "_")
    train("train_rl.py", folder, "--steps", 50, *flags.split())
    rows = folder.with_suffix(".jsonl")
    evaluate(rows, "sampled", "--checkpoint", folder, "--limit", 200)
    predictions = read_lines(rows)
    return (read_lines(folder / "metrics.jsonl"),
            float(np.mean([row["box_iou"] for row in predictions])),
            float(np.mean([box_area(row) for row in predictions])))


def table(summary):
    rows = [[name, f"`{numbers['flags']}`" if numbers["flags"] else "",
             *(f"{numbers[column]:.2f}" for column in (*COLUMNS, "box_iou", "area"))]
            for name, numbers in summary.items()]
    return markdown_table(["", "cause", *COLUMNS, "IoU of boxes", "area of boxes"], rows)


def draw(curves, path):
    """curves: {name: the run's lines of metrics.jsonl}"""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5))
    for axis, column in zip(axes.flat, COLUMNS, strict=True):
        for name, metrics in curves.items():
            smooth = np.convolve([line[column] for line in metrics], np.ones(5) / 5, "valid")
            axis.plot(smooth, label=name, linewidth=1)
        axis.set_title(column, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncol=4)
    figure.savefig(path, dpi=70)


def main():
    curves, summary = {}, {}
    for name, flags in CAUSES.items():
        curves[name], iou, area = measure(name, flags)
        means = {column: float(np.mean([line[column] for line in curves[name][-25:]]))
                 for column in COLUMNS}
        summary[name] = {"flags": flags, **means, "box_iou": iou, "area": area}
    draw(curves, ROOT / "docs/failures.png")
    write_json("failures", summary)
    print(table(summary))


if __name__ == "__main__":
    main()
