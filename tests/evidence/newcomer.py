"""The newcomer's path, timed: from a clone to an image of one's own, segmented.

    python tests/evidence/newcomer.py          # a quarter of an hour, 6 GB in a temporary folder
    python tests/evidence/newcomer.py FOLDER   # the same in a new folder, which stays

Runs the README's first command in a fresh clone with a fresh environment. Then it draws an image,
300 x 220 pixels on white, and segments it with the README's last command. Writes
docs/evidence/newcomer.json, with the machine. The times mean something only on an otherwise idle
machine, and the packages' time depends on the network and on what pip has in its cache.
"""
import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the red circle"


def draw_image(path):
    image = Image.new("RGB", (300, 220), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 110, 110), fill=(220, 40, 40))
    draw.rectangle((180, 90, 250, 160), fill=(40, 80, 230))
    draw.polygon([(60, 200), (100, 130), (140, 200)], fill=(40, 180, 60))
    image.save(path)


def readme_command(start):
    """The README's block of commands that begins so, joined to one line."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(rf"```bash\n({re.escape(start)}.*?)\n```", readme, re.DOTALL)[1]
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return " && ".join(line.rstrip().removesuffix("&&") for line in lines)


def machine():
    """The processor's name as far as the system tells, and the number of cores."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="stays; default: a temporary one")
    folder = parser.parse_args().folder
    setup, begin, job = readme_command("python3 -m venv").partition("python tests/tiny/")
    commands = {"clone": f"git clone -q {ROOT} .",
                "environment and packages": setup.rstrip(" &"),
                "both stages and evaluation": f". .venv/bin/activate && {begin}{job}",
                "own image": ". .venv/bin/activate && python evaluate.py --checkpoint runs/tiny/rl "
                             f"--image mine.png --text '{TEXT}' --output overlay.png"}
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("PYTHON", "VIRTUAL", "OMP"))}
    seconds = {}
    with contextlib.ExitStack() as stack:
        clone = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        clone.mkdir(exist_ok=True)
        for name, command in commands.items():
            if name == "own image":
                draw_image(clone / "mine.png")
            began = time.time()
            result = subprocess.run(["bash", "-c", command], cwd=clone, env=environment,
                                    capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
            seconds[name] = round(time.time() - began)
            print(name, seconds[name], "s", flush=True)
    content = {"machine": machine(), "seconds": seconds, "expression": TEXT, "printed": result.stdout}
    (ROOT / "docs/evidence/newcomer.json").write_text(json.dumps(content, indent=1) + "\n")
    print(result.stdout)


if __name__ == "__main__":
    main()
