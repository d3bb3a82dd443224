"""Ablations on the shapes world: Tables 3, 4 and 5, then rewards and group size. By hand:

    python tests/ablate.py table3                 # queries: stage 1 alone
    python tests/ablate.py table4                 # connector: stage 1 alone
    python tests/ablate.py table5                 # components: both stages
    python tests/ablate.py rewards group          # one seed
    python tests/ablate.py table5 --processes 2   # each training on two processes
    python tests/ablate.py markdown               # docs/ablations.md and results.md; no training

A training takes about as long as the main job's, on one core for each process.

Every row is the tiny preset and the flags that stand beside it below; its stage 2 starts from the
stage 1 of its own seed, which rows share. A run is a folder under runs/ablate, named after its
flags: finished it is taken as it is, interrupted it is resumed, a failed one is named
(runs/ablate/log.txt says why) and tried again by the next command. A finished row is a line of
docs/ablations.jsonl and is not made again: commands, steps, seconds of training (the machine may
have done other work beside it, or paused it), the metrics of 1,000 rows of val, greedy and sampled,
and the mean of each metric of training over the last 25 steps.

What to know before reading the tables:
- Evaluation is always behind the model's own answer. Table 3 of the paper probably was not (the
  released code puts the true box in).
- "LISA-like" is the nearest that the flags give: one query and an MLP (LISA's projection),
  untrained at the start; the answer is cut after its first token, so the query reads picture and
  expression and no reasoning; lambdas and beta 0, so the segmentation loss alone trains MLLM,
  query, MLP and SAM's decoder, query and MLP at stage 1's rate. It lacks LISA's text loss and its
  LoRA, and it speaks no box. A group is two copies of one prompt.
- "No alignment": the context module begins untrained, so it learns at stage 1's rate. One row shows
  what stage 2's own rate, made for an aligned module, does to it.
"""
import argparse
import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
from proof import ENVIRONMENT, ROOT, SHARED, going_on, write_world

RUNS, LINES, PAGE = ROOT / "runs/ablate", ROOT / "docs/ablations.jsonl", ROOT / "docs/results.md"
SEEDS = (1, 2, 3)
NO_REWARD = "--lambda-format 0 --lambda-box 0 --lambda-mask 0"
LISA = (f"--num-queries 1 --connector mlp {NO_REWARD} --beta 0 --group-size 2 --lr-context 1e-3 "
        f"--lr-sam 1e-4")
UNALIGNED = "--lr-context 1e-3"              # stage 1's rate; stage 2's own is a thirtieth of it


@dataclass
class Row:
    name: str
    align: str | None = ""                  # stage 1's flags; None: no stage 1
    rl: str | None = None                   # stage 2's flags; None: no stage 2
    evaluate: str = ""
    seeds: tuple = (1,)
    paper: str = ""                         # its number, cIoU on RefCOCO testA


PAPER_QUERIES = {1: "85.9", 16: "87.4", 64: "87.9"}
BOX = "--prompt-with box"
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
REWARDS = [
    Row("default", rl=""),
    Row("no R_format", rl="--lambda-format 0"),
    Row("no R_box", rl="--lambda-box 0"),
    Row("no R_seg", rl="--lambda-mask 0"),
    Row("R_format alone", rl="--lambda-box 0 --lambda-mask 0"),
    Row("R_box alone", rl="--lambda-format 0 --lambda-mask 0"),
    Row("R_seg alone", rl="--lambda-format 0 --lambda-box 0"),
    Row("alpha = 0", rl="--alpha 0"),
    Row("alpha = 1", rl="--alpha 1")]
GROUP = [Row(f"G = {G}", rl="" if G == 8 else f"--group-size {G}") for G in (2, 8, 16)]

MASKS = {"cIoU": ("greedy", "ciou"), "gIoU": ("greedy", "giou")}
STAGE1 = {**MASKS, "gIoU, sampled": ("sampled", "giou"),
          "training's last mask IoU": ("tail", "mask_iou")}
STAGE2 = {**MASKS, "gIoU, shared": ("greedy", "giou_shared"), "box IoU": ("greedy", "box_iou"),
          "Acc@0.5": ("greedy", "acc50"), "format": ("greedy", "format"),
          "gIoU, sampled": ("sampled", "giou"), "box IoU, sampled": ("sampled", "box_iou"),
          "format, sampled": ("sampled", "format"),
          "tokens, training's last": ("tail", "completion_length")}
TABLES = {"table3": ("Table 3: number of queries, after stage 1", STAGE1, QUERIES),
          "table4": ("Table 4: connector, after stage 1", STAGE1, CONNECTOR),
          "table5": ("Table 5: components", STAGE2, COMPONENTS),
          "rewards": ("Rewards and losses", STAGE2, REWARDS),
          "group": ("Group size, at the same number of steps", STAGE2, GROUP)}


# --- Runs -----------------------------------------------------------------------------------------

def call(script, processes, *flags):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [script, "--preset", "tiny", *map(str, flags)]
    with open(RUNS / "log.txt", "a") as log:
        print(">", script, *flags, file=log, flush=True)
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=log, stderr=log)


def folder_of(*stages):
    """A run's folder from its seed and its stages with their flags:
    seed_1+align--connector_mlp+train_rl--steps_125."""
    named = ["_".join(stage.split()).replace("_--", "--") for stage in stages]
    return RUNS / "+".join(named)


