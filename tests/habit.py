"""From glancing to looking: how the answers change during stage 2. By hand, after stage 1:

    python tests/habit.py              # the main job's stage 2 again, watched; needs matplotlib

The stand-in MLLM can answer in two ways (docs/world.md): it glances ("It is the ...") or it looks
("The circles are at ..."). This runs the tiny preset's stage 2 from runs/tiny/align on one process
and counts, at every step, the share of the sampled answers that look; and every ten steps the share
among the greedy answers to the same 200 rows of val. Nothing tells the model which way is better
but the rewards.

Writes docs/habit.json and docs/habit.png: both shares, the length of the answers, the rewards.
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_rl
from proof import LOOKS

RUN = ROOT / "runs/habit"
VAL_EVERY, VAL_ROWS = 10, 200


def share_of_looks(texts):
    """texts: lists of G answers -> the share that looks."""
    answers = [text for group in texts for text in group]
    return sum(text.startswith(LOOKS) for text in answers) / len(answers)


def watch(seen):
    """Every call of make_groups leaves its answers' share of looks in `seen`: a list of sampled
    ones, one per step, and a list of lists of greedy ones, one per validation."""
    make_groups = train_rl.make_groups

    def watched(lens, reference, batch, positions, samples, texts, args):
        greedy = len(texts[0]) == 1
        if not greedy:
            seen["sampled"].append(share_of_looks(texts))
            seen["greedy"].append([])
        else:
            seen["greedy"][-1].append((share_of_looks(texts), len(texts)))
        return make_groups(lens, reference, batch, positions, samples, texts, args)
    train_rl.make_groups = watched


def mean_share(parts):
    """[(share, answers)] -> the share over all of them, or None."""
    total = sum(number for _, number in parts)
    return round(sum(share * number for share, number in parts) / total, 4) if total else None


def draw(rows, path):
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    steps = [row["step"] for row in rows]
    greedy = [(row["step"], row["greedy"]) for row in rows if row["greedy"] is not None]
    axes[0].plot(steps, [row["sampled"] for row in rows], color="#9db4cf", label="sampled")
    axes[0].plot(*zip(*greedy), color="#1f4e8c", marker="o", label="greedy")
    axes[0].set_title("share of answers that look")
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend()
    axes[1].plot(steps, [row["completion_length"] for row in rows], color="#1f4e8c")
    axes[1].set_title("tokens in a sampled answer")
    for name, color in (("format", "#7a7a7a"), ("box", "#1b7f4b"), ("mask", "#b3261e")):
        axes[2].plot(steps, [row[f"reward_{name}"] for row in rows], color=color, label=name)
    axes[2].set_title("rewards of sampled answers")
    axes[2].legend(loc="lower right")
    for axis in axes:
        axis.set_xlabel("step of stage 2")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", default="runs/tiny/align", help="a finished stage 1")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    args = parser.parse_args()
    seen = {"sampled": [], "greedy": []}
    watch(seen)
    sys.argv = ["train_rl.py", "--preset", "tiny", "--init", args.init, "--output", str(RUN),
                "--val-every", str(VAL_EVERY), "--val-rows", str(VAL_ROWS)]
    sys.argv += ["--steps", str(args.steps)] if args.steps else []
    train_rl.run(train_rl.main)
    metrics = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    names = ("completion_length", "reward_format", "reward_box", "reward_mask")
    rows = [{"step": row["step"], "sampled": round(sampled, 4), "greedy": mean_share(greedy),
             **{name: round(row[name], 4) for name in names}}
            for row, sampled, greedy in zip(metrics, seen["sampled"], seen["greedy"], strict=True)]
    made = {"command": "python tests/habit.py", "rows": rows}
    (ROOT / "docs/habit.json").write_text(json.dumps(made, indent=1) + "\n")
    draw(rows, ROOT / "docs/habit.png")


if __name__ == "__main__":
    main()
