"""Does stage 2 do what it claims? Five variants on the laptop's world, with three seeds.

    python tests/evidence/proof.py            # an hour on two cores; goes on where it stopped
    python tests/evidence/proof.py --seeds 1  # one seed
    python tests/evidence/proof.py --variants align rl box_only      # the main comparison alone
    python tests/evidence/proof.py --page     # docs/evidence/proof.md again, from proof.json
    ATEN_CPU_CAPABILITY=default python tests/evidence/proof.py --variants align rl box_only
                                              # as a second machine would round: proof_default.json

Each variant is trained from the committed stand-ins and measured on 1,000 held-out expressions,
with greedy completions:

    stage 1                   align.py
    stage 1 continued         a control: stage 1 for as many more images as stage 2 sees
    stage 2 without rewards   a control: all lambdas are 0, so that only the segmentation loss and
                              the KL term are left
    stage 2                   train_rl.py, from stage 1
    trained without queries   a control in the way of Seg-Zero: the MLLM alone, trained by the
                              rewards for format and box; its box prompts the untouched SAM 2

Every evaluation also puts the predicted box into the untouched SAM 2. Stage 1 does not change the
completions, so the boxes of "stage 1" are also those of the stand-ins before any training.

A gain comes from the rewards only if "stage 2" is better than the first three. It comes from the
queries only if "stage 2" is better than "trained without queries".

Writes docs/evidence/proof.json (every mean, and the gains with intervals) and proof.md, or
proof_default.json and proof_default.md.
"""
import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tiny_runs import (EVIDENCE, LOOKS, PROOF, ROOT, evaluate, markdown_table, read_json,
                       read_lines, train, write_json, write_world)

RUNS = ROOT / "runs" / PROOF
NO_REWARD = ("--lambda-format", 0, "--lambda-box", 0, "--lambda-mask", 0)
NO_QUERIES = ("--init", "none", "--lambda-mask", 0, "--alpha", 0)
VARIANTS = {"align": "stage 1", "longer": "stage 1 continued",
            "no_reward": "stage 2 without rewards", "rl": "stage 2", "box_only": "trained without queries"}
COLUMNS = {"looks": "looks", "format": "format", "box_iou": "box IoU", "acc50": "Acc@0.5",
           "giou": "mask IoU", "box_giou": "its box into SAM"}
SHARED = ("crosses", "nests", "hides")        # layouts in which things share a place
LAYOUTS = ("apart", *SHARED, "several")
# (variant, column) that is compared with (variant, column), and on which rows
GAINS = [(("rl", column), (control, column), "all")
         for control in ("align", "longer", "no_reward")
         for column in ("box_iou", "acc50", "giou")]
GAINS += [(("rl", "giou"), ("no_reward", "giou"), "chain"),
          (("align", "giou"), ("align", "box_giou"), "all")]
GAINS += [(("rl", "giou"), other, rows) for other in (("rl", "box_giou"), ("box_only", "giou"))
          for rows in ("all", *LAYOUTS)]
ROWS = {"all": "", "chain": ", chains of two", "several": ", several things"}
ROWS |= {layout: f", {layout}" for layout in ("apart", *SHARED)}


# --- Numbers --------------------------------------------------------------------------------------

def mask_ious(areas):
    """Dicts of intersection and union in pixels -> IoU of each; 1 if both masks are empty."""
    intersection, union = np.array([(a["intersection"], a["union"]) for a in areas], float).T
    return np.where(union > 0, intersection / (union + 1e-5), 1.0)


def outcomes(variant, seed):
    """The rows of one evaluation -> an array for each of COLUMNS, and each row's object and
    groups (kind of expression, layout of the object)."""
    rows = read_lines(RUNS / f"{variant}-{seed}.jsonl")
    box_iou = np.array([row["box_iou"] for row in rows])
    by_box = mask_ious([row["box_prompt"] for row in rows])
    return {"looks": np.array([float(row["completion"].startswith(LOOKS)) for row in rows]),
            "format": np.array([float(row["format"]) for row in rows]),
            "box_iou": box_iou, "acc50": (box_iou > 0.5).astype(float),
            "giou": by_box if variant == "box_only" else mask_ious(rows), "box_giou": by_box,
            "object": np.array([row["id"].rpartition("/")[0] for row in rows]),
            "groups": [set(row["groups"]) for row in rows]}


