"""The shapes world: pictures of coloured shapes, expressions that name exactly one of them, exact
masks and boxes. It is written in REFER's layout, so that RefCOCO's loader reads it
(data.read_refcoco):

    python tests/tiny/world.py runs/shapes
"""
import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import LensError

SIDE = 128
COLORS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230),
          "yellow": (235, 215, 40)}
SHAPES = ["circle", "square", "triangle", "diamond"]
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "center", "right"]
EXTREMES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1),
            "bottommost": ("y", -1),
            "smallest": ("r", 1), "largest": ("r", -1)}
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
# a comparison counts only when it is clear by so many pixels
MARGIN = {"x": 10, "y": 10, "r": 4}


def shape_mask(thing):
    """One shape -> (SIDE, SIDE) bool, drawn at twice the size and averaged."""
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    x, y, r = 2 * thing["x"], 2 * thing["y"], 2 * thing["r"]
    corners = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
               "triangle": [(0, -1), (1, 1), (-1, 1)],
               "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)]}.get(thing["shape"])
    if corners is None:
        ImageDraw.Draw(canvas).ellipse([x - r, y - r, x + r, y + r], fill=255)
    else:
        ImageDraw.Draw(canvas).polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=255)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.BOX)) > 127


def draw_scene(rng):
    """Two to four shapes that do not touch -> (SIDE, SIDE, 3) uint8 and a list of things with mask
    and box."""
    things, count = [], rng.randint(2, 4)
    # four large ones may leave no room: then three do
    for _ in range(200):
        if len(things) == count:
            break
        r = rng.uniform(12, 24)
        thing = {"r": r, "x": rng.uniform(r + 1, SIDE - r - 1),
                 "y": rng.uniform(r + 1, SIDE - r - 1),
                 "color": rng.choice(list(COLORS)), "shape": rng.choice(SHAPES)}
        if all(max(abs(thing["x"] - o["x"]), abs(thing["y"] - o["y"])) >= r + o["r"] + 2
               for o in things):
            things.append(thing)
    noise = np.random.default_rng(rng.randrange(2 ** 31))
    picture = rng.uniform(60, 110) + noise.normal(0, 4, (SIDE, SIDE, 1)).repeat(3, 2)
    for thing in things:
        thing["mask"] = mask = shape_mask(thing)
        rows, columns = np.where(mask)
        thing["box"] = (int(columns.min()), int(rows.min()), int(columns.max()) + 1,
                        int(rows.max()) + 1)
        color = np.array(COLORS[thing["color"]]) + noise.normal(0, 8, 3)
        picture[mask] = color + noise.normal(0, 4, (int(mask.sum()), 1))
    return picture.clip(0, 255).astype(np.uint8), things


def full_name(thing):
    return f"{thing['color']} {thing['shape']}"


def place(thing):
    return f"{ROWS[int(thing['y'] * 3 / SIDE)]} {COLUMNS[int(thing['x'] * 3 / SIDE)]}"


def describe(things):
    """Every expression that names exactly one thing: (kind, index, expression, true reasoning)."""
    found = []
    names = [full_name(thing) for thing in things]
    for i, name in enumerate(names):
        if names.count(name) == 1:
            found.append(("attribute", i, f"the {name}",
                          f"The {name} is at the {place(things[i])}."))
    # "shape" alone, a kind of shape, "red shape", ...
    groups = {"shape": range(len(things))}
    groups |= {s: [i for i, t in enumerate(things) if t["shape"] == s] for s in SHAPES}
    groups |= {f"{c} shape": [i for i, t in enumerate(things) if t["color"] == c] for c in COLORS}
    groups |= {name: [i for i, n in enumerate(names) if n == name] for name in sorted(set(names))}
    for group, members in groups.items():
        for word, (axis, sign) in EXTREMES.items():
            ranked = sorted(members, key=lambda i: sign * things[i][axis])
            values = [things[i][axis] for i in ranked[:2]]
            if len(ranked) > 1 and abs(values[0] - values[1]) >= MARGIN[axis]:
                i = ranked[0]
                found.append(("size" if axis == "r" else "position", i, f"the {word} {group}",
                              f"The {word} {group} is the {names[i]} at the {place(things[i])}."))
        for j, anchor in enumerate(names):
            others = [i for i in members if i != j]
            if names.count(anchor) > 1 or len(members) < 2:
                continue
            for word, (axis, sign) in RELATIONS.items():
                ahead = [i for i in others if sign * (things[i][axis] - things[j][axis]) >= 0]
                i = ahead[0] if len(ahead) == 1 else j
                if abs(things[i][axis] - things[j][axis]) >= MARGIN[axis]:
                    found.append(("relation", i, f"the {group} {word} the {anchor}",
                                  f"The {anchor} is at the {place(things[j])}. "
                                  f"The {group} {word} it is the {names[i]} "
                                  f"at the {place(things[i])}."))
    return found


