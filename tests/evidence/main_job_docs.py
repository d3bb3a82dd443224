"""Makes again whatever in docs/ shows the result of the main job, the README's first command.

    python tests/evidence/main_job_docs.py     # after the main job; some minutes; needs matplotlib

These are the metrics of both stages, the evaluation, the overlay on docs/shapes.png (an image that
no training has seen), the curves, the figure of one group, attention, misguided context, the walk
and the drawn images. In the end all tables and links of the pages are brought up to date.
"""
import os
import shutil
import subprocess
import sys

from tiny_runs import EVIDENCE, ROOT

COMMANDS = """
evaluate.py --preset tiny --checkpoint runs/tiny/rl --json docs/evidence/tiny.json
evaluate.py --checkpoint runs/tiny/rl --image docs/shapes.png --text "the largest red circle" \
--output docs/overlay.png
tests/tools/curves.py runs/tiny/rl docs/curves.png
tests/evidence/group_figure.py --checkpoint runs/tiny/align
tests/evidence/attention.py --checkpoint runs/tiny/rl
tests/evidence/misguided.py --checkpoint runs/tiny/rl
tests/evidence/walk.py runs/tiny/align
tests/tiny/drawn.py runs/drawn --checkpoint runs/tiny/rl > docs/evidence/drawn.txt
tests/evidence/pages.py
"""


def main():
    for stage in ("align", "rl"):
        shutil.copy(ROOT / f"runs/tiny/{stage}/metrics.jsonl", EVIDENCE / f"{stage}_metrics.jsonl")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in COMMANDS.strip().splitlines():
        print(">", command, flush=True)
        subprocess.run(f"{sys.executable} {command}", shell=True, cwd=ROOT, env=environment,
                       check=True)


if __name__ == "__main__":
    main()
