"""Tables 3, 4 and 5 of the paper on the laptop's world, then rewards, group size, GRPO's variants.

    python tests/evidence/ablations.py table3 table4        # queries, connector: stage 1 alone
    python tests/evidence/ablations.py table5               # components: both stages
    python tests/evidence/ablations.py rewards group        # one seed
    python tests/evidence/ablations.py variants             # of GRPO: Dr. GRPO, GDPO, ...
    python tests/evidence/ablations.py                      # no training, only the page

All tables take many hours of one core. A row is the tiny preset with the flags that stand
beside it below. Its stage 2 starts from the stage 1 of its own seed, which several rows share. Runs
without flags are those of proof.py. A run that fails is named (runs/ablations/log.txt says why) and
tried again by the next command.

Writes docs/evidence/ablations.jsonl and ablations.md. A line of the jsonl is one row with one seed:
its flags, its steps, the metrics of 1,000 rows of val with greedy and with sampled completions (of
the variants: 300 rows, greedy), and each training metric's mean over the last 25 steps. Only rows
without a line are run.

Before you read the tables:
- Evaluation reads the model's own completion. That of the paper's Tables 3 and 4 probably did not:
  the released code puts the true box in. So these two tables have a column for masks behind true
  completions (stage 1's: an answer with the true box), on the same rows.
- "LISA-like" is as near to LISA as the flags get. One query and an MLP, untrained at the start,
  read image and expression but no reasoning, because the completion is cut after its first token.
  All lambdas and beta are 0, so the segmentation loss alone trains the MLLM, the query, the MLP and
  SAM's decoder. It lacks LISA's text loss and its LoRA, and it names no box. A group is two copies
  of one prompt.
- "No alignment": queries and connector start untrained, so they learn at stage 1's rate. One row
  shows what stage 2's own rate, made for an aligned module, does to them.
- The variants come in groups. The first row of a group is GRPO as the paper has it, in a setting in
  which theory says that the variant must differ; PREDICTIONS says how, and was written before the
  runs. The habit turns (docs/world.md) at the first step from which ten steps sample completions of
  TURNED tokens or more in the mean: a look has 37, a glance 22.
"""
import argparse
import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import torch
from proof import SHARED
from tiny_runs import (EVIDENCE, PROOF, ROOT, evaluate, markdown_table, open_run, read_lines,
                       train, write_world)

from align import forced_completions
from data import EvaluationRows, read_records
from model import prefill, prompt_positions
from rewards import full_size_masks, mask_iou

RUNS, LINES = ROOT / "runs/ablations", EVIDENCE / "ablations.jsonl"
SEEDS = (1, 2, 3)
NO_REWARD = "--lambda-format 0 --lambda-box 0 --lambda-mask 0"
LISA = f"--num-queries 1 --connector mlp {NO_REWARD} --beta 0 --group-size 2 --lr-context 1e-3"
UNALIGNED = "--lr-context 1e-3"              # stage 1's rate; stage 2's own is a tenth of it
BOX = "--sam-prompt box"


@dataclass
class Row:
    name: str
    align: str | None = ""                   # flags of stage 1; None: no stage 1
    rl: str | None = None                    # flags of stage 2; None: no stage 2
    evaluate: str = ""
    seeds: tuple = (1,)
    paper: str = ""                          # its cIoU on RefCOCO testA


PAPER_QUERIES = {1: "85.9", 16: "87.4", 64: "87.9"}
QUERIES = [Row(f"M = {M}", f"--num-queries {M}", seeds=SEEDS, paper=PAPER_QUERIES.get(M, ""))
           for M in (1, 4, 16, 64)]
CONNECTOR = [Row("MLP", "--connector mlp", seeds=SEEDS, paper="72.8"),
             Row("ViT", seeds=SEEDS, paper="87.8")]
