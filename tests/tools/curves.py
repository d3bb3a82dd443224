"""Draw what a training run logged: its rewards, losses and other signs of health, step by step.

    python tests/tools/curves.py runs/tiny/rl curves.png        # needs: pip install matplotlib

Each panel shows one column of the run's metrics.jsonl, and its mean over a twentieth of the steps.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from align import run
from data import LensError

COLUMNS = ("reward", "reward_format", "reward_box", "reward_mask", "loss_seg", "kl", "entropy",
           "completion_length", "zero_variance", "clip_fraction", "loss", "mask_iou", "grad_norm")


def draw_curves(folder, output):
    path = Path(folder) / "metrics.jsonl"
    if not path.exists() or not path.read_text().strip():
        raise LensError(f"{path} is missing or empty: name the folder of a run")
    try:
        import matplotlib
    except ImportError:
        raise LensError("this needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in COLUMNS if name in rows[0]]
    window = max(1, len(rows) // 20)
    steps = np.arange(1, len(rows) + 1)
    figure, axes = pyplot.subplots(2, (len(names) + 1) // 2, figsize=(16, 6), squeeze=False)
    for axis, name in zip(axes.flat, names):
        values = np.array([row[name] for row in rows])
        means = np.convolve(values, np.ones(window) / window, "valid")
        axis.plot(steps, values, color="#c8d3e0", linewidth=1)
        axis.plot(steps[window - 1:], means, color="#1f4e8c", linewidth=2)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    figure.suptitle(f"{folder}: every step, and the mean over {window}")
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("output", help="the image to write")
    args = parser.parse_args()
    draw_curves(args.run, args.output)


if __name__ == "__main__":
    run(main)
