"""The shapes world: coloured shapes, expressions that name exactly one of them, exact masks.

    python tests/tiny/world.py runs/shapes

It is written in REFER's layout, so that RefCOCO's loader reads it (data.read_refcoco).

A box is not enough here. Bars cross in one and the same box, a circle lies on a square of its own
width, a disc in a ring, one thing hides part of another. The truth is what is visible.

An expression names a thing by one or more steps (see `expressions`), and its kind is kept:

    attribute   the red circle                              one look
    position    the leftmost circle                         compare
    size        the largest red shape                       compare widths
    relation    the circle left of the red square           find another thing first
    chain       the circle next to the largest square       two steps, one after the other

Guessing must not pay. In a relation at least one more thing fits the noun than the answer and the
thing named, in a chain at least one more than the answer and both things on the way; and of the
expressions that taking the outermost thing in their direction would solve as well, many are passed
over.

Frames: things, masks and boxes are in pixels of the picture, (x1, y1, x2, y2) with the right and
lower edges outside. A picture has any size, 96 to 512 pixels in the mean of both sides, so lengths
are also given in *units*: the picture counts 160 x 160 of them if it is square, and the same area
if it is not.
"""
import argparse
import colorsys
import json
import math
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

UNITS = 160                                  # a square picture's side
COLORS = {"red": 0, "yellow": 56, "green": 120, "blue": 228}                  # hues, in degrees
SHAPES = ["circle", "square", "triangle", "diamond", "ring", "bar"]
DIRECTIONS = ["left of", "right of", "above", "below"]
RELATIONS = [*DIRECTIONS, "next to"]
POSITIONS = {"leftmost": ("x", 1), "rightmost": ("x", -1),
             "topmost": ("y", 1), "bottommost": ("y", -1)}
SIZES = {"smallest": ("width", 1), "largest": ("width", -1)}
KINDS = {"attribute": 2, "position": 2, "size": 2, "relation": 3, "chain": 4}    # and their weights
LAYOUTS = ["apart", "crosses", "nests", "hides"]
MOST = 6                                     # things in a picture, at most
SMALLEST = 13                                # half the side of one that stands alone, in units

# When a comparison counts. Closer ones are never asked for.
CLEAR_PLACE = 10                             # units between the first and the second
CLEAR_WIDTH = 1.25                           # times as wide
CLEAR_ANGLE = 1.25                           # times as far along one axis as along the other
CLEAR_NEAR = 1.5                             # times as far away
APART = 12                                   # units between any two that are compared
COMPARED = 4                                 # things, at most


# --------------------------------------------------------------------------------------------------
# Things and pictures

def shape_mask(thing, size):
    """One whole shape, in a picture of size (width, height) -> (height, width) bool.

    Drawn at twice the size and averaged. A thing has a centre x, y and a half side r, in pixels."""
    canvas = Image.new("L", (2 * size[0], 2 * size[1]))
    draw = ImageDraw.Draw(canvas)
    x, y, r = 2 * thing["x"], 2 * thing["y"], 2 * thing["r"]
    whole = [x - r, y - r, x + r, y + r]
    if thing["shape"] in ("circle", "ring"):
        draw.ellipse(whole, fill=255)
    if thing["shape"] == "ring":
        hole = r * (1 - thing["thickness"])
        draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=0)
    if thing["shape"] in ("square", "triangle", "diamond", "bar"):
        corners = shape_corners(thing["shape"], thing["turn"], thing["thickness"])
        draw.polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=255)
    return np.asarray(canvas.resize(size, Image.BOX)) > 127