def members(groups, group):
    """Which rows belong to a kind, a layout or "all" -> (rows,) bool"""
    return np.array([group == "all" or group in names for names in groups])


def bootstrap(gains, objects, draws=10_000):
    """The mean gain and its 95 % interval. Objects are drawn with replacement, not rows, because
    the expressions of one object are not independent."""
    names, owner = np.unique(objects, return_inverse=True)
    sums = np.zeros((len(names), 2))
    np.add.at(sums, owner, np.stack([gains, np.ones(len(gains))], 1))
    chances = np.full(len(names), 1 / len(names))
    times = np.random.default_rng(0).multinomial(len(names), chances, draws)
    total, rows = (times @ sums).T
    low, high = np.percentile(total / rows, [2.5, 97.5])
    return [round(float(value), 4) for value in (gains.mean(), low, high)]


def gain_title(better, worse, group):
    (variant, column), (control, _) = better, worse
    other = "its box into SAM" if variant == control else VARIANTS[control]
    return f"{VARIANTS[variant]} - {other}, {COLUMNS[column]}{ROWS[group]}"


def summarize(variants, seeds, limit):
    """-> what proof.json holds"""
    tables = {(variant, seed): outcomes(variant, seed) for variant in variants for seed in seeds}
    means, groups, gains = {}, {}, {}
    for (variant, seed), table in tables.items():
        means[f"{variant}-{seed}"] = {
            column: round(float(table[column].mean()), 4) for column in COLUMNS}
    row_groups = tables["rl", seeds[0]]["groups"]
    for group in sorted(set().union(*row_groups)):
        rows = members(row_groups, group)
        groups[group] = {"n": int(rows.sum())}
        for variant in variants:
            groups[group][variant] = {column: round(float(np.mean(
                [tables[variant, seed][column][rows] for seed in seeds])), 4)
                for column in ("acc50", "giou", "box_giou")}
    for (variant, column), (control, control_column), group in GAINS:
        if variant not in variants or control not in variants:
            continue
        title = gain_title((variant, column), (control, control_column), group)
        for seed in seeds:
            table = tables[variant, seed]
            rows = members(table["groups"], group)
            if not rows.any():
                continue
            gain = table[column] - tables[control, seed][control_column]
            gains.setdefault(title, {})[str(seed)] = bootstrap(gain[rows], table["object"][rows])
    return {"rows": limit, "seeds": seeds, "means": means, "groups": groups, "gains": gains}


# --- Tables ---------------------------------------------------------------------------------------

def measured(result):
    """The variants that proof.json has."""
    return [variant for variant in VARIANTS if f"{variant}-{result['seeds'][0]}" in result["means"]]


def mean_cell(result, variant, column):
    """The mean over seeds and, in brackets, their range if they differ."""
    values = [result["means"][f"{variant}-{seed}"][column] for seed in result["seeds"]]
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return f"{np.mean(values):.3f}" + (f" ({low}-{high})" if low != high else "")


SHORT_ROWS = {"before training: the box into SAM": ("align", "box_giou"),
              "stage 1": ("align", "giou"), "stage 1 continued": ("longer", "giou"),
              "stage 2 without rewards": ("no_reward", "giou"), "stage 2": ("rl", "giou"),
              "stage 2, but its box into SAM": ("rl", "box_giou"),
              "trained without queries: its box into SAM": ("box_only", "giou")}
README_ROWS = ("before training: the box into SAM", "stage 1", "stage 2 without rewards", "stage 2",
               "trained without queries: its box into SAM")


