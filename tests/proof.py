"""The proof on the laptop: does stage 2 do what it claims? Three seeds, three controls. By hand:

    python tests/proof.py                # an hour on two cores; goes on where it stopped
    python tests/proof.py --seeds 1      # one seed
    python tests/proof.py --seeds 42 --variants align rl      # without the controls

On the one committed stand-in, for each seed, measured on 1,000 held-out expressions, greedily and
sampled:
    (b) stage 1   align.py
    (c) stage 2   train_rl.py from (b)
    (d) control   stage 1 continued for as many picture passes as stage 2 had
    (e) control   stage 2 with all lambdas 0: the segmentation loss (and the KL) alone
    (f) control   the language model alone, without queries, trained by format and box; its box goes
                  into the untouched SAM 2 (the way of Seg-Zero)
Each evaluation also puts the box that the answer names into the untouched SAM 2. Stage 1 does not
change the answers, so that (b)'s boxes are those of the stand-ins as they come: (a).

Writes docs/proof.json (every mean, and paired bootstraps over objects), docs/proof.md (the tables)
and docs/proof_summary.md (the short one). A gain is RL's only where (c) beats (b), (d) and (e); it
is the queries' only where (c) beats (f).
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs/proof"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}         # two runs side by side on two cores
NO_REWARD = ("--lambda-format", "0", "--lambda-box", "0", "--lambda-mask", "0")
NO_QUERIES = ("--init", "none", "--lambda-mask", "0", "--alpha", "0")
NAMES = {"align": "(b) after stage 1", "longer": "(d) stage 1 continued",
         "no_reward": "(e) stage 2, all lambdas 0", "rl": "(c) after stage 2",
         "box_only": "(f) no queries, box into SAM"}
MODES = ("greedy", "sampled")
LOOKS = "<think>\nThe"                 # the first words of an answer that looks (docs/world.md)
SHARED = ("crosses", "nests", "hides")                       # layouts in which things share a place
# What is compared: (title, variant and column, less variant and column, of which rows)
GAINS = [(f"(c) - {NAMES[other][:3]}, {title}", ("rl", column), (other, column), "all")
         for other in ("align", "longer", "no_reward")
         for title, column in (("box IoU", "box_iou"), ("Acc@0.5", "acc50"),
                               ("mask IoU", "giou"))]
GAINS += [("(c) - (e), mask IoU, chains of two", ("rl", "giou"), ("no_reward", "giou"), "chain"),
          ("(b) - its box into SAM, mask IoU", ("align", "giou"), ("align", "box_giou"), "all"),
          ("(c) - its box into SAM, mask IoU", ("rl", "giou"), ("rl", "box_giou"), "all"),
          ("(c) - its box into SAM, mask IoU, things that share a place", ("rl", "giou"),
           ("rl", "box_giou"), "shared"),
          ("(c) - (f), mask IoU", ("rl", "giou"), ("box_only", "giou"), "all"),
          ("(c) - (f), mask IoU, things that share a place", ("rl", "giou"), ("box_only", "giou"),
           "shared")]
COLUMNS = {"looks": "looks", "format": "format", "box_iou": "box IoU", "acc50": "Acc@0.5",
           "giou": "mask IoU", "box_giou": "its box into SAM"}
PARTS = {"acc50": "Acc@0.5", "giou": "mask", "box_giou": "box into SAM"}


def write_world():
    """--preset tiny's pictures, where they are missing."""
    if not (ROOT / "runs/shapes").exists():
        subprocess.run([sys.executable, "tests/tiny/world.py", "runs/shapes"], cwd=ROOT, check=True)


def going_on(folder):
    """-> the flags with which a run goes on where it was interrupted; none where it saved no
    checkpoint yet."""
    return ["--resume"] if list((folder / "checkpoints").glob("step_*")) else []


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
        sample = ["--sample"] if mode == "sampled" else []
        call("evaluate.py", "--limit", limit, "--predictions", out, "--checkpoint",
             RUNS / f"{name}-{seed}", *sample)


def steps_of(name, seed):
    """Steps and pictures a step of a finished run."""
    settings = json.loads((RUNS / f"{name}-{seed}/settings.json").read_text())
    return settings["steps"], settings["batch"]


def share(counts):
    """(rows, 2) of intersection and union -> IoU of each; 1 where both masks are empty."""
    I, U = np.array(counts, float).T
    return np.where(U > 0, I / (U + 1e-5), 1.0)