def pick_expression(found, rng):
    """A kind first, then one of its expressions, so that the many relations do not crowd out the
    rest."""
    kinds = sorted({kind for kind, *_ in found})
    kind = rng.choices(kinds,
                       [{"attribute": 3, "position": 2, "size": 2, "relation": 2}[k]
                        for k in kinds])[0]
    return rng.choice([f for f in found if f[0] == kind])


# pictures; testA has 2 things, testB 4
SHAPES_SPLITS = {"train": 4000, "val": 700, "testA": 300, "testB": 300}


def scenes(split, count, seed=7):
    """-> generator of a split's pictures: (H, W, 3) uint8, its things, which of them is meant, its
    expressions."""
    rng = random.Random(f"{seed}/{split}")
    for _ in range(count):
        picture, things = draw_scene(rng)
        while {"testA": 2, "testB": 4}.get(split,
                                           len(things)) != len(things) or not describe(things):
            picture, things = draw_scene(rng)
        found = describe(things)
        # one object of the picture, up to three expressions
        chosen = pick_expression(found, rng)[1]
        own, texts = [f for f in found if f[1] == chosen], []
        while len(texts) < min(3, len(own)):
            text = pick_expression(own, rng)[2]
            texts += [text] if text not in texts else []
        yield picture, things, chosen, texts


def write_shapes_world(root, seed=7, splits=SHAPES_SPLITS):
    """Write ROOT/refer_seg/shapes and its pictures in REFER's layout. Built beside its place and
    renamed, so that what exists is whole; the same seed writes the same files."""
    root, building = Path(root), Path(root) / f"refer_seg.building.{os.getpid()}"
    pictures = building / "images/mscoco/images/train2014"
    pictures.mkdir(parents=True)
    (building / "shapes").mkdir()
    images, annotations, refs, sentence = [], [], [], 0
    for split, count in splits.items():
        for picture, things, chosen, texts in scenes(split, count, seed):
            image_id = len(images) + 1
            Image.fromarray(picture).save(pictures / f"COCO_train2014_{image_id:012d}.jpg",
                                          quality=95)
            images.append({"id": image_id, "file_name": f"COCO_train2014_{image_id:012d}.jpg",
                           "height": SIDE,
                           "width": SIDE})
            thing, ann_id = things[chosen], len(annotations) + 1
            rle = coco_mask.encode(np.asfortranarray(thing["mask"].astype(np.uint8)))
            x1, y1, x2, y2 = thing["box"]
            annotations.append({"id": ann_id, "image_id": image_id,
                                "category_id": SHAPES.index(thing["shape"]) + 1,
                                "bbox": [x1, y1, x2 - x1, y2 - y1],
                                "area": int(thing["mask"].sum()), "iscrowd": 0,
                                "segmentation": {"size": rle["size"],
                                                 "counts": rle["counts"].decode()}})
            sentences = [{"sent_id": sentence + n, "sent": t, "raw": t, "tokens": t.split()}
                         for n, t in enumerate(texts)]
            sentence += len(texts)
            refs.append({"ref_id": ann_id, "ann_id": ann_id, "image_id": image_id, "split": split,
                         "sentences": sentences,
                         "category_id": SHAPES.index(thing["shape"]) + 1,
                         "sent_ids": [s["sent_id"] for s in sentences],
                         "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"})
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    (building / "shapes/instances.json").write_text(json.dumps({"images": images,
                                                                "annotations": annotations,
                                                                "categories": categories}))
    (building / "shapes/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    try:
        building.rename(root / "refer_seg")
    except OSError:                                               # another process was first
        shutil.rmtree(building)
        if not (root / "refer_seg/shapes").exists():
            raise LensError(f"{root / 'refer_seg'} holds other data: give the shapes world a "
                            f"folder of its own") from None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny/world.py FOLDER")
    try:
        write_shapes_world(sys.argv[1])
    except LensError as error:
        sys.exit(str(error))
