"""What the scripts of this folder share: runs of the tiny preset, and tables in Markdown.

A run is a folder below runs/. One that is finished is not made again; one that was interrupted is
resumed.
"""
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs/evidence"
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tiny")]
# ATEN_CPU_CAPABILITY=default makes PyTorch round as on another machine: such runs lie apart
ROUNDING = os.environ.get("ATEN_CPU_CAPABILITY", "")
PROOF = f"proof_{ROUNDING}" if ROUNDING else "proof"        # folder below runs/, file in EVIDENCE
# one thread, so that two runs can share two cores
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch

from align import SharedArgs
from data import Collator
from model import build_lens, read_run

LOOKS = "<think>\nThe"        # the first words of a completion that looks (docs/world.md)


def write_world():
    """The images of the tiny preset, if they are missing."""
    if not (ROOT / "runs/shapes").exists():
        subprocess.run([sys.executable, "tests/tiny/world.py", "runs/shapes"], cwd=ROOT, check=True)


def call(script, log, *flags):
    """Run a script with the tiny preset; what it prints goes to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, "--preset", "tiny", *map(str, flags)]
    with log.open("a") as file:
        print(">", *command[1:], file=file, flush=True)
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stdout=file, stderr=file)


def resume_flags(folder):
    """["--resume"] if the run in `folder` has a checkpoint to go on from, else []."""
    return ["--resume"] if list((folder / "checkpoints").glob("step_*")) else []


def train(script, folder, *flags):
    if not (folder / "lens.json").exists():
        call(script, folder.parent / "log.txt", "--output", folder, *flags, *resume_flags(folder))


def evaluate(out, mode, *flags):
    """Evaluate with greedy or with sampled completions. `out` is a jsonl with a line per row, or a
    json with the metrics."""
    script = {"greedy": "evaluate.py", "sampled": "tests/evidence/sampled_evaluation.py"}[mode]
    kind = "--predictions" if out.suffix == ".jsonl" else "--json"
    if not out.exists():
        call(script, out.parent / "log.txt", kind, out, *flags)


def read_lines(path):
    """The objects of a jsonl file, [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_json(name, content):
    (EVIDENCE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read_json(name):
    return json.loads((EVIDENCE / f"{name}.json").read_text())


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def open_run(folder):
    """A finished run, to be used on one thread -> (lens, processor, collate, shared)"""
    torch.set_num_threads(1)
    saved = read_run(folder)
    shared = SharedArgs(**{f.name: saved[f.name] for f in fields(SharedArgs) if f.name in saved})
    lens, processor = build_lens(shared, folder)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    return lens.eval(), processor, collate, shared