COMPONENTS = [
    Row("stand-ins as they come, predicted box into SAM", None, evaluate=BOX),
    Row("stage 1 alone", seeds=SEEDS),
    Row("LISA-like baseline", None, f"{LISA} --max-completion 1", seeds=SEEDS, paper="79.3"),
    Row("context, no alignment, R_box", None, f"--lambda-format 0 --lambda-mask 0 {UNALIGNED}",
        seeds=SEEDS, paper="-"),
    Row("context, no alignment, R_box + R_format", None, f"--lambda-mask 0 {UNALIGNED}",
        seeds=SEEDS, paper="72.3"),
    Row("the same, context at stage 2's own rate", None, "--lambda-mask 0"),
    Row("context, alignment, R_box + R_format", rl="--lambda-mask 0", seeds=SEEDS, paper="81.9"),
    Row("context, alignment, R_box + R_format + R_seg", rl="", seeds=SEEDS, paper="82.7"),
    Row("Seg-Zero-like: no context, R_box + R_format, box into SAM", None,
        "--lambda-mask 0 --alpha 0", BOX, seeds=SEEDS)]
REWARDS = [Row("default", rl=""),
           Row("no R_format", rl="--lambda-format 0"),
           Row("no R_box", rl="--lambda-box 0"),
           Row("no R_seg", rl="--lambda-mask 0"),
           Row("R_format alone", rl="--lambda-box 0 --lambda-mask 0"),
           Row("R_box alone", rl="--lambda-format 0 --lambda-mask 0"),
           Row("R_seg alone", rl="--lambda-format 0 --lambda-box 0"),
           Row("alpha = 0", rl="--alpha 0"),
           Row("alpha = 1", rl="--alpha 1")]
TURNED = 29
AGREE, SCALES = "--temperature 0.7", "--iou-power 6"
SHORT, OFTEN = "--max-completion 30", "--updates-per-batch 4"
VARIANTS = [
    Row("GRPO", rl="", seeds=SEEDS),
    Row("constant length (Dr. GRPO)", rl="--loss-length 40", seeds=SEEDS),
    Row("no KL", rl="--beta 0", seeds=SEEDS),
    Row("temperature 0.7", rl=AGREE, seeds=SEEDS),
    Row("- no deviation (Dr. GRPO)", rl=f"{AGREE} --deviation none", seeds=SEEDS),
    Row("IoU to the power of 6", rl=SCALES, seeds=SEEDS),
    Row("- GDPO", rl=f"{SCALES} --deviation each", seeds=SEEDS),
    Row("at most 30 tokens", rl=SHORT, seeds=SEEDS),
    Row("- cut completions left out", rl=f"{SHORT} --skip-cut", seeds=SEEDS),
    Row("four updates per batch", rl=OFTEN), Row("- no KL", rl=f"{OFTEN} --beta 0")]
PREDICTIONS = """
- **Constant length.** A token of a look (37 tokens) weighs as much as one of a glance (22), and not
  half as much. So the habit turns a little sooner.
- **No KL.** Nothing holds the policy. On this short run the rewards are the same or a little better
  and the entropy is lower, with four updates per batch more so.
- **No deviation.** At temperature 0.7 most groups hold glances alone, which differ by the jitter of
  their boxes. The deviation makes these groups as loud as those in which one completion looked.
  Without it the habit turns sooner.
- **GDPO.** IoU^6 is near 0 for all but the best boxes, so the format reward drowns it in the sum.
  With advantages of their own the box and the mask count as much as the format, and the habit turns
  sooner.
- **Cut completions left out.** Most looks are cut at 30 tokens and lose the format reward, so GRPO
  learns to be short. If they are left out, looks are not punished: completions stay longer and are
  cut more often, and the format reward is lower.
"""
GROUP = [Row(f"G = {G}", rl="" if G == 8 else f"--group-size {G}") for G in (2, 8, 16)]

MASKS = {"cIoU": ("greedy", "ciou"), "gIoU": ("greedy", "giou")}
STAGE_1 = {"gIoU behind true completions": ("forced", "giou"), **MASKS,
           "mask IoU in training, at the end": ("tail", "mask_iou")}
STAGE_2 = {**MASKS, "gIoU, shared": ("greedy", "giou_shared"), "box IoU": ("greedy", "box_iou"),
           "Acc@0.5": ("greedy", "acc50"), "format": ("greedy", "format"),
           "gIoU, sampled": ("sampled", "giou"), "box IoU, sampled": ("sampled", "box_iou"),
           "format, sampled": ("sampled", "format"),
           "tokens in training, at the end": ("tail", "completion_length")}
