"""Stage 2 on 1, 2 and 4 processes and on two "nodes", over gloo. By hand:

    python tests/scale.py       # six minutes of two cores; writes docs/scale.json and docs/scale.md

Ten updates on stored completions and random weights (tests/worker.py), in fp32 and in bf16, against
one process (and that in bf16 against that in fp32: the yardstick of what rounding gives): the
largest difference of any loss part, of the gradient norm, and of any trained weight after the tenth
update, over the largest weight of its tensor. The rate is ten times the paper's, 3e-5. (AdamW
divides a gradient by its own size, be it rounding alone: at 9e-4 the losses were 8e-4 apart after
ten updates.) A node is a torchrun agent of its own; two of them meet over loopback at a static
address. `full` shards over all processes, `hybrid` within a node, with copies between nodes. Memory
is what a process holds of what is trained.

Then train_rl.py itself, five steps of the tiny preset on two nodes of one process each, beside one
process. It samples, and a token may tip over when sums are taken in another order, so losses are
equal only while the completions are.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from proof import write_world

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               "HF_HUB_OFFLINE": "1"}
WAYS = {"1 process": (1, 1, "full"), "2 processes": (1, 2, "full"), "4 processes": (1, 4, "full"),
        "2 nodes x 2, full": (2, 2, "full"), "2 nodes x 2, hybrid": (2, 2, "hybrid")}


def torchrun(nodes, processes, *command):
    """One agent, or one per node, which meet at a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    meet = [f"--nnodes={nodes}", "--rdzv_backend=static", "--master_addr=127.0.0.1",
            f"--master_port={port}"]
    agents = []
    for n in range(nodes):
        way = ["--standalone"] if nodes == 1 else [*meet, f"--node_rank={n}"]
        agents.append(subprocess.Popen([*start, *way, *map(str, command)], cwd=ROOT,
                                       env=ENVIRONMENT))
    assert [agent.wait() for agent in agents] == [0] * nodes, command


def compare(found, expected):
    """-> the largest differences of loss parts and norms, and of weights over their tensor's
    largest"""
    rows = (found["rows"] - expected["rows"]).abs().amax(0)
    weights = [((found["weights"][name] - p).abs().max() / p.abs().max()).item()
               for name, p in expected["weights"].items()]
    return {"loss": rows[0].item(), "parts": rows[1:-1].max().item(),
            "gradient norm": rows[-1].item(), "weights": max(weights)}


def ten_updates(folder):
    results = {}
    for precision in ("fp32", "bf16"):
        for way, (nodes, processes, kind) in WAYS.items():
            out = folder / f"{precision} {way}.pt"
            torchrun(nodes, processes, "tests/worker.py", "steps", out, precision, kind)
            found = torch.load(out, weights_only=True)
            yardstick = "fp32" if processes == 1 else precision      # what rounding to bf16 gives
            one = torch.load(folder / f"{yardstick} 1 process.pt", weights_only=True)
            sizes = {part: max(size[part] for size in found["bytes"])
                     for part in found["bytes"][0]}
            share = {part: size / one["bytes"][0][part] for part, size in sizes.items()}
            results[f"{precision}, {way}"] = {**compare(found, one), "share": share}
            print(f"{precision}, {way}: {results[f'{precision}, {way}']}", flush=True)
    return results


def whole_script(folder):
    """-> losses of five steps on one process and on two nodes"""
    write_world()
    torchrun(1, 1, "align.py", "--preset", "tiny", "--steps", 5, "--output", folder / "align")
    common = ["--preset", "tiny", "--init", folder / "align", "--steps", 5, "--batch", 8,
              "--micro-batch", 4]
    losses = []
    for nodes in (1, 2):
        out = folder / f"rl{nodes}"
        torchrun(nodes, 1, "train_rl.py", *common, "--output", out)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    return losses


def table(data):
    lines = ["# One process and several", "",
             "Made by `python tests/scale.py`. Each row trains the same small model for ten "
             "updates on the same batches and is compared with the same training on one process. "
             "(bf16 on one process is compared with fp32.) The first four columns are the largest "
             "differences: of the loss (42 at the start, 10 at the end), of its parts, of the "
             "gradient norm, and of any weight, relative to the largest weight of its tensor. The "
             "last three columns are the memory that one process needs, as a share of what a "
             "single process needs.", "",
             "| | loss | other parts | gradient norm | weights | trained weights per process | "
             "optimizer | reference |",
             "|---|---|---|---|---|---|---|---|"]
    for way, row in data["updates"].items():
        cells = [f"{row[name]:.1e}" for name in ("loss", "parts", "gradient norm", "weights")]
        cells += [f"{row['share'][part]:.3f}" for part in ("parameters", "optimizer", "reference")]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    one, two = data["script"]
    lines += ["", "train_rl.py, five steps, one process and two nodes: losses differ by "
              + ", ".join(f"{abs(a - b):.1e}" for a, b in zip(one, two)) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = {"updates": ten_updates(Path(folder)), "script": whole_script(Path(folder))}
    (ROOT / "docs/scale.json").write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs/scale.md").write_text(table(data))
    print(table(data))