def shape_corners(shape, turn, thickness):
    """Corners of a shape in the square from (-1, -1) to (1, 1). A bar runs from corner to corner:
    turn 1 falls from the upper left to the lower right, turn -1 rises."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    t = thickness
    return [(-1, -turn), (t - 1, -turn), (1, turn * (1 - t)), (1, turn), (1 - t, turn),
            (-1, turn * (t - 1))]


def new_thing(rng, x, y, r, color=None, shape=None):
    """A thing in units. `turn` matters to bars alone, `thickness` to bars and rings."""
    shape = shape or rng.choice(SHAPES)
    thickness = rng.uniform(0.45, 0.7) if shape == "bar" else rng.uniform(0.4, 0.55)
    return {"x": x, "y": y, "r": r, "color": color or rng.choice(list(COLORS)), "shape": shape,
            "turn": rng.choice([-1, 1]), "thickness": thickness, "layout": "apart"}


def new_pair(rng, layout, x, y, r, palette):
    """Two things of different colours in one place, the lower one first."""
    colors = rng.sample(list(COLORS), 2)
    if layout == "crosses":
        pair = [new_thing(rng, x, y, r, color, "bar") for color in colors]
        pair[1]["turn"] = -pair[0]["turn"]
        pair[1]["thickness"] = pair[0]["thickness"]
    elif layout == "nests" and rng.random() < 0.5:               # inscribed: the box is the same
        inner = rng.choice(["circle", "diamond", "triangle"])
        pair = [new_thing(rng, x, y, r, colors[0], "square"),
                new_thing(rng, x, y, r, colors[1], inner)]
    elif layout == "nests":                                      # in the hole of a ring
        ring = {**new_thing(rng, x, y, r, colors[0], "ring"), "thickness": 0.35}
        inner = max(9, r * 0.65 * rng.uniform(0.75, 1.0))
        pair = [ring, new_thing(rng, x, y, inner, colors[1], "circle")]
    else:                                                        # one hides a part of the other
        angle, away = rng.uniform(0, 2 * math.pi), r * rng.uniform(0.9, 1.3)
        pair = [new_thing(rng, x, y, r, colors[0], rng.choice(palette)),
                new_thing(rng, x + away * math.cos(angle), y + away * math.sin(angle),
                          r * rng.uniform(0.7, 1.0), colors[1], rng.choice(palette))]
    for thing in pair:
        thing["layout"] = layout
    return pair


def reach(things):
    """The square that encloses some things: centre and half side, in units."""
    left, right = min(t["x"] - t["r"] for t in things), max(t["x"] + t["r"] for t in things)
    top, bottom = min(t["y"] - t["r"] for t in things), max(t["y"] + t["r"] for t in things)
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2


def place_things(rng, width, height, count):
    """`count` things in a picture of width x height units; no two touch but those of a pair.

    The picture draws from a few shapes, so that the noun alone seldom decides."""
    palette = rng.sample(SHAPES, rng.choice([1, 2, 2, 3, 3, 4]))
    largest = {1: 42, 2: 40, 3: 34, 4: 29, 5: 26, 6: 23}[count]
    groups, tries = [], 0
    while sum(map(len, groups)) < count and tries < 300:
        tries += 1
        r = rng.uniform(max(SMALLEST, 0.45 * largest), largest) * (1 if tries < 100 else 0.8)
        r = max(SMALLEST, r)
        x, y = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
        group = [new_thing(rng, x, y, r, shape=rng.choice(palette))]
        if count - sum(map(len, groups)) >= 2 and rng.random() < 0.3 and r >= 16:
            group = new_pair(rng, rng.choice(LAYOUTS[1:]), x, y, r, palette)
        x, y, r = reach(group)
        inside = r < x < width - r and r < y < height - r
        others = map(reach, groups)
        free = all(max(abs(x - ox), abs(y - oy)) >= r + other + 3 for ox, oy, other in others)
        if inside and free:
            groups.append(group)
    rng.shuffle(groups)
    return [thing for group in groups for thing in group]


def draw_color(rng, name):
    """A colour that a person would call so -> RGB. Dark yellow is no yellow."""
    spread = {"red": 8, "yellow": 7}.get(name, 12)
    hue = (COLORS[name] + rng.uniform(-spread, spread)) % 360 / 360
    value = rng.uniform(0.85, 1.0) if name == "yellow" else rng.uniform(0.5, 1.0)
    pure = rng.random() < 0.4
    saturation = 1.0 if pure else rng.uniform(0.65, 1.0)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def draw_size(rng):
    """A picture's (width, height) in pixels: half of them square, the others up to 2 : 1."""
    side = rng.choice([rng.uniform(96, 180), *[rng.uniform(120, 180)] * 2, rng.uniform(160, 512)])
    aspect = 1.0 if rng.random() < 0.5 else math.exp(rng.uniform(-math.log(2), math.log(2)))
    return round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))


