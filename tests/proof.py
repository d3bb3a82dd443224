"""The proof on the laptop: does stage 2 do what it claims? Three seeds, two controls. By hand:

    python tests/proof.py                # about 40 minutes on two cores; goes on where it stopped
    python tests/proof.py --seeds 1      # one seed

On the one committed stand-in, for each seed, measured on 1,000 held-out expressions:
    (a) base      the stand-ins as they come, SAM prompted by the predicted box (the Seg-Zero way)
    (b) stage 1   align.py
    (c) stage 2   train_rl.py from (b)
    (d) control   stage 1 continued for as many picture passes as stage 2 had
    (e) control   stage 2 with all lambdas 0: the segmentation loss (and the KL) alone
and, for the first seed: stages 1 and 2 with the true box as stage 1's context, to choose the
default of --context; and (c) and (e) as first tried, with the paper's alpha = 1 and lower rates of
context module and SAM.

Each is evaluated greedily and sampled on the same 1,000 rows of val. Writes docs/proof.json (every
mean, and paired bootstraps over expressions of (c) minus the others), docs/proof.md (the tables)
and docs/proof_summary.md (the short one).
A gain is RL's only where (c) beats (b), (d) and (e).
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs/proof"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}         # two runs side by side on two cores
NO_REWARD = ("--lambda-format", "0", "--lambda-box", "0", "--lambda-mask", "0")
FIRST_TRY = ("--alpha", "1", "--lr-context", "3e-4", "--lr-sam", "1e-4")
NAMES = {"base": "(a) stand-ins, SAM prompted by the predicted box",
         "align": "(b) after stage 1",
         "rl": "(c) after stage 2",
         "longer": "(d) stage 1 continued",
         "no_reward": "(e) stage 2, all lambdas 0",
         "align_true": "(b) with --context true",
         "rl_true": "(c) from (b) with --context true",
         "rl_alpha1": "(c) as first tried, --alpha 1",
         "no_reward_alpha1": "(e) as first tried, --alpha 1"}


def write_world():
    """--preset tiny's pictures, where they are missing."""
    if not (ROOT / "runs/shapes").exists():
        subprocess.run([sys.executable, "tests/tiny/world.py", "runs/shapes"], cwd=ROOT, check=True)


def going_on(folder):
    """-> the flags with which a run goes on where it was interrupted; what saved no checkpoint yet
    is begun anew."""
    if list((folder / "checkpoints").glob("step_*")):
        return ["--resume"]
    shutil.rmtree(folder, ignore_errors=True)
    return []


def call(script, *flags):
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, "--preset", "tiny", *map(str, flags)]
    with open(RUNS / "log.txt", "a") as log:
        print(">", script, *flags, file=log, flush=True)
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=log, stderr=log)


def train(script, name, seed, *flags):
    """One run, skipped where it is finished, resumed where it was interrupted."""
    folder = RUNS / f"{name}-{seed}"
    if not (folder / "lens.json").exists():
        call(script, "--seed", seed, "--output", folder, *flags, *going_on(folder))


def evaluate(name, seed, mode, limit):
    out = RUNS / f"{name}-{seed}.{mode}.jsonl"
    if not out.exists():
        checkpoint = RUNS / f"{name}-{seed}"
        source = ["--prompt-with", "box"] if name == "base" else ["--checkpoint", checkpoint]
        sample = ["--sample"] if mode == "sampled" else []
        call("evaluate.py", "--limit", limit, "--predictions", out, *source, *sample)


