"""Stage 2 on 1, 2 and 4 processes, and on two "machines", beside one process.

    python tests/evidence/scale.py   # six minutes of two cores; docs/evidence/scale.json, scale.md

Ten updates on stored completions and random weights (tests/training_worker.py), in fp32 and in
bf16. Each way is compared with one process: the largest difference of a loss, of the gradient norm,
and of a trained weight after the tenth update, relative to the largest weight of its tensor. bf16
on one process is compared with fp32, which shows what rounding alone does. The learning rate is ten
times the paper's, 3e-5. (AdamW divides a gradient by its own size, even where it is rounding alone:
at 9e-4 the losses were 8e-4 apart after ten updates.)

A machine is a torchrun agent of its own; two of them meet over loopback. `full` shards over all
processes, `hybrid` within a machine with copies between machines.

Then train_rl.py itself, five steps of the tiny preset, on two machines of one process each and on
one process. It samples, and a token may tip over when sums are taken in another order. So losses
are equal only as long as the completions are.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               "HF_HUB_OFFLINE": "1"}
# name: (machines, processes of each, --shard)
WAYS = {"1 process": (1, 1, "full"), "2 processes": (1, 2, "full"), "4 processes": (1, 4, "full"),
        "2 machines x 2, full": (2, 2, "full"), "2 machines x 2, hybrid": (2, 2, "hybrid")}


def ten_updates(folder):
    """-> {way: largest differences, and the share of one process's memory}"""
    results = {}
    for precision in ("fp32", "bf16"):
        for way, (machines, processes, kind) in WAYS.items():
            out = folder / f"{precision} {way}.pt"
            torchrun(machines, processes, "tests/training_worker.py", out, precision, kind)
            result = torch.load(out, weights_only=True)
            beside = "fp32" if processes == 1 else precision
            one = torch.load(folder / f"{beside} 1 process.pt", weights_only=True)
            share = {part: max(process[part] for process in result["bytes"]) / one["bytes"][0][part]
                     for part in one["bytes"][0]}
            results[f"{precision}, {way}"] = {**compare(result, one), "share": share}
            print(f"{precision}, {way}: {results[f'{precision}, {way}']}", flush=True)
    return results


def torchrun(machines, processes, *command):
    """Start one agent, or one per machine, which meet at a free port; wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    meet = [f"--nnodes={machines}", "--rdzv_backend=static", "--master_addr=127.0.0.1",
            f"--master_port={port}"]
    agents = []
    for rank in range(machines):
        way = ["--standalone"] if machines == 1 else [*meet, f"--node_rank={rank}"]
        agents.append(subprocess.Popen([*start, *way, *map(str, command)], cwd=ROOT,
                                       env=ENVIRONMENT))
    assert [agent.wait() for agent in agents] == [0] * machines, command


def compare(result, expected):
    """-> the largest differences of the loss, its parts and the gradient norm (columns of "rows"),
    and of a weight relative to the largest of its tensor"""
    rows = (result["rows"] - expected["rows"]).abs().amax(0)
    weights = [((result["weights"][name] - p).abs().max() / p.abs().max()).item()
               for name, p in expected["weights"].items()]
    return {"loss": rows[0].item(), "parts": rows[1:-1].max().item(),
            "gradient norm": rows[-1].item(), "weights": max(weights)}


def whole_script(folder):
    """-> the losses of five steps on one process, and on two machines"""
    world = folder / "shapes"
    torchrun(1, 1, "tests/tiny/world.py", world)
    common = ["--preset", "tiny", "--data", world, "--steps", 5]
    torchrun(1, 1, "align.py", *common, "--output", folder / "align")
    losses = []
    for machines in (1, 2):
        out = folder / f"rl{machines}"
        torchrun(machines, 1, "train_rl.py", *common, "--init", folder / "align", "--batch", 8,
                 "--micro-batch", 4, "--output", out)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    return losses


def page(data):
    lines = ["# One process and several", "",
             f"Made by `python tests/evidence/scale.py` ({data['measured with']}). Each row trains "
             "the same small model for ten updates on the same batches and is compared with the "
             "same training on one process. (bf16 on one process is compared with fp32.) The first "
             "four columns are the largest differences: of the loss (42 at the start, 10 at the "
             "end), of its parts, of the gradient norm, and of any weight, relative to the largest "
             "weight of its tensor. The last three columns are the memory that one process needs, "
             "as a share of what a single process needs.", "",
             "| | loss | other parts | gradient norm | weights | trained weights per process | "
             "optimizer | reference |",
             "|---|---|---|---|---|---|---|---|"]
    for way, row in data["updates"].items():
        cells = [f"{row[name]:.1e}" for name in ("loss", "parts", "gradient norm", "weights")]
        cells += [f"{row['share'][part]:.3f}" for part in ("parameters", "optimizer", "reference")]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    gaps = ", ".join(f"{abs(a - b):.1e}" for a, b in zip(*data["script"]))
    return "\n".join([*lines, "", "train_rl.py, five steps, one process and two machines: the "
                      f"losses differ by {gaps}."]) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        data = {"measured with": versions, "updates": ten_updates(Path(folder)),
                "script": whole_script(Path(folder))}
    (ROOT / "docs/evidence/scale.json").write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs/evidence/scale.md").write_text(page(data))
    print(page(data))