def draw_scene(rng, count=None):
    """One picture -> (height, width, 3) uint8, and its things with mask and box of what is visible.

    count: how many things; None draws from 2 to MOST. Fewer may find room."""
    size = draw_size(rng)
    scale = math.sqrt(size[0] * size[1]) / UNITS                 # pixels per unit
    count = count or rng.choice([2, 3, 4, 4, 5, 5, 5, 6])
    things = place_things(rng, size[0] / scale, size[1] / scale, count)
    for thing in things:
        for name in ("x", "y", "r"):
            thing[name] *= scale
    noise = np.random.default_rng(rng.randrange(2 ** 31))
    picture = np.empty((size[1], size[0], 3), np.float32)
    grounds = [0, 255, rng.uniform(0, 255), rng.uniform(0, 255), rng.uniform(60, 110)]
    picture[:] = rng.choice(grounds)
    masks = [shape_mask(thing, size) for thing in things]
    for i, thing in enumerate(things):
        picture[masks[i]] = draw_color(rng, thing["color"])
        hidden = np.zeros_like(masks[i])
        for later in masks[i + 1:]:
            hidden |= later
        thing["mask"] = masks[i] & ~hidden
        measure(thing, masks[i].sum(), scale)
    if rng.random() < 0.7:                                       # grain, alike in all channels
        strength = rng.uniform(2, 8)
        picture += strength * noise.standard_normal((size[1], size[0], 1), np.float32)
    return picture.clip(0, 255).astype(np.uint8), things


def measure(thing, whole, scale):
    """Write into a thing what is seen of it: box in pixels; centre, width in units; its share."""
    rows, columns = np.where(thing["mask"].any(1))[0], np.where(thing["mask"].any(0))[0]
    thing["visible"] = float(thing["mask"].sum() / max(1, whole))
    if not len(rows):
        thing["box"] = (0, 0, 0, 0)
        return
    x1, y1, x2, y2 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    thing["box"] = (x1, y1, x2, y2)
    thing["at"] = {"x": (x1 + x2) / 2 / scale, "y": (y1 + y2) / 2 / scale,
                   "width": (x2 - x1) / scale}


def make_scene(rng, count=None):
    """draw_scene, again until a third of everything is visible and something can be asked."""
    while True:
        picture, things = draw_scene(rng, count)
        if len(things) >= 2 and all(thing["visible"] > 0.34 for thing in things):
            found = expressions(things)
            if found:
                return picture, things, found


# --------------------------------------------------------------------------------------------------
# Expressions

def full_name(thing):
    return f"{thing['color']} {thing['shape']}"


def groups_of(things):
    """{noun: the things it fits}: "shape", "circle", "red shape", "red circle"."""
    groups = {"shape": list(range(len(things)))}
    for i, thing in enumerate(things):
        for noun in (thing["shape"], f"{thing['color']} shape", full_name(thing)):
            groups.setdefault(noun, []).append(i)
    return groups


def distance(a, b):
    """Between the centres of two things, in units."""
    return math.hypot(a["at"]["x"] - b["at"]["x"], a["at"]["y"] - b["at"]["y"])


def direction(anchor, thing):
    """Where a thing lies from another: one of DIRECTIONS, or None where it is not clear."""
    dx = thing["at"]["x"] - anchor["at"]["x"]
    dy = thing["at"]["y"] - anchor["at"]["y"]
    if max(abs(dx), abs(dy)) < CLEAR_PLACE:
        return None
    if abs(dx) >= CLEAR_ANGLE * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= CLEAR_ANGLE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def comparable(things, some):
    """Few enough, and no two in one place, where words could hardly part them?"""
    places = [(things[i], things[j]) for n, i in enumerate(some) for j in some[:n]]
    return len(some) <= COMPARED and all(distance(a, b) >= APART for a, b in places)


def find_extreme(things, among, word):
    """The one of `among` that is the leftmost, ..., largest; None where it is not clear."""
    if len(among) < 2 or not comparable(things, among):
        return None
    name, sign = {**POSITIONS, **SIZES}[word]
    ranked = sorted(among, key=lambda i: sign * things[i]["at"][name])
    first, second = (things[i]["at"][name] for i in ranked[:2])
    if word in SIZES:
        whole = all(things[i]["visible"] > 0.99 or things[i]["layout"] == "crosses" for i in among)
        clear = whole and max(first, second) >= CLEAR_WIDTH * min(first, second)
    else:
        clear = abs(first - second) >= CLEAR_PLACE
    return ranked[0] if clear else None


