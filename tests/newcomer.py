"""The newcomer's path, timed: from a clone to an own picture segmented. By hand:

    python tests/newcomer.py          # a quarter of an hour, 6 GB in a temporary folder
    python tests/newcomer.py FOLDER   # the same in a new folder, which stays: the pictures of docs/
                                      # are made from its runs/

On an otherwise idle machine with two cores; writes docs/newcomer.json and docs/newcomer.png. Runs
the README's set-up and its main job in a fresh clone and a fresh environment, then draws a picture
of its own, 300 x 220 pixels on white, and segments it with the README's last command.
"""
import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the red circle"


def own_picture(path):
    picture = Image.new("RGB", (300, 220), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 30, 110, 110), fill=(220, 40, 40))
    draw.rectangle((180, 90, 250, 160), fill=(40, 80, 230))
    draw.polygon([(60, 200), (100, 130), (140, 200)], fill=(40, 180, 60))
    picture.save(path)


def bash_block(readme, start):
    """The commands that stand there as one block and begin so, joined to one line."""
    block = re.search(rf"```bash\n({re.escape(start)}.*?)\n```", readme, re.DOTALL)[1]
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return " && ".join(line.rstrip().removesuffix("&&") for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="stays; default: a temporary one")
    folder = parser.parse_args().folder
    readme = (ROOT / "README.md").read_text()
    setup, begin, job = bash_block(readme, "python3 -m venv").partition("python tests/tiny/")
    setup, job = setup.rstrip(" &"), begin + job
    own = (f"python evaluate.py --checkpoint runs/tiny/rl --image mine.png --text '{TEXT}' "
           f"--output overlay.png")
    commands = {"clone": f"git clone -q {ROOT} .",
                "environment and packages": setup,
                "both stages and evaluation": f". .venv/bin/activate && {job}",
                "own picture": f". .venv/bin/activate && {own}"}
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("PYTHON", "VIRTUAL", "OMP"))}
    seconds = {}
    with contextlib.ExitStack() as place:
        clone = folder or place.enter_context(tempfile.TemporaryDirectory())
        Path(clone).mkdir(exist_ok=True)
        for name, command in commands.items():
            if name == "own picture":
                own_picture(Path(clone) / "mine.png")
            start = time.time()
            done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment,
                                  capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
            seconds[name] = round(time.time() - start)
            print(name, seconds[name], "s", flush=True)
        shutil.copy(Path(clone) / "overlay.png", ROOT / "docs/newcomer.png")
    found = {"seconds": seconds, "text": TEXT, "answer": done.stdout}
    (ROOT / "docs/newcomer.json").write_text(json.dumps(found, indent=1) + "\n")
    print(done.stdout)


if __name__ == "__main__":
    main()
