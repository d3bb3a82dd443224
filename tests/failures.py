"""RL that goes wrong, on purpose: what three failures look like in metrics.jsonl. By hand:

    python tests/failures.py     # from runs/tiny/align; 25 minutes of one core; needs matplotlib

Writes docs/failures.{json,md,png}. Each is the tiny preset's stage 2 for 100 steps and one cause:

    no room           --max-completion 20: a look does not fit, so the model shortens its
                      reasoning to nothing and never learns to look
    steps too large   --lr 3e-3 --beta 0: no KL holds the model, and it ends with nearly one
                      answer for every picture, in a perfect format
    format alone      --lambda-box 0 --lambda-mask 0: soon every answer has the format and the same
                      reward (zero_variance), and nothing else is learned

Beside the healthy run of the same length, a table of the last 25 steps, and IoU and area of the
sampled boxes on 200 rows.
"""
import json
import subprocess
import sys

import numpy as np
from proof import ENVIRONMENT, ROOT, going_on

RUNS = ROOT / "runs/failures"
CAUSES = {"healthy": "",
          "no room": "--max-completion 20",
          "steps too large": "--lr 3e-3 --beta 0",
          "format alone": "--lambda-box 0 --lambda-mask 0"}
COLUMNS = ["reward", "reward_format", "reward_box", "completion_length", "entropy", "kl",
           "zero_variance", "grad_norm"]


def call(script, *flags):
    command = [sys.executable, script, "--preset", "tiny", *map(str, flags)]
    with open(RUNS / "log.txt", "a") as log:
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=log, stderr=log)


def measure(name, flags):
    """-> metrics of the run; of its sampled boxes, mean IoU and mean share of the picture"""
    folder = RUNS / name.replace(" ", "_")
    rows = folder.with_suffix(".jsonl")
    if not (folder / "lens.json").exists():
        call("train_rl.py", "--steps", 100, "--output", folder, *flags.split(), *going_on(folder))
    call("evaluate.py", "--checkpoint", folder, "--sample", "--limit", 200,
         "--predictions", rows)
    answers = [json.loads(line) for line in rows.read_text().splitlines()]
    areas = []
    for row in answers:
        H, W = row["mask"]["size"]
        x1, y1, x2, y2 = np.clip(row["box"] or [0, 0, 0, 0], 0, [W, H, W, H])
        areas.append(max(x2 - x1, 0) * max(y2 - y1, 0) / (H * W))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ious = [row["box_iou"] for row in answers]
    return metrics, float(np.mean(ious)), float(np.mean(areas))


def table(summary):
    lines = ["Stage 2 of the tiny preset, 100 steps; means of the last 25, and IoU and area of "
             "sampled boxes on 200 rows. Made by `python tests/failures.py`.", "",
             "| | cause | " + " | ".join(COLUMNS) + " | IoU of boxes | area of boxes |",
             "|" + "---|" * (len(COLUMNS) + 4)]
    for name, row in summary.items():
        cause = f"`{row['flags']}`" if row["flags"] else ""
        numbers = [f"{row[column]:.2f}" for column in (*COLUMNS, "box_iou", "area")]
        lines.append("| " + " | ".join([name, cause, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def draw(curves, path):
    """curves: {name: the run's lines of metrics.jsonl}"""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5))
    for axis, column in zip(axes.flat, COLUMNS, strict=True):
        for name, metrics in curves.items():
            smooth = np.convolve([row[column] for row in metrics], np.ones(5) / 5, "valid")
            axis.plot(smooth, label=name, linewidth=1)
        axis.set_title(column, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncol=4)
    figure.savefig(path, dpi=70)


def main():
    RUNS.mkdir(parents=True, exist_ok=True)
    curves, summary = {}, {}
    for name, flags in CAUSES.items():
        curves[name], iou, area = measure(name, flags)
        means = {column: float(np.mean([row[column] for row in curves[name][-25:]]))
                 for column in COLUMNS}
        summary[name] = {"flags": flags, **means, "box_iou": iou, "area": area}
    draw(curves, ROOT / "docs/failures.png")
    (ROOT / "docs/failures.json").write_text(json.dumps(summary, indent=1) + "\n")
    (ROOT / "docs/failures.md").write_text(table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