def find_related(things, among, word, anchor):
    """The one of `among` that lies so from the anchor; None where it is not clear."""
    if not comparable(things, among):
        return None
    if min(distance(things[i], things[anchor]) for i in among) < APART:
        return None
    if word == "next to":
        ranked = sorted(among, key=lambda i: distance(things[i], things[anchor]))
        if len(ranked) < 2:
            return None
        first, second = (distance(things[i], things[anchor]) for i in ranked[:2])
        clear = second >= CLEAR_NEAR * first and second - first >= CLEAR_PLACE
        return ranked[0] if clear else None
    where = [direction(things[anchor], things[i]) for i in among]
    if None in where or where.count(word) != 1:
        return None
    return among[where.index(word)]


def is_outermost(things, among, word, answer):
    """Would taking the outermost thing in this direction do as well?"""
    if word == "next to":
        return False
    name, sign = POSITIONS[dict(zip(DIRECTIONS, POSITIONS))[word]]
    return answer == min(among, key=lambda i: sign * things[i]["at"][name])


def expressions(things):
    """Every expression that names exactly one thing; those of two steps are left out (see chains).

    -> list of {"kind", "text", "thing": index of the answer, "steps"}. A step is
        {"do": "name", "thing"}                                  the red square
        {"do": "extreme", "noun", "word", "among", "thing"}      the leftmost circle, of `among`
        {"do": "relation", "noun", "word", "among", "anchor", "thing"}
    """
    groups, found = groups_of(things), []
    for noun, members in groups.items():
        if len(members) == 1 and noun != "shape":
            step = {"do": "name", "noun": noun, "thing": members[0]}
            found.append({"kind": "attribute", "text": f"the {noun}", "steps": [step]})
        for word in (*POSITIONS, *SIZES):
            answer = find_extreme(things, members, word)
            if answer is not None:
                step = {"do": "extreme", "noun": noun, "word": word, "among": members,
                        "thing": answer}
                found.append({"kind": "size" if word in SIZES else "position",
                              "text": f"the {word} {noun}", "steps": [step]})
    for inner in [f for f in found if f["kind"] == "attribute" and f["text"] == "the "
                  + full_name(things[f["steps"][0]["thing"]])]:
        found += [{**outer, "kind": "relation"} for outer in related(things, groups, inner, 2)]
    return [{**f, "thing": f["steps"][-1]["thing"]} for f in found]


def related(things, groups, inner, fitting):
    """Expressions one relation longer than `inner`, whose answer is their anchor. At least
    `fitting` things fit the noun, those that inner names or passes not counted."""
    anchor, passed = inner["steps"][-1]["thing"], {step["thing"] for step in inner["steps"]}
    found = []
    for noun, members in groups.items():
        among = [i for i in members if i != anchor]
        if len(set(among) - passed) < fitting:
            continue
        for word in RELATIONS:
            answer = find_related(things, among, word, anchor)
            if answer is None or answer in passed:
                continue
            step = {"do": "relation", "noun": noun, "word": word, "among": among, "anchor": anchor,
                    "thing": answer}
            found.append({"text": f"the {noun} {word} {inner['text']}",
                          "steps": [*inner["steps"], step],
                          "outermost": is_outermost(things, among, word, answer)})
    return found


def chains(things, found, rng, tries=6):
    """Some chains: a relation to what a position, a size or another relation names."""
    groups, made = groups_of(things), []
    inner = [f for f in found if f["kind"] in ("position", "size", "relation")]
    for first in rng.sample(inner, min(tries, len(inner))):
        made += [{**f, "kind": "chain", "thing": f["steps"][-1]["thing"]}
                 for f in related(things, groups, first, 2)]
    return made


def pick_expression(things, found, rng, thing=None):
    """A kind first, then one of its expressions, so that the many relations do not crowd out all.

    thing: the answer must be this one. None where nothing names it."""
    found = found + chains(things, found, rng)
    if thing is not None:
        found = [f for f in found if f["thing"] == thing]
    kinds = [kind for kind in KINDS if any(f["kind"] == kind for f in found)]
    if not kinds:
        return None
    kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
    found = [f for f in found if f["kind"] == kind]
    if kind in ("relation", "chain"):
        found = pick_relation(found, rng)
    shared = [f for f in found if things[f["thing"]]["layout"] != "apart"]
    if shared and rng.random() < 0.4:                            # they are wanted, and few
        found = shared
    return rng.choice(found)