def outcomes(name, seed, mode):
    """Per row of an evaluation: what COLUMNS names, and the row's object, kind and layout."""
    lines = (RUNS / f"{name}-{seed}.{mode}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    box = np.array([row["box_iou"] for row in rows])
    way = "box_prompt" if name == "box_only" else "context"      # what draws this variant's mask
    return {"looks": np.array([float(row["answer"].startswith(LOOKS)) for row in rows]),
            "format": np.array([float(row["format"]) for row in rows]),
            "box_iou": box, "acc50": (box > 0.5).astype(float),
            "giou": share([row["counts"][way] for row in rows]),
            "box_giou": share([row["counts"]["box_prompt"] for row in rows]),
            "object": [row["key"].rpartition("/")[0] for row in rows],
            "groups": [(row["kind"], row["layout"]) for row in rows]}


def rows_of(found, group):
    """Which rows belong to a kind, a layout, "shared" or "all" -> (rows,) bool."""
    wanted = SHARED if group == "shared" else (group,)
    return np.array([group == "all" or any(name in groups for name in wanted)
                     for groups in found["groups"]])


def bootstrap(gain, objects, draws=10_000):
    """Mean gain with its 95 % interval. Objects are drawn anew, not rows: the expressions of one
    object are not independent."""
    names, owner = np.unique(objects, return_inverse=True)
    sums = np.zeros((len(names), 2))
    np.add.at(sums, owner, np.stack([gain, np.ones(len(gain))], 1))
    chances = np.full(len(names), 1 / len(names))
    times = np.random.default_rng(0).multinomial(len(names), chances, draws)
    total, rows = (times @ sums).T
    low, high = np.percentile(total / rows, [2.5, 97.5])
    return [round(float(value), 4) for value in (gain.mean(), low, high)]


def summarize(seeds, variants, limit):
    found = {(name, seed, mode): outcomes(name, seed, mode)
             for name in variants for seed in seeds for mode in MODES}
    result = {"rows": limit, "seeds": seeds, "variants": variants, "means": {}, "parts": {},
              "gains": {}}
    for (name, seed, mode), rows in found.items():
        means = {column: round(float(rows[column].mean()), 4) for column in COLUMNS}
        result["means"][f"{name}-{seed} {mode}"] = means
    some = found["rl", seeds[0], "greedy"]
    for group in sorted({group for groups in some["groups"] for group in groups}):
        kept = rows_of(some, group)
        part = {"n": int(kept.sum())}
        for name in variants:
            part[name] = {column: round(float(np.mean([found[name, seed, "greedy"][column][kept]
                                                       for seed in seeds])), 4)
                          for column in PARTS}
        result["parts"][group] = part
    for title, (name, column), (other, less), group in GAINS:
        if not {name, other} <= set(variants):
            continue
        result["gains"][title] = {}
        for seed in seeds:
            rows, against = found[name, seed, "greedy"], found[other, seed, "greedy"]
            kept = rows_of(rows, group)
            gain = (rows[column] - against[less])[kept]
            objects = np.array(rows["object"])[kept]
            result["gains"][title][str(seed)] = bootstrap(gain, objects)
    return result


def cell(values):
    """The mean over seeds and, in brackets, their range, where they differ."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return f"{np.mean(values):.3f}" + (f" ({low}-{high})" if low != high else "")


def table(result):
    """Markdown: means per variant, then per kind and layout, then the gains per seed."""
    seeds, names = result["seeds"], result["variants"]
    lines = ["| | answers | " + " | ".join(COLUMNS.values()) + " |",
             "|" + "---|" * (len(COLUMNS) + 2)]
    for name in names:
        for mode in MODES:
            rows = [result["means"][f"{name}-{seed} {mode}"] for seed in seeds]
            cells = [cell([row[column] for row in rows]) for column in COLUMNS]
            lines.append(f"| {NAMES[name]} | {mode} | " + " | ".join(cells) + " |")
    shown = [(name, column) for column in PARTS for name in names
             if (name, column) != ("box_only", "box_giou")]      # its masks already
    columns = [f"{NAMES[name][:3]} {PARTS[column]}" for name, column in shown]
    lines += ["", "Greedy, by kind of expression and by layout of the object, mean over seeds:", "",
              "| | rows | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for group, part in result["parts"].items():
        cells = [f"{part[name][column]:.3f}" for name, column in shown]
        lines.append(f"| {group} | {part['n']} | " + " | ".join(cells) + " |")
    lines += ["", "Gains, greedy, row by row, with 95 % intervals over objects drawn anew:", "",
              "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
              "|" + "---|" * (len(seeds) + 1)]
    for title, gains in result["gains"].items():
        cells = ["{:+.3f} ({:+.3f}, {:+.3f})".format(*gains[str(seed)]) for seed in seeds]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(result):
    """The short table: what the reader wants first."""
    def mean(name, column):
        rows = [result["means"][f"{name}-{seed} greedy"] for seed in result["seeds"]]
        return cell([row[column] for row in rows])
    columns = ["looks", "box_iou", "acc50"]
    lines = ["| greedy answers | looks | box IoU | Acc@0.5 | mask IoU |", "|---|---|---|---|---|"]
    for title, name, mask in (("(a) stand-ins, the box into SAM", "align", "box_giou"),
                              *((NAMES[name], name, "giou") for name in result["variants"]),
                              ("(c)'s box into SAM", "rl", "box_giou")):
        cells = [mean(name, column) for column in (*columns, mask)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--limit", type=int, default=1000, help="rows of val")
    args = parser.parse_args()
    write_world()
    pool = ThreadPoolExecutor(2)

    def wait(jobs):
        for job in [pool.submit(*job) for job in jobs if job[2] in args.variants]:
            job.result()

    def start(seed):
        return "--init", RUNS / f"align-{seed}"
    wait([(train, "align.py", "align", seed) for seed in args.seeds])
    wait([job for seed in args.seeds for job in
          ((train, "train_rl.py", "rl", seed, *start(seed)),
           (train, "train_rl.py", "no_reward", seed, *start(seed), *NO_REWARD),
           (train, "train_rl.py", "box_only", seed, *NO_QUERIES))])
    # as many passes over pictures as stage 2 had
    steps, batch = steps_of("rl", args.seeds[0])
    _, align_batch = steps_of("align", args.seeds[0])
    wait([(train, "align.py", "longer", seed, *start(seed), "--steps", steps * batch // align_batch)
          for seed in args.seeds])
    evaluations = [(evaluate, name, seed, mode, args.limit)
                   for seed in args.seeds for name in args.variants for mode in MODES]
    for job in [pool.submit(*evaluation) for evaluation in evaluations]:
        job.result()
    result = summarize(args.seeds, args.variants, args.limit)
    (ROOT / "docs/proof.json").write_text(json.dumps(result, indent=1))
    (ROOT / "docs/proof.md").write_text(table(result))
    (ROOT / "docs/proof_summary.md").write_text(summary(result))
    print(table(result))


if __name__ == "__main__":
    main()
