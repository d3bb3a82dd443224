"""From glancing to looking: how completions change during stage 2.

    python tests/evidence/habit.py            # after stage 1; stage 2 once more; needs matplotlib
    python tests/evidence/habit.py --figure   # only the figure, from habit.json

The stand-in MLLM can complete a prompt in two ways (docs/world.md): it glances ("It is the ...") or
it looks ("The circles are at ..."). This runs the tiny preset's stage 2 from runs/tiny/align on one
process. It counts the sampled completions that look at every step, and every ten steps the greedy
completions that look, for the same 200 rows of val.

Writes docs/evidence/habit.json and docs/habit.png: both shares, the completions' length, the
rewards.
"""
import argparse
import sys

import numpy as np
from tiny_runs import LOOKS, ROOT, read_json, read_lines, write_json, write_world

import train_rl

RUN = ROOT / "runs/habit"
VAL_EVERY, VAL_ROWS = 10, 200


def count_looks(text_rewards, looks):
    """train_rl.text_rewards, which sees every completion once, and which now also notes in `looks`
    whether it looks. A group of one is a greedy completion of the validation."""
    def counting(texts, *rest):
        mode = "greedy" if len(texts[0]) == 1 else "sampled"
        looks[mode] += [text.startswith(LOOKS) for group in texts for text in group]
        return text_rewards(texts, *rest)
    return counting


def shares(looks, size):
    """A list of booleans -> the share of True in each `size` of them."""
    return np.reshape(looks, (-1, size)).mean(1).round(4).tolist()


def draw(rows, path):
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    steps = [row["step"] for row in rows]
    greedy = [(row["step"], row["greedy"]) for row in rows if row["greedy"] is not None]
    axes[0].plot(steps, [row["sampled"] for row in rows], color="#9db4cf", label="sampled")
    axes[0].plot(*zip(*greedy), color="#1f4e8c", marker="o", label="greedy")
    axes[0].set_title("share of completions that look")
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend()
    axes[1].plot(steps, [row["completion_length"] for row in rows], color="#1f4e8c")
    axes[1].set_title("tokens of a sampled completion")
    for name, color in (("format", "#7a7a7a"), ("box", "#1b7f4b"), ("mask", "#b3261e")):
        axes[2].plot(steps, [row[f"reward_{name}"] for row in rows], color=color, label=name)
    axes[2].set_title("rewards of sampled completions")
    axes[2].legend(loc="lower right")
    for axis in axes:
        axis.set_xlabel("step of stage 2")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", action="store_true", help="only the figure, from habit.json")
    if not parser.parse_args().figure:
        write_world()
        looks = {"sampled": [], "greedy": []}
        train_rl.text_rewards = count_looks(train_rl.text_rewards, looks)
        sys.argv = ["train_rl.py", "--preset", "tiny", "--output", str(RUN), "--val-every",
                    str(VAL_EVERY)]
        train_rl.run(train_rl.main)
        metrics = read_lines(RUN / "metrics.jsonl")
        sampled = shares(looks["sampled"], len(looks["sampled"]) // len(metrics))
        greedy = dict(zip(range(VAL_EVERY, len(metrics) + 1, VAL_EVERY),
                          shares(looks["greedy"], VAL_ROWS), strict=True))
        names = ("completion_length", "reward_format", "reward_box", "reward_mask")
        rows = [{"step": line["step"], "sampled": share, "greedy": greedy.get(line["step"]),
                 **{name: round(line[name], 4) for name in names}}
                for line, share in zip(metrics, sampled, strict=True)]
        write_json("habit", {"rows": rows})
    draw(read_json("habit")["rows"], ROOT / "docs/habit.png")


if __name__ == "__main__":
    main()
