"""kill -9 at twenty moments of a run, eight of them while it saves, with a resume after each.

    python tests/evidence/kills.py      # a quarter of an hour of one core; docs/evidence/kills.md

The run is forty steps of the tiny preset's stage 2 on one process, with a checkpoint after every
second step. It is killed at three kinds of moments in random order: while it starts, after one to
five more steps, and while it saves its first or second checkpoint since it was started. It is
saving as long as checkpoints/building_* exists. Apart from the start, the moments are counted in
steps and in checkpoints, not in seconds. So on a busy machine, too, most of the resumed runs get on
before the next kill.

In the end every line of metrics.jsonl without its times, and all finished weights, must equal those
of a run that nobody killed, bit for bit. A run that is killed before its first checkpoint begins
anew.
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
# kind of moment, and how many steps or saves it waits for
MOMENTS = [("start", 0)] * 4 + [("steps", n) for n in (1, 1, 2, 2, 3, 3, 4, 5)] + [
    ("save", n) for n in (1, 1, 1, 1, 2, 2, 2, 2)]
SAVING = "checkpoints/building_*"
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


def last_checkpoint(folder):
    """The number of steps in the last finished checkpoint, 0 if there is none."""
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step_*")), default=0)


def folders_of_saves(folder):
    """{(name, time of the last change)} of the folders of unfinished checkpoints."""
    result = set()
    for path in folder.glob(SAVING):
        try:
            result.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:            # it has just been renamed
            pass
    return result


def kill_once(kind, number, folder, flags, startup, rng):
    """Begin the run or resume it, and kill it in this kind of moment. startup: seconds that an
    undisturbed start takes. -> the row of the table, behind its number"""
    origin, left = last_checkpoint(folder), folders_of_saves(folder)
    began = time.time()
    process = start("train_rl.py", *flags, "--output", folder, *resume_flags(folder))

    def wait_until(condition):
        while not condition():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)

    def in_the_loop():                       # it begins with metrics.jsonl cut to `origin` lines
        path = folder / "metrics.jsonl"
        return path.exists() and path.stat().st_mtime > began

    if kind == "start":
        time.sleep(rng.uniform(0, 0.8 * startup))
    else:
        wait_until(in_the_loop)
    if kind == "steps":
        wait_until(lambda: len(metrics_of(folder)) >= origin + number)
        time.sleep(rng.uniform(0, metrics_of(folder)[-1]["seconds"]))
    if kind == "save":
        wait_until(lambda: last_checkpoint(folder) >= origin + 2 * (number - 1))
        wait_until(lambda: folders_of_saves(folder) - left)
        time.sleep(rng.uniform(0, 0.02))
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    unfinished = [name for name, _ in folders_of_saves(folder) - left]
    done = len(metrics_of(folder)) - origin if in_the_loop() else 0
    return [kind, f"{time.time() - began:.1f}", origin or "", done, last_checkpoint(folder) or "",
            ", ".join(unfinished)]


def page(rows, seconds):
    """-> docs/evidence/kills.md"""
    header = ["kill", "aimed at", "after s", "resumed from step", "steps done",
              "last finished checkpoint", "killed while writing"]
    _, _, _, origins, done, _, unfinished = zip(*rows)
    return f"""# Killed and resumed

Made by `python tests/evidence/kills.py`. A run of {STEPS} steps took {seconds:.0f} s when nobody
stopped it. Then it was killed with `kill -9` {len(rows)} times and started again each time.
{sum(map(bool, unfinished))} kills hit it while it wrote a checkpoint; the last column names what
was left of that. {sum(map(bool, origins))} of the {len(rows)} starts in this table, and the one
after it, which reached step {STEPS}, resumed from a checkpoint; before the others there was none,
so they began anew. {sum(bool(a and b) for a, b in zip(origins, done))} of those that resumed
finished at least one step before the next kill. At the end all finished weights and all lines of
metrics.jsonl were equal, bit for bit, to those of the undisturbed run. Only the times differ.

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
    startup = seconds - sum(line["seconds"] for line in metrics_of(whole))
    rows = []
    for kind, number in rng.sample(MOMENTS, len(MOMENTS)):
        rows.append([len(rows) + 1, *kill_once(kind, number, broken, flags, startup, rng)])
        print(*rows[-1], sep=", ", flush=True)
    assert sum(bool(row[-1]) for row in rows) >= 5, "too few kills have hit a save: run it again"
    assert sum(bool(row[3] and row[4]) for row in rows) >= 5, "too few resumes: run it again"
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
