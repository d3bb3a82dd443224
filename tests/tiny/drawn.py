"""Ten pictures as a person would draw them to try the model, each with a question.

    python tests/tiny/drawn.py runs/drawn                               # writes them
    python tests/tiny/drawn.py runs/drawn --checkpoint runs/tiny/rl > docs/drawn.txt    # and asks a
                                                                        # finished run

Never trained on. Plain colours, sharp edges, white, grey or black grounds, 96 to 512 pixels. They
are written as a folder of one's own (see data.py), so that evaluate.py asks as it asks any other; a
picture is right when its mask's IoU is above 0.7.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

RIGHT = 0.7
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 220, 0)
WHITE, GREY, BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)

# (width, height), ground, question, the answer's place in the list, and the things, the rearmost
# first: shape, colour, centre and half side, all three as hundredths of the picture's width.
PICTURES = [
    ((128, 128), WHITE, "the largest red circle", 0,
     [("circle", RED, 30, 32, 20), ("circle", RED, 75, 70, 11), ("square", BLUE, 72, 25, 13)]),
    ((256, 256), GREY, "the leftmost circle", 1,
     [("circle", GREEN, 70, 25, 14), ("circle", BLUE, 22, 60, 14), ("circle", RED, 65, 75, 12)]),
    ((400, 300), WHITE, "the green square", 2,
     [("circle", GREEN, 20, 25, 12), ("square", RED, 50, 45, 11), ("square", GREEN, 78, 30, 13)]),
    ((96, 96), BLACK, "the yellow triangle", 0,
     [("triangle", YELLOW, 35, 40, 22), ("square", BLUE, 75, 70, 15)]),
    ((512, 512), WHITE, "the circle left of the red square", 0,
     [("circle", BLUE, 20, 50, 13), ("square", RED, 50, 50, 11), ("circle", GREEN, 82, 52, 12),
      ("circle", YELLOW, 50, 15, 10)]),
    ((300, 200), GREY, "the square below the yellow circle", 1,
     [("circle", YELLOW, 40, 17, 10), ("square", BLUE, 38, 50, 10), ("square", RED, 80, 20, 10)]),
    ((200, 300), BLACK, "the smallest triangle", 1,
     [("triangle", RED, 35, 30, 24), ("triangle", GREEN, 70, 95, 13),
      ("triangle", BLUE, 32, 118, 20)]),
    ((160, 160), WHITE, "the red bar", 0,
     [("falling bar", RED, 45, 50, 28), ("rising bar", BLUE, 45, 50, 28),
      ("circle", GREEN, 86, 84, 9)]),
    ((240, 240), GREY, "the blue square", 0,
     [("square", BLUE, 40, 45, 24), ("circle", YELLOW, 40, 45, 24), ("diamond", RED, 82, 80, 13)]),
    ((320, 320), WHITE, "the shape next to the largest circle", 2,
     [("circle", RED, 25, 28, 17), ("circle", BLUE, 82, 82, 9), ("diamond", GREEN, 57, 34, 11),
      ("square", YELLOW, 25, 82, 11)]),
]


def corners_of(shape, x, y, r):
    """A shape's corners in pixels; none for what is round."""
    t = 0.55
    falling = [(-1, -1), (t - 1, -1), (1, 1 - t), (1, 1), (1 - t, 1), (-1, t - 1)]
    unit = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "triangle": [(0, -1), (1, 1), (-1, 1)],
            "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)], "falling bar": falling,
            "rising bar": [(dx, -dy) for dx, dy in falling]}.get(shape, [])
    return [(x + r * dx, y + r * dy) for dx, dy in unit]


def draw(size, ground, things, answer):
    """-> the picture, and the visible pixels of the answer as a black and white one."""
    picture, mask = Image.new("RGB", size, ground), Image.new("L", size, 0)
    for n, (shape, color, x, y, r) in enumerate(things):
        x, y, r = (value * size[0] / 100 for value in (x, y, r))
        for canvas, fill in ((picture, color), (mask, 255 if n == answer else 0)):
            pen = ImageDraw.Draw(canvas)
            if corners := corners_of(shape, x, y, r):
                pen.polygon(corners, fill=fill)
            else:
                pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    return picture, mask


def write_pictures(root):
    """ROOT/drawn/val.jsonl and its pictures and masks."""
    folder = Path(root) / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (size, ground, text, answer, things) in enumerate(PICTURES):
        picture, mask = draw(size, ground, things, answer)
        picture.save(folder / f"{n}.png")
        mask.save(folder / f"{n}_mask.png")
        rows, columns = np.where(np.asarray(mask) > 0)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        lines.append({"image": f"{n}.png", "text": text, "mask": f"{n}_mask.png", "box": box})
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ask(root, checkpoint):
    """evaluate.py's answers, one line for each picture."""
    predictions = Path(root) / "predictions.jsonl"
    predictions.unlink(missing_ok=True)
    script = Path(__file__).resolve().parents[2] / "evaluate.py"
    subprocess.run([sys.executable, script, "--preset", "tiny", "--checkpoint", checkpoint,
                    "--data", root, "--datasets", "drawn", "--splits", "val",
                    "--predictions", predictions], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in predictions.read_text().splitlines()]
    ious = [record["intersection"] / max(1, record["union"]) for record in records]
    for record, iou in zip(records, ious):
        print(f"mask IoU {iou:.2f}, box IoU {record['box_iou']:.2f}: {record['text']!r}\n  "
              + record["answer"].split("</think>")[0].replace("<think>", "").strip())
    print(f"right: {sum(iou > RIGHT for iou in ious)} of {len(ious)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder to write to")
    parser.add_argument("--checkpoint", help="a finished run to ask")
    args = parser.parse_args()
    write_pictures(args.root)
    if args.checkpoint:
        ask(args.root, args.checkpoint)


if __name__ == "__main__":
    main()