LABORATORY = {"the habit turns at step": ("tail", "turn"), "reward": ("tail", "reward"),
              "Acc@0.5": ("greedy", "acc50"), "gIoU": ("greedy", "giou"),
              "R_format": ("tail", "reward_format"), "cut": ("tail", "cut"),
              "tokens": ("tail", "completion_length"), "entropy": ("tail", "entropy"),
              "KL": ("tail", "kl"), "groups that agree": ("tail", "zero_variance")}
PLAIN = ("turn", "reward", "completion_length", "entropy", "kl")     # not in per cent
TABLES = {"table3": ("Table 3: number of queries, after stage 1", STAGE_1, QUERIES),
          "table4": ("Table 4: connector, after stage 1", STAGE_1, CONNECTOR),
          "table5": ("Table 5: components", STAGE_2, COMPONENTS),
          "rewards": ("Rewards and losses", STAGE_2, REWARDS),
          "group": ("Group size, at the same number of steps", STAGE_2, GROUP),
          "variants": ("Variants of GRPO", LABORATORY, VARIANTS)}


# --- Runs -----------------------------------------------------------------------------------------

def run_folder(*stages):
    """A run's folder, from its seed and its stages with their flags: seed_1+align--connector_mlp;
    without any flags, that of proof.py: align-1 or rl-1"""
    folder = RUNS / "+".join("_".join(stage.split()).replace("_--", "--") for stage in stages)
    plain = {"align": "align", "align+train_rl": "rl"}.get(folder.name.partition("+")[2])
    return ROOT / "runs" / PROOF / f"{plain}-{stages[0].split()[1]}" if plain else folder


def shared_giou(scores):
    """gIoU over the rows whose objects share a place with something."""
    parts = [scores[f"val: {layout}"] for layout in SHARED]
    return float(np.average([part["giou"] for part in parts], weights=[p["n"] for p in parts]))


def measure(folder, row, seed, mode, limit):
    """-> the metrics of a row, greedy or sampled; without a run those of the stand-ins"""
    name = f"{folder.name}{row.evaluate.replace(' ', '_')}.{limit}.{mode}.json"
    checkpoint = ["--checkpoint", folder] if (folder / "lens.json").exists() else []
    out = RUNS / name
    evaluate(out, mode, "--seed", seed, "--limit", limit, *checkpoint, *row.evaluate.split())
    scores = json.loads(out.read_text())
    return {**scores["val"], "giou_shared": shared_giou(scores)}


@torch.no_grad()
def forced_giou(folder, limit=1000):
    """-> mean mask IoU of a run's queries behind stage 1's completions, on the rows of val"""
    lens, processor, collate, shared = open_run(folder)
    rows, ious = EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), limit), []
    for first in range(0, len(rows), 50):
        batch = collate([rows[i] for i in range(first, min(first + 50, len(rows)))])
        prefilled = prefill(lens.mllm, batch, prompt_positions(lens.mllm, batch),
                            forced_completions(lens, batch, processor.tokenizer))
        maps = lens.align_forward(prefilled, lens.encode_images(batch["sam_pixels"]))
        ious += [float(mask_iou(full_size_masks(low[None], gt.shape)[0], gt))
                 for low, gt in zip(maps, batch["gt_masks"])]
    return float(np.mean(ious))


def turning_step(metrics):
    """The first step from which ten steps sample TURNED tokens or more in the mean, or None."""
    lengths = [line["completion_length"] for line in metrics]
    return next((step + 1 for step in range(len(lengths) - 9)
                 if np.mean(lengths[step:step + 10]) >= TURNED), None)