def pick_relation(found, rng):
    """Directions and "next to" by turns; where there is one, an expression whose noun fits three
    things or more, and that the outermost thing would not answer."""
    turn = rng.random() < 0.45
    found = [f for f in found if (f["steps"][-1]["word"] != "next to") == turn] or found
    found = [f for f in found if not f["outermost"]] or found
    return [f for f in found if len(f["steps"][-1]["among"]) > 2] or found


# --------------------------------------------------------------------------------------------------
# The world on disk

# Pictures. testA has two or three things, testB six
SPLITS = {"train": 4000, "val": 700, "testA": 300, "testB": 300}


def scenes(split, count, seed=7):
    """-> generator of a split's pictures: (H, W, 3) uint8, its things, which of them is meant, one
    to three expressions of it."""
    rng = random.Random(f"{seed}/{split}")
    for _ in range(count):
        picked = None
        while picked is None:
            wanted = {"testA": rng.choice([2, 3]), "testB": 6}.get(split)
            picture, things, found = make_scene(rng, wanted)
            picked = pick_expression(things, found, rng)
        texts = {picked["text"]: picked}
        for _ in range(4):
            more = pick_expression(things, found, rng, picked["thing"])
            if more and len(texts) < 3:
                texts.setdefault(more["text"], more)
        yield picture, things, picked["thing"], list(texts.values())


def is_written(root):
    """Is a shapes world there? Other data in its place is an error."""
    if not (root / "refer_seg").exists():
        return False
    if not (root / "refer_seg/shapes").exists():
        raise LensError(f"{root / 'refer_seg'} holds other data: give the shapes world a folder "
                        f"of its own")
    return True


def write_shapes_world(root, seed=7, splits=SPLITS):
    """Write ROOT/refer_seg/shapes and its pictures in REFER's layout; a world that is there stays.
    Built beside its place and renamed, so that what exists is whole; the same seed writes the same
    files."""
    root, building = Path(root), Path(root) / f"refer_seg.building.{os.getpid()}"
    if is_written(root):
        return
    pictures = building / "images/mscoco/images/train2014"
    pictures.mkdir(parents=True)
    (building / "shapes").mkdir()
    images, annotations, refs = [], [], []
    for split, count in splits.items():
        for picture, things, chosen, picked in scenes(split, count, seed):
            number = len(images) + 1
            name = f"COCO_train2014_{number:012d}.jpg"
            Image.fromarray(picture).save(pictures / name, quality=95)
            images.append({"id": number, "file_name": name, "height": picture.shape[0],
                           "width": picture.shape[1]})
            annotations.append(annotation_of(things[chosen], number))
            refs.append(ref_of(picked, things[chosen], number, split))
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (building / "shapes/instances.json").write_text(json.dumps(instances))
    (building / "shapes/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    try:
        building.rename(root / "refer_seg")
    except OSError:                                              # another process was first
        shutil.rmtree(building)
        if not is_written(root):
            raise


def annotation_of(thing, number):
    """COCO's annotation of the one object of picture `number`; "layout" is ours."""
    x1, y1, x2, y2 = thing["box"]
    rle = coco_mask.encode(np.asfortranarray(thing["mask"].astype(np.uint8)))
    return {"id": number, "image_id": number, "category_id": SHAPES.index(thing["shape"]) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(thing["mask"].sum()), "iscrowd": 0,
            "layout": thing["layout"],
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


def ref_of(picked, thing, number, split):
    """REFER's record of that object and its expressions; a sentence's "kind" is ours."""
    sentences = [{"sent_id": 10 * number + n, "sent": f["text"], "raw": f["text"],
                  "tokens": f["text"].split(), "kind": f["kind"]} for n, f in enumerate(picked)]
    return {"ref_id": number, "ann_id": number, "image_id": number, "split": split,
            "category_id": SHAPES.index(thing["shape"]) + 1,
            "sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences],
            "file_name": f"COCO_train2014_{number:012d}_{number}.jpg"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python tests/tiny/world.py",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER")
    try:
        write_shapes_world(parser.parse_args().folder)
    except LensError as error:
        sys.exit(str(error))
