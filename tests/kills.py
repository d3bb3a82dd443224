"""kill -9 at twenty random moments of a run, resumed each time. By hand:

    python tests/kills.py                # six minutes of one core; prints, and writes docs/kills.md

Forty steps of the tiny preset's stage 2 on one process and one thread, a checkpoint after every
second step. The run is killed between its start and its end, wherever that hits: while it imports,
samples, updates, or saves. In the end every line of metrics.jsonl but the times, and the exported
weights, must be those of the run that nobody killed, bit for bit. Before its first checkpoint a run
has nothing to go on from and is begun anew.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proof import going_on, write_world

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
KILLS, STEPS = 20, 40


def start(script, *flags):
    command = [sys.executable, script, "--preset", "tiny", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def read_metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines(folder):
    """Without the times."""
    times = ("seconds", "speed")
    return [{name: value for name, value in row.items() if not name.startswith(times)}
            for row in read_metrics(folder)]


def main(folder):
    write_world()
    rng, log, whole, broken = random.Random(0), [], folder / "whole", folder / "broken"
    assert start("align.py", "--steps", 5, "--output", folder / "align").wait() == 0
    flags = ["--init", folder / "align", "--steps", STEPS, "--batch", 4, "--micro-batch", 2,
             "--group-size", 4, "--save-every", 2]
    began = time.time()
    assert start("train_rl.py", *flags, "--output", whole).wait() == 0
    seconds = time.time() - began
    training = sum(row["seconds"] for row in read_metrics(whole))
    for kill in range(1, KILLS + 1):
        before = len(lines(broken))
        process = start("train_rl.py", *flags, "--output", broken, *going_on(broken))
        wait = rng.uniform(0.3 * (seconds - training), seconds - training + 5 * training / STEPS)
        time.sleep(wait)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        found = sorted(path.name for path in (broken / "checkpoints").glob("*"))
        log.append(f"| {kill} | {wait:.1f} | {before} | {len(lines(broken))} | "
                   f"{', '.join(found)} |")
        print(log[-1], flush=True)
    assert start("train_rl.py", *flags, "--output", broken, *going_on(broken)).wait() == 0
    assert len(lines(whole)) == STEPS and lines(whole) == lines(broken), "metrics differ"
    for name in ("context.safetensors", "sam.safetensors", "mllm/model.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    text = ["# Killed and resumed", "",
            f"Made by `python tests/kills.py`. A run of {STEPS} steps takes {seconds:.0f} s when "
            f"nobody stops it. Here it was killed with `kill -9` {KILLS} times and continued each "
            "time. At the end all exported weights and all lines of metrics.jsonl were equal to "
            "those of an undisturbed run, bit for bit. Only the times differ.", "",
            "| kill | after s | lines before | lines after | checkpoints (building_: killed while "
            "saving) |",
            "|---|---|---|---|---|", *log]
    (ROOT / "docs/kills.md").write_text("\n".join(text) + "\n")
    print("equal, bit for bit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
