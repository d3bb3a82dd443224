"""Fourteen images as a person would draw them to try the model, each with an expression. The last
four ask for several things at once.

    python tests/tiny/drawn.py runs/drawn                              # write the images
    python tests/tiny/drawn.py runs/drawn --checkpoint runs/tiny/rl    # also segment them
    python tests/tiny/drawn.py runs/drawn --checkpoint runs/tiny/rl > docs/evidence/drawn.txt

No model was trained on them: pure colours, sharp edges, white, grey or black backgrounds, 96 to 512
pixels a side. They are written as a dataset of one's own (docs/data.md), which evaluate.py reads
like any other. One counts as right if the IoU of its mask is above 0.7.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from world import shape_corners

ROOT = Path(__file__).resolve().parents[2]
RIGHT = 0.7
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 220, 0)
WHITE, GREY, BLACK = (255, 255, 255), (128, 128, 128), (0, 0, 0)

# (width, height), background, expression, which of the things it means (one or several), and the
# things, rearmost first: shape, colour, x and y of the centre, half side. The last three are
# hundredths of the width.
DRAWINGS = [
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
    ((256, 256), WHITE, "the red circles", (0, 1),
     [("circle", RED, 22, 25, 14), ("circle", RED, 75, 74, 15), ("square", BLUE, 50, 48, 10)]),
    ((400, 280), GREY, "the squares", (0, 2),
     [("square", GREEN, 16, 20, 10), ("circle", YELLOW, 48, 34, 11), ("square", RED, 82, 50, 11)]),
    ((200, 200), BLACK, "the blue shapes", (0, 2, 3),
     [("circle", BLUE, 20, 22, 13), ("triangle", GREEN, 52, 50, 13), ("square", BLUE, 80, 22, 12),
      ("diamond", BLUE, 50, 84, 13)]),
    ((300, 300), WHITE, "the circles left of the red square", (0, 1),
     [("circle", GREEN, 20, 38, 11), ("circle", YELLOW, 26, 68, 10), ("square", RED, 58, 52, 10),
      ("circle", BLUE, 86, 50, 10)]),
]


def draw(size, background, things, meant):
    """-> the image, and the visible pixels of what is meant, white on black."""
    meant = (meant,) if isinstance(meant, int) else meant
    image, mask = Image.new("RGB", size, background), Image.new("L", size, 0)
    for n, (shape, color, x, y, r) in enumerate(things):
        x, y, r = (value * size[0] / 100 for value in (x, y, r))
        for canvas, fill in ((image, color), (mask, 255 if n in meant else 0)):
            if shape == "circle":
                ImageDraw.Draw(canvas).ellipse([x - r, y - r, x + r, y + r], fill=fill)
            else:
                corners = shape_corners(shape, turn=-1 if "rising" in shape else 1, thickness=0.55)
                corners = [(x + r * dx, y + r * dy) for dx, dy in corners]
                ImageDraw.Draw(canvas).polygon(corners, fill=fill)
    return image, mask


def write_drawings(root):
    """Write ROOT/drawn/val.jsonl, its images and masks."""
    folder, lines = Path(root) / "drawn", []
    folder.mkdir(parents=True, exist_ok=True)
    for n, (size, background, expression, meant, things) in enumerate(DRAWINGS):
        image, mask = draw(size, background, things, meant)
        image.save(folder / f"{n}.png")
        mask.save(folder / f"{n}_mask.png")
        lines.append({"image": f"{n}.png", "text": expression, "mask": f"{n}_mask.png",
                      "box": mask.getbbox()})
    (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def segment(root, checkpoint):
    """Let evaluate.py segment them, and print two lines for each."""
    predictions = Path(root) / "predictions.jsonl"
    subprocess.run([sys.executable, ROOT / "evaluate.py", "--preset", "tiny", "--checkpoint",
                    checkpoint, "--data", root, "--datasets", "drawn", "--splits", "val",
                    "--predictions", predictions], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    ious = [row["intersection"] / max(1, row["union"]) for row in rows]
    for row, iou in zip(rows, ious):
        reasoning = row["completion"].split("</think>")[0].replace("<think>", "").strip()
        print(f"mask IoU {iou:.2f}, box IoU {row['box_iou']:.2f}: {row['expression']!r}\n"
              f"  {reasoning}")
    print(f"right: {sum(iou > RIGHT for iou in ious)} of {len(ious)}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder to write to")
    parser.add_argument("--checkpoint", help="a finished run that segments them")
    args = parser.parse_args(argv)
    write_drawings(args.root)
    if args.checkpoint:
        segment(args.root, args.checkpoint)


if __name__ == "__main__":
    main()