def run_row(table, row, seed):
    """-> the row's line of ablations.jsonl"""
    stages, flags, steps, tail = [f"seed {seed}"], {"evaluate.py": row.evaluate}, {}, {}
    folder, init = run_folder(*stages), "none"
    for script, own_flags in (("align.py", row.align), ("train_rl.py", row.rl)):
        if own_flags is None:
            continue
        stages.append(f"{script[:-3]} {own_flags}")
        folder = run_folder(*stages)
        start = [] if script == "align.py" else ["--init", init]
        train(script, folder, "--seed", seed, *start, *own_flags.split())
        metrics = read_lines(folder / "metrics.jsonl")
        init, flags[script], steps[script] = folder, own_flags, len(metrics)
        tail = {key: round(float(np.mean([line[key] for line in metrics[-25:]])), 5)
                for key in metrics[0] if key not in ("step", "lr")}
    modes, limit = (["greedy"], 300) if table == "variants" else (["greedy", "sampled"], 1000)
    scores = {mode: measure(folder, row, seed, mode, limit) for mode in modes}
    if table in ("table3", "table4"):
        scores["forced"] = {"giou": forced_giou(folder)}
    if row.rl is not None:
        tail["turn"] = turning_step(metrics)
    return {"table": table, "row": row.name, "seed": seed, "flags": flags, "steps": steps,
            **scores, "tail": tail}


def run_table(table):
    """Run what is missing, the first seed of all rows first. -> whether every run succeeded"""
    present = {(line["table"], line["row"], line["seed"]) for line in read_lines(LINES)}
    succeeded = True
    for seed in SEEDS:
        for row in TABLES[table][2]:
            if seed not in row.seeds or (table, row.name, seed) in present:
                continue
            try:
                line = run_row(table, row, seed)
            except subprocess.CalledProcessError:
                succeeded = False
                print(f"{table}, {row.name}, seed {seed}: failed, see {RUNS / 'log.txt'}")
                continue
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{table}, {row.name}, seed {seed}: finished", flush=True)
    return succeeded


# --- The page -------------------------------------------------------------------------------------

def cell(key, values):
    """The mean in per cent (PLAIN: as it is) and, for several seeds, the range."""
    if None in values:
        return "never" if len(values) == 1 else "/".join(str(v or "never") for v in values)
    values = np.array(values) * (1 if key in PLAIN else 100)
    digits = {"turn": 0, "reward": 2, "entropy": 2, "kl": 2}.get(key, 1)
    low, mean, high = (f"{v:.{digits}f}" for v in (min(values), np.mean(values), max(values)))
    return mean + (f" ({low}-{high})" if len(values) > 1 else "")


def page(lines):
    """-> docs/evidence/ablations.md; rows without a line are left out"""
    text = """# Ablations: all numbers

Made by `python tests/evidence/ablations.py`, from ablations.jsonl beside this page. What follows
from these numbers: [results](../results.md#ablations). The script's head says what to know before
reading them.

Everything is in per cent, on 1,000 rows of the shapes world's val (300 for the variants), with
greedy completions unless a column says "sampled". A cell is the mean over seeds and, in brackets, their range. "Shared" are
the rows whose object crosses, nests or hides. The paper's column is its cIoU on RefCOCO testA.
Steps are those of stage 1 + stage 2.
"""
    for table, (title, columns, rows) in TABLES.items():
        cells = []
        for row in rows:
            seeds = [line for line in lines if (line["table"], line["row"]) == (table, row.name)]
            if not seeds:
                continue
            numbers = [cell(key, [line[part][key] for line in seeds])
                       if key in seeds[0].get(part, {}) else "" for part, key in columns.values()]
            steps = " + ".join(map(str, seeds[0]["steps"].values()))
            cells.append([row.name, row.paper, *numbers, steps,
                          f"{len(seeds)} of {len(row.seeds)}"])
        if cells:
            header = ["", "paper", *columns, "steps", "seeds"]
            text += f"\n## {title}\n\n{markdown_table(header, cells)}"
            text += f"\nPredicted before the runs:\n{PREDICTIONS}" if table == "variants" else ""
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="tables to complete")
    tables = parser.parse_args().tables
    if tables:
        write_world()
    succeeded = [run_table(table) for table in tables]
    (EVIDENCE / "ablations.md").write_text(page(read_lines(LINES)))
    sys.exit(not all(succeeded))


if __name__ == "__main__":
    main()
