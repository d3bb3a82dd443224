"""kill -9 at twenty moments of a run, six of them while it saves, with a resume after each.

    python tests/evidence/kills.py      # some six minutes of one core; docs/evidence/kills.md

The run is forty steps of the tiny preset's stage 2 on one process, with a checkpoint after every
second step. It is killed at three kinds of moments in random order: while it starts, in its first
steps, and while it saves, which is as long as checkpoints/building_* exists. In the end every line
of metrics.jsonl without its times, and all finished weights, must equal those of a run that nobody
killed, bit for bit. A run that is killed before its first checkpoint begins anew.
"""
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tiny_runs import (ENVIRONMENT, EVIDENCE, ROOT, markdown_table, read_lines, resume_flags,
                       write_world)

STEPS = 40
MOMENTS = ["start"] * 5 + ["first steps"] * 9 + ["saving"] * 6
SIGNS = {"first steps": "metrics.jsonl", "saving": "checkpoints/building_*"}    # it has come so far
WEIGHTS = ("context.safetensors", "sam.safetensors", "mllm/model.safetensors")


def start(script, *flags):
    command = [sys.executable, script, "--preset", "tiny", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def metrics_of(folder):
    return read_lines(folder / "metrics.jsonl")


def without_times(lines):
    return [{name: value for name, value in line.items()
             if not name.startswith(("seconds", "speed"))} for line in lines]


def stamps(folder, pattern):
    """{(name, time of the last change)} of the run's files or folders of this name."""
    result = set()
    for path in folder.glob(pattern):
        try:
            result.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:            # it has just been renamed
            pass
    return result


def kill_once(moment, folder, flags, longest, rng):
    """Begin the run or resume it, and kill it within `longest` seconds of this kind of moment.
    -> the row of the table, behind its number"""
    before = {name: stamps(folder, pattern) for name, pattern in SIGNS.items()}
    lines, began = len(metrics_of(folder)), time.time()
    process = start("train_rl.py", *flags, "--output", folder, *resume_flags(folder))
    while moment in SIGNS and not stamps(folder, SIGNS[moment]) - before[moment]:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, longest))
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    unfinished = stamps(folder, SIGNS["saving"]) - before["saving"]
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    return [moment, f"{time.time() - began:.1f}", lines, len(metrics_of(folder)),
            ", ".join(checkpoints), ", ".join(name for name, _ in unfinished)]


def page(rows, seconds):
    """-> docs/evidence/kills.md"""
    header = ["kill", "aimed at", "after s", "lines before", "lines after", "checkpoints",
              "killed while writing"]
    return f"""# Killed and resumed

Made by `python tests/evidence/kills.py`. A run of {STEPS} steps took {seconds:.0f} s when nobody
stopped it. Then it was killed with `kill -9` {len(rows)} times and started again each time.
{sum(bool(row[-1]) for row in rows)} kills hit it while it wrote a checkpoint; the last column names
that checkpoint. After {sum(bool(row[-2]) for row in rows)} of the kills there was a finished
checkpoint, from which it went on; after the others it began anew. At the end all finished weights
and all lines of metrics.jsonl were equal, bit for bit, to those of the undisturbed run. Only the
times differ.

{markdown_table(header, rows)}"""


def main(folder):
    write_world()
    rng, whole, broken = random.Random(0), folder / "whole", folder / "broken"
    assert start("align.py", "--steps", 5, "--output", folder / "align").wait() == 0
    flags = ["--init", folder / "align", "--steps", STEPS, "--batch", 4, "--micro-batch", 2,
             "--group-size", 4, "--save-every", 2]
    began = time.time()
    assert start("train_rl.py", *flags, "--output", whole).wait() == 0
    seconds = time.time() - began
    training = sum(line["seconds"] for line in metrics_of(whole))
    longest = {"start": 0.8 * (seconds - training), "first steps": 6 * training / STEPS,
               "saving": 0.02}
    rows = []
    for moment in rng.sample(MOMENTS, len(MOMENTS)):
        row = kill_once(moment, broken, flags, longest[moment], rng)
        rows.append([len(rows) + 1, *row])
        print(*rows[-1], sep=", ", flush=True)
    assert sum(bool(row[-1]) for row in rows) >= 5, "too few kills have hit a save: run it again"
    last = start("train_rl.py", *flags, "--output", broken, *resume_flags(broken))
    assert last.wait() == 0 and len(metrics_of(whole)) == STEPS
    assert without_times(metrics_of(whole)) == without_times(metrics_of(broken)), "metrics differ"
    for name in WEIGHTS:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    (EVIDENCE / "kills.md").write_text(page(rows, seconds))
    print("equal, bit for bit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