def outcomes(name, seed, mode):
    """Per row: unified reward at lambdas 1, format, box IoU, mask IoU, is it mostly another place;
    counts for cIoU."""
    lines = (RUNS / f"{name}-{seed}.{mode}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    I, U = (np.array([row[k] for row in rows], float) for k in ("intersection", "union"))
    box, form = (np.array([row[k] for row in rows], float) for k in ("box_iou", "format"))
    mask = np.where(U > 0, I / (U + 1e-5), 1)
    return {"reward": form + box + mask, "format": form, "box_iou": box, "giou": mask,
            "missed": mask < 0.2, "I": I, "U": U}


def bootstrap(gain, draws=10_000):
    """Mean gain with its 95 % interval over expressions drawn anew."""
    picks = np.random.default_rng(0).integers(len(gain), size=(draws, len(gain)))
    low, high = np.percentile(gain[picks].mean(1), [2.5, 97.5])
    return [round(float(v), 4) for v in (gain.mean(), low, high)]


GAINS = [("sampled", "reward"), ("greedy", "box_iou"), ("greedy", "giou")]


def summarize(variants, limit):
    result = {"command": "python tests/proof.py", "rows": limit, "means": {}, "gains": {}}
    found = {(n, s, m): outcomes(n, s, m) for n, s in variants for m in ("greedy", "sampled")}
    for (name, seed, mode), o in found.items():
        means = {key: round(float(o[key].mean()), 4)
                 for key in ("reward", "format", "box_iou", "giou", "missed")}
        ciou = round(float(o["I"].sum() / o["U"].sum()), 4)
        result["means"][f"{name}-{seed} {mode}"] = {**means, "ciou": ciou}
    for seed in sorted({s for n, s in variants if n == "rl"}):
        for other in ("align", "longer", "no_reward"):
            for mode, key in GAINS:
                gain = found["rl", seed, mode][key] - found[other, seed, mode][key]
                result["gains"][f"seed {seed}: rl - {other}, {mode} {key}"] = bootstrap(gain)
    return result


def means_of(result, name, mode):
    """The means of a variant, one per seed. Their keys are "NAME-SEED MODE"."""
    return [means for key, means in result["means"].items()
            if key.rsplit("-", 1)[0] == name and key.split(" ")[1] == mode]


def table(result):
    """Markdown: means over seeds (with the range) per variant, then the gains per seed."""
    lines = ["| | mode | reward | format | box IoU | gIoU | cIoU | mask IoU < 0.2 |",
             "|---|---|---|---|---|---|---|---|"]
    for name, title in NAMES.items():
        for mode in ("greedy", "sampled"):
            rows = means_of(result, name, mode)
            if rows:
                cells = []
                for key in ("reward", "format", "box_iou", "giou", "ciou", "missed"):
                    values = [row[key] for row in rows]
                    spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
                    cells.append(f"{np.mean(values):.3f}{spread}")
                lines.append(f"| {title} | {mode} | " + " | ".join(cells) + " |")
    lines += ["", "| paired gain of (c), 95 % interval | sampled reward | greedy box IoU | "
                  "greedy mask IoU |", "|---|---|---|---|"]
    for start in sorted({key.split(",")[0] for key in result["gains"]}):
        gains = [result["gains"][f"{start}, {mode} {key}"] for mode, key in GAINS]
        cells = [f"{gain:+.3f} ({low:+.3f}, {high:+.3f})" for gain, low, high in gains]
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(result):
    """The short table: what the reader wants first."""
    lines = ["| | reward, sampled | format, sampled | box IoU, greedy | mask IoU, greedy |",
             "|---|---|---|---|---|"]
    columns = [("sampled", "reward"), ("sampled", "format"), ("greedy", "box_iou"),
               ("greedy", "giou")]
    for name in ("base", "align", "longer", "no_reward", "rl"):
        cells = []
        for mode, key in columns:
            values = [means[key] for means in means_of(result, name, mode)]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append(f"| {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--limit", type=int, default=1000, help="rows of val")
    args = parser.parse_args()
    write_world()
    first, pool = args.seeds[0], ThreadPoolExecutor(2)

    def wait(jobs):
        for job in [pool.submit(*job) for job in jobs]:
            job.result()

    def start(name, seed):
        return "--init", RUNS / f"{name}-{seed}"
    wait([(evaluate, "base", 0, mode, args.limit) for mode in ("greedy", "sampled")])
    wait([*((train, "align.py", "align", s) for s in args.seeds),
          (train, "align.py", "align_true", first, "--context", "true")])
    # stage 2: 250 steps of 16 pictures; stage 1 passes 32 pictures a step
    jobs = []
    for s in args.seeds:
        jobs += [(train, "train_rl.py", "rl", s, *start("align", s)),
                 (train, "train_rl.py", "no_reward", s, *start("align", s), *NO_REWARD),
                 (train, "align.py", "longer", s, *start("align", s), "--steps", 250 * 16 // 32)]
    wait([*jobs,
          (train, "train_rl.py", "rl_true", first, *start("align_true", first)),
          (train, "train_rl.py", "rl_alpha1", first, *start("align", first), *FIRST_TRY),
          (train, "train_rl.py", "no_reward_alpha1", first, *start("align", first), *FIRST_TRY,
           *NO_REWARD)])
    variants = [(n, s) for s in args.seeds for n in ("align", "rl", "longer", "no_reward")]
    once = ("align_true", "rl_true", "rl_alpha1", "no_reward_alpha1")
    variants += [("base", 0), *((name, first) for name in once)]
    wait([(evaluate, n, s, mode, args.limit) for n, s in variants
          for mode in ("greedy", "sampled")])
    result = summarize(variants, args.limit)
    (ROOT / "docs/proof.json").write_text(json.dumps(result, indent=1))
    (ROOT / "docs/proof.md").write_text(table(result))
    (ROOT / "docs/proof_summary.md").write_text(summary(result))
    print(table(result))


if __name__ == "__main__":
    main()
