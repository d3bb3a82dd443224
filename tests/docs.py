"""Everything in docs/ that shows the main job's result, made again. By hand, after the main job:

    python tests/docs.py              # from runs/tiny, some minutes; needs matplotlib

The main job is the README's first command; `python tests/newcomer.py FOLDER` runs it too (then copy
FOLDER/runs here). Copies both stages' metrics and one picture, then runs the commands below.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# a picture of val, whose first question is "the largest red circle"
EXAMPLE = "runs/shapes/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000004340.jpg"
COMMANDS = """
evaluate.py --preset tiny --checkpoint runs/tiny/rl --json docs/tiny.json --markdown docs/tiny.md
evaluate.py --curves runs/tiny/rl --output docs/curves.png
evaluate.py --checkpoint runs/tiny/rl --image docs/shapes.png --text "the largest red circle" \
--output docs/overlay.png
tests/picture.py --checkpoint runs/tiny/align
tests/attention.py --checkpoint runs/tiny/rl
tests/misguided.py --checkpoint runs/tiny/rl
tests/walk.py runs/tiny/align
tests/tiny/drawn.py runs/drawn --checkpoint runs/tiny/rl > docs/drawn.txt
tests/test_readme.py
"""


def main():
    for stage in ("align", "rl"):
        shutil.copy(ROOT / f"runs/tiny/{stage}/metrics.jsonl", ROOT / f"docs/{stage}_metrics.jsonl")
    Image.open(ROOT / EXAMPLE).save(ROOT / "docs/shapes.png")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for command in COMMANDS.strip().splitlines():
        print(">", command, flush=True)
        subprocess.run(f"{sys.executable} {command}", shell=True, cwd=ROOT, env=environment,
                       check=True)


if __name__ == "__main__":
    main()