def train(script, folder, seed, flags, processes):
    """One run, skipped where it is finished, resumed where it was interrupted."""
    if not (folder / "lens.json").exists():
        # a process's whole share
        share = ["--micro-batch", 32 // processes] if script == "align.py" else []
        call(script, processes, "--seed", seed, "--output", folder, *share, *flags.split(),
             *going_on(folder))


def shared_giou(scores):
    """gIoU over the rows of all layouts in which things share a place."""
    shared = [scores[f"val: {layout}"] for layout in SHARED]
    return float(np.average([part["giou"] for part in shared],
                            weights=[part["n"] for part in shared]))


def evaluate(folder, row, seed, mode, processes):
    out = folder.with_name(folder.name + row.evaluate.replace(" ", "_") + f".{mode}.json")
    if not out.exists():
        trained = (folder / "lens.json").exists()                # else the stand-ins as they come
        source = ["--checkpoint", folder] if trained else []
        sample = ["--sample"] if mode == "sampled" else []
        call("evaluate.py", processes, "--seed", seed, "--limit", 1000, "--json", out, *source,
             *sample, *row.evaluate.split())
    scores = json.loads(out.read_text())
    return {**scores["val"], "giou_shared": shared_giou(scores)}


def commit():
    """The commit whose scripts ran; a "+" says that they had been edited."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    edited = git("diff", "--quiet", "HEAD", "--", ":(glob)*.py").returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("+" if edited else "")


def run_row(table, row, seed, processes):
    """All runs of a row and seed -> its line."""
    stages, flags, steps, seconds, tail = [f"seed {seed}"], {}, {}, 0, {}
    folder, init = folder_of(*stages), "none"
    for script, own in (("align.py", row.align), ("train_rl.py", row.rl)):
        if own is None:
            continue
        stages.append(f"{script[:-3]} {own}")
        folder = folder_of(*stages)
        start = f" --init {init}" if script == "train_rl.py" else ""
        train(script, folder, seed, own + start, processes)
        metrics = [json.loads(line) for line in
                   (folder / "metrics.jsonl").read_text().splitlines()]
        init, flags[script], steps[script] = folder, own, len(metrics)
        seconds += sum(m["seconds"] for m in metrics)
        tail = {key: round(float(np.mean([row[key] for row in metrics[-25:]])), 5)
                for key in metrics[0] if key not in ("step", "lr")}
    scores = {mode: evaluate(folder, row, seed, mode, processes) for mode in ("greedy", "sampled")}
    flags["evaluate.py"] = row.evaluate
    return {"table": table, "row": row.name, "seed": seed, "flags": flags, "steps": steps,
            "commit": commit(), **scores, "tail": tail, "seconds": round(seconds)}


def finished():
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def run_table(table, processes):
    """What is missing of a table, the first seed of all rows first. -> is it whole?"""
    done = {(line["table"], line["row"], line["seed"]) for line in finished()}
    whole = True
    for seed in SEEDS:
        for row in TABLES[table][2]:
            if seed not in row.seeds or (table, row.name, seed) in done:
                continue
            try:
                line = run_row(table, row, seed, processes)
            except subprocess.CalledProcessError:
                whole = False
                print(f"{table}, {row.name}, seed {seed}: FAILED, see {RUNS / 'log.txt'}",
                      flush=True)
                continue
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{table}, {row.name}, seed {seed}: cIoU {line['greedy']['ciou']:.3f}, "
                  f"{line['seconds']} s", flush=True)
    return whole


# --- The tables -----------------------------------------------------------------------------------

def cell(key, values):
    """Mean in per cent (tokens: as they are), and the range over seeds where there are several."""
    values = np.array(values) * (1 if key == "completion_length" else 100)
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def markdown(lines):
    text = ["Everything in per cent on 1,000 rows of the shapes world's val, greedy unless it says "
            "sampled: the mean over seeds and, in brackets, their range. \"Shared\": rows "
            "whose object crosses, nests or hides. The paper's column is its "
            "cIoU on RefCOCO testA. Steps are stage 1's + stage 2's. Made by "
            "`python tests/ablate.py markdown` of docs/ablations.jsonl."]
    for table, (title, columns, rows) in TABLES.items():
        made = {row.name: [line for line in lines
                           if (line["table"], line["row"]) == (table, row.name)] for row in rows}
        if not any(made.values()):
            continue
        text += ["", f"**{title}**", "",
                 "| | paper | " + " | ".join(columns) + " | steps | seeds |",
                 "|" + "---|" * (len(columns) + 4)]
        for row in rows:
            own, cells = made[row.name], []
            if not own:
                continue                                     # not run yet
            for part, key in columns.values():
                known = key in own[0][part]
                cells.append(cell(key, [line[part][key] for line in own]) if known else "")
            steps = " + ".join(str(n) for n in own[0]["steps"].values())
            cells = [row.name, row.paper, *cells, steps, f"{len(own)} of {len(row.seeds)}"]
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=[*TABLES, "markdown"],
                        help="tables to run, or the page of all of them")
    parser.add_argument("--processes", type=int, default=1,
                        help="processes of each training and evaluation")
    args = parser.parse_args()
    tables = [what for what in args.what if what != "markdown"]
    RUNS.mkdir(parents=True, exist_ok=True)
    if tables:
        write_world()
    whole = [run_table(table, args.processes) for table in tables]
    if "markdown" in args.what:
        made = markdown(finished())
        (ROOT / "docs/ablations.md").write_text(made)
        before, mark, rest = PAGE.read_text().partition("<!-- docs/ablations.md -->\n")
        if mark:
            PAGE.write_text(before + mark + made + rest[rest.index("<!-- end -->"):])
    sys.exit(0 if all(whole) else 1)


if __name__ == "__main__":
    main()