def short_table(result, names=SHORT_ROWS):
    """What a reader wants first."""
    rows = [[name, *(mean_cell(result, SHORT_ROWS[name][0], column)
                     for column in ("looks", "box_iou", "acc50", SHORT_ROWS[name][1]))]
            for name in names if SHORT_ROWS[name][0] in measured(result)]
    return markdown_table(["", "looks", "box IoU", "Acc@0.5", "mask IoU"], rows)


def group_table(result, column, variants):
    rows = [[group, numbers["n"], *(f"{numbers[variant][column]:.3f}" for variant in variants)]
            for group, numbers in result["groups"].items()]
    return markdown_table(["", "rows", *(VARIANTS[variant] for variant in variants)], rows)


def page(result):
    """-> docs/evidence/proof.md"""
    seeds, variants = result["seeds"], measured(result)
    means = [[VARIANTS[variant], *(mean_cell(result, variant, column) for column in COLUMNS)]
             for variant in variants]
    gains = [[title, *("{:+.3f} ({:+.3f}, {:+.3f})".format(*gain[str(seed)]) for seed in seeds)]
             for title, gain in result["gains"].items()]
    with_queries = [variant for variant in variants if variant != "box_only"]
    return f"""# What stage 2 improves: all numbers

Made by `python tests/evidence/proof.py`, from the json of the same name. What the variants and
columns are, and what follows from them: [results](../results.md#proof-what-does-stage-2-improve).
{result["rows"]:,} held-out expressions, greedy completions; the mean over seeds
{", ".join(map(str, seeds))} and, in brackets, their range.

{markdown_table(["", *COLUMNS.values()], means)}
The mask of "trained without queries" is that of its box.

## By kind of expression, and by layout of the object

The mean over seeds. Acc@0.5 of the boxes:

{group_table(result, "acc50", variants)}
Mask IoU:

{group_table(result, "giou", variants)}
Mask IoU of the predicted box in SAM:

{group_table(result, "box_giou", with_queries)}
## Gains, row by row

In brackets a 95 % interval from a bootstrap over objects.

{markdown_table(["", *(f"seed {seed}" for seed in seeds)], gains)}"""


# --- Runs -----------------------------------------------------------------------------------------

def wait_for(jobs):
    for job in jobs:
        job.result()


def train_all(variants, seeds, pool):
    def start(variant, script, *flags, from_stage_1=True):
        jobs = []
        for seed in seeds if variant in variants else ():
            init = ("--init", RUNS / f"align-{seed}") if from_stage_1 else ()
            jobs.append(pool.submit(train, script, RUNS / f"{variant}-{seed}", "--seed", seed,
                                    *init, *flags))
        return jobs
    wait_for(start("align", "align.py", from_stage_1=False))
    wait_for(start("rl", "train_rl.py")
             + start("box_only", "train_rl.py", *NO_QUERIES, from_stage_1=False)
             + start("no_reward", "train_rl.py", *NO_REWARD))
    rl, align = (json.loads((RUNS / f"{variant}-{seeds[0]}/settings.json").read_text())
                 for variant in ("rl", "align"))
    steps = rl["steps"] * rl["batch"] // align["batch"]          # as many images as stage 2 saw
    wait_for(start("longer", "align.py", "--steps", steps))


def evaluate_all(variants, seeds, limit, pool):
    wait_for([pool.submit(evaluate, RUNS / f"{variant}-{seed}.jsonl", "greedy", "--limit", limit,
                          "--checkpoint", RUNS / f"{variant}-{seed}")
              for variant in variants for seed in seeds])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--limit", type=int, default=1000, help="rows of val")
    parser.add_argument("--page", action="store_true", help="only write proof.md from proof.json")
    args = parser.parse_args()
    if not args.page:
        write_world()
        with ThreadPoolExecutor(2) as pool:
            train_all(args.variants, args.seeds, pool)
            evaluate_all(args.variants, args.seeds, args.limit, pool)
        write_json(PROOF, summarize(args.variants, args.seeds, args.limit))
    (EVIDENCE / f"{PROOF}.md").write_text(page(read_json(PROOF)))


if __name__ == "__main__":
    main()
