"""The shapes world: images of coloured shapes, and expressions that name one of them or several.

    python tests/tiny/world.py runs/shapes

writes it in REFER's layout, so that data.read_refcoco reads it like RefCOCO. It needs a minute of
one core and 93 MB. The same seed writes the same bytes.

A box is often not enough to tell what is meant: bars cross in one and the same box, a circle lies
on a square of its own width, a circle lies in a ring, one thing hides part of another. The mask and
the box of a thing are those of its visible part.

An expression needs one step of reasoning or more. This is its kind:

    attribute   the red circle                              find it
    position    the leftmost circle                         compare places
    size        the largest red shape                       compare widths
    relation    the circle left of the red square           find another thing first
    chain       the circle next to the largest square       two such steps, one after the other
    several     the red shapes; the circles left of the bar find every one of them

The mask of several things is that of all of them together, and their box encloses them. It often
encloses something else too.

A guess should not be enough. At least two things fit the noun of a relation or a chain, without
those that were found on the way. And if the outermost thing in the direction would be the right
one too, we prefer another expression.

Frames. Things, masks and boxes are in pixels of the image; a box is (x1, y1, x2, y2) and its right
and lower edges lie outside. An image has between 96 and 512 pixels a side (the geometric mean of
both). Thresholds are given in *units* instead, because they must not depend on the image's size: a
square image has 160 x 160 units, any other image has as many in all.
"""
import argparse
import colorsys
import json
import math
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

SPLITS = {"train": 4000, "val": 700, "testA": 300, "testB": 300}          # images
COLORS = {"red": 0, "yellow": 56, "green": 120, "blue": 228}              # hues in degrees
SHAPES = ["circle", "square", "triangle", "diamond", "ring", "bar"]
# how often each kind is drawn
KINDS = {"attribute": 2, "position": 2, "size": 2, "relation": 3, "chain": 4, "several": 4}
LAYOUTS = ["apart", "crosses", "nests", "hides"]
PAIRS = {"crosses": 2, "nests": 2, "hides": 1}       # how two things share a place: weights
DIRECTIONS = ["left of", "right of", "above", "below"]
RELATIONS = [*DIRECTIONS, "next to"]
POSITIONS = {"leftmost": ("x", 1), "rightmost": ("x", -1),
             "topmost": ("y", 1), "bottommost": ("y", -1)}
SIZES = {"smallest": ("width", 1), "largest": ("width", -1)}
MOST = 6                     # things in an image
UNITS = 160                  # side of a square image
SMALLEST = 13                # half the side, in units, of a thing that stands alone
VISIBLE = 0.34               # share of every thing that must be visible

# An expression is only made if the comparison is clear.
CLEAR_PLACE = 10             # units between the first and the second
CLEAR_WIDTH = 1.25           # the wider one is so many times as wide
CLEAR_ANGLE = 1.25           # so many times as far along one axis as along the other
CLEAR_NEAR = 1.5             # the second is so many times as far away as the nearest
APART = 12                   # units between any two things that are compared
COMPARED = 4                 # things that are compared, at most


# --- Scenes: an image and its things --------------------------------------------------------------

def make_scene(rng, count=None):
    """One scene -> image (height, width, 3) uint8, its things, the expressions that name one.

    count: the number of things; None draws 2 to MOST. There may be fewer if they find no room."""
    while True:
        image, things = draw_scene(rng, count)
        if len(things) >= 2 and all(thing["visible"] > VISIBLE for thing in things):
            expressions = make_expressions(things)
            if expressions:
                return image, things, expressions


def draw_scene(rng, count=None):
    """An image and its things, the rearmost first. A thing is a dict:

    color, shape, layout, turn, thickness
    x, y, r     centre and half side of the whole thing, in pixels
    mask, box   of its visible part; visible is that part's share of the whole
    seen        {"x", "y", "width"} of its box, in units; what expressions compare
    """
    size = draw_size(rng)
    scale = math.sqrt(size[0] * size[1]) / UNITS                 # pixels per unit
    count = count or rng.choice([2, 3, 4, 4, 5, 5, 5, 6])
    things = place_things(rng, size[0] / scale, size[1] / scale, count)
    for thing in things:
        for name in ("x", "y", "r"):
            thing[name] *= scale
    noise = np.random.default_rng(rng.randrange(2 ** 31))
    backgrounds = [0, 255, rng.uniform(0, 255), rng.uniform(0, 255), rng.uniform(60, 110)]
    image = np.full((size[1], size[0], 3), rng.choice(backgrounds), np.float32)
    masks = [shape_mask(thing, size) for thing in things]
    for i, thing in enumerate(things):
        image[masks[i]] = draw_color(rng, thing["color"])
        mask = masks[i] & ~np.any(masks[i + 1:], axis=0)
        x1, y1, x2, y2 = box = enclosing_box(mask)
        thing.update(mask=mask, box=box, visible=float(mask.sum() / max(1, masks[i].sum())))
        thing["seen"] = {"x": (x1 + x2) / 2 / scale, "y": (y1 + y2) / 2 / scale,
                         "width": (x2 - x1) / scale}
    if rng.random() < 0.7:                                       # grain, the same in all channels
        strength = rng.uniform(2, 8)
        image += strength * noise.standard_normal((size[1], size[0], 1), np.float32)
    return image.clip(0, 255).astype(np.uint8), things


def draw_size(rng):
    """(width, height) of an image in pixels: half of them are square, the others up to 2 : 1."""
    side = rng.choice([rng.uniform(96, 180), *[rng.uniform(120, 180)] * 2, rng.uniform(160, 512)])
    aspect = 1.0 if rng.random() < 0.5 else math.exp(rng.uniform(-math.log(2), math.log(2)))
    return round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))


def draw_color(rng, name):
    """RGB of a colour that a person would call so. Dark yellow is not called yellow."""
    spread = {"red": 8, "yellow": 7}.get(name, 12)
    hue = (COLORS[name] + rng.uniform(-spread, spread)) % 360 / 360
    value = rng.uniform(0.85, 1.0) if name == "yellow" else rng.uniform(0.5, 1.0)
    saturation = 1.0 if rng.random() < 0.4 else rng.uniform(0.65, 1.0)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def place_things(rng, width, height, count):
    """`count` things in an image of width x height units. Only the two things of a pair touch.

    An image draws from a few shapes only, so that the noun alone is seldom enough."""
    shapes = rng.sample(SHAPES, rng.choice([1, 2, 2, 3, 3, 4]))
    largest = {1: 42, 2: 40, 3: 34, 4: 29, 5: 26, 6: 23}[count]
    clusters, tries = [], 0                                      # of one thing, or of a pair
    while sum(map(len, clusters)) < count and tries < 300:
        tries += 1
        r = rng.uniform(max(SMALLEST, 0.45 * largest), largest) * (1 if tries < 100 else 0.8)
        r = max(SMALLEST, r)
        x, y = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
        cluster = [new_thing(rng, x, y, r, shape=rng.choice(shapes))]
        if count - sum(map(len, clusters)) >= 2 and rng.random() < 0.5 and r >= 16:
            layout, = rng.choices(list(PAIRS), PAIRS.values())
            cluster = new_pair(rng, layout, x, y, r, shapes)
        x, y, r = enclosing_square(cluster)
        inside = r < x < width - r and r < y < height - r
        others = map(enclosing_square, clusters)
        free = all(max(abs(x - ox), abs(y - oy)) >= r + other + 3 for ox, oy, other in others)
        if inside and free:
            clusters.append(cluster)
    rng.shuffle(clusters)
    return [thing for cluster in clusters for thing in cluster]


def new_thing(rng, x, y, r, color=None, shape=None):
    """A thing in units. `turn` matters to bars only, `thickness` to bars and rings."""
    shape = shape or rng.choice(SHAPES)
    thickness = rng.uniform(0.45, 0.7) if shape == "bar" else rng.uniform(0.4, 0.55)
    return {"x": x, "y": y, "r": r, "color": color or rng.choice(list(COLORS)), "shape": shape,
            "turn": rng.choice([-1, 1]), "thickness": thickness, "layout": "apart"}


def new_pair(rng, layout, x, y, r, shapes):
    """Two things of different colours in one place, the rear one first."""
    colors = rng.sample(list(COLORS), 2)
    if layout == "crosses":
        pair = [new_thing(rng, x, y, r, color, "bar") for color in colors]
        pair[1]["turn"] = -pair[0]["turn"]
        pair[1]["thickness"] = pair[0]["thickness"]
    elif layout == "nests" and rng.random() < 0.5:               # inscribed, in the same box
        inner = rng.choice(["circle", "diamond", "triangle"])
        pair = [new_thing(rng, x, y, r, colors[0], "square"),
                new_thing(rng, x, y, r, colors[1], inner)]
    elif layout == "nests":                                      # in the hole of a ring
        ring = {**new_thing(rng, x, y, r, colors[0], "ring"), "thickness": 0.35}
        inner = max(9, r * 0.65 * rng.uniform(0.75, 1.0))
        pair = [ring, new_thing(rng, x, y, inner, colors[1], "circle")]
    else:                                                        # one hides a part of the other
        angle, away = rng.uniform(0, 2 * math.pi), r * rng.uniform(0.9, 1.3)
        pair = [new_thing(rng, x, y, r, colors[0], rng.choice(shapes)),
                new_thing(rng, x + away * math.cos(angle), y + away * math.sin(angle),
                          r * rng.uniform(0.7, 1.0), colors[1], rng.choice(shapes))]
    for thing in pair:
        thing["layout"] = layout
    return pair


def enclosing_square(things):
    """Centre and half side, in units, of a square that encloses some things."""
    left, right = min(t["x"] - t["r"] for t in things), max(t["x"] + t["r"] for t in things)
    top, bottom = min(t["y"] - t["r"] for t in things), max(t["y"] + t["r"] for t in things)
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / 2


def enclosing_box(mask):
    """The box of a mask; (0, 0, 0, 0) if the mask is empty."""
    return Image.fromarray(mask).getbbox() or (0, 0, 0, 0)


def shape_mask(thing, size):
    """The whole shape in an image of size (width, height) -> (height, width) bool.

    It is drawn at twice the size and averaged, so that its edge is exact to half a pixel."""
    canvas = Image.new("L", (2 * size[0], 2 * size[1]))
    draw = ImageDraw.Draw(canvas)
    x, y, r = 2 * thing["x"], 2 * thing["y"], 2 * thing["r"]
    if thing["shape"] in ("circle", "ring"):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=255)
        if thing["shape"] == "ring":
            hole = r * (1 - thing["thickness"])
            draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=0)
    else:
        corners = shape_corners(thing["shape"], thing["turn"], thing["thickness"])
        draw.polygon([(x + r * dx, y + r * dy) for dx, dy in corners], fill=255)
    return np.asarray(canvas.resize(size, Image.BOX)) > 127


def shape_corners(shape, turn, thickness):
    """Corners of a shape in the square from (-1, -1) to (1, 1). A bar runs from corner to corner:
    with turn 1 from the upper left to the lower right, with turn -1 from the lower left to the
    upper right."""
    if shape == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    t = thickness
    return [(-1, -turn), (t - 1, -turn), (1, turn * (1 - t)), (1, turn), (1 - t, turn),
            (-1, turn * (t - 1))]


# --- Expressions ----------------------------------------------------------------------------------

def make_expressions(things):
    """Every expression that is clear, except chains (see make_chains).

    -> list of {"kind", "words", "things", "steps"}. `things` are the indices of what is meant, one
    or several. The last step leads to them, the steps before to the thing named on the way:
        {"do": "name", "noun", "things"}                                 the red square
        {"do": "extreme", "noun", "word", "candidates", "things"}        the leftmost circle
        {"do": "relation", "noun", "word", "candidates", "anchor", "things"}   the circle above ...
        {"do": "all", "noun", "candidates", "things"}                    the red squares
    `candidates` are the things that the noun fits. A relation's `anchor` may be one of them.
    """
    nouns, expressions = nouns_of(things), []
    for noun, candidates in nouns.items():
        if len(candidates) == 1 and noun != "shape":
            step = {"do": "name", "noun": noun, "things": (candidates[0],)}
            expressions.append(new_expression("attribute", f"the {noun}", [step]))
        for word in (*POSITIONS, *SIZES):
            thing = find_extreme(things, candidates, word)
            if thing is not None:
                step = {"do": "extreme", "noun": noun, "word": word, "candidates": candidates,
                        "things": (thing,)}
                kind = "size" if word in SIZES else "position"
                expressions.append(new_expression(kind, f"the {word} {noun}", [step]))
    full_names = [e for e in expressions
                  if e["words"] == f"the {full_name(things[e['things'][0]])}"]
    for anchor in full_names:
        expressions += make_relations(things, nouns, anchor, "relation")
    return expressions + make_plurals(things, nouns, full_names)


def make_plurals(things, nouns, anchors):
    """Every expression that means several things: all that a noun fits, or those of them that lie
    on one side of a thing, if not all do."""
    expressions = []
    for noun, members in nouns.items():
        if 2 <= len(members) <= COMPARED and noun != "shape":
            step = {"do": "all", "noun": noun, "candidates": members, "things": tuple(members)}
            expressions.append(new_expression("several", f"the {noun}s", [step]))
        for anchor in anchors:
            base, = anchor["things"]
            candidates = [i for i in members if i != base]
            sides = find_sides(things, candidates, base)
            for word in DIRECTIONS:
                meant = tuple(i for i, side in zip(candidates, sides) if side == word)
                if 2 <= len(meant) < len(candidates):
                    step = {"do": "relation", "noun": noun, "word": word, "candidates": members,
                            "anchor": base, "things": meant}
                    words = f"the {noun}s {word} {anchor['words']}"
                    expressions.append(new_expression("several", words, [*anchor["steps"], step]))
    return expressions


def make_chains(things, expressions, rng, tries=6):
    """Some chains: relations to a thing that a position, a size or another relation names."""
    anchors = [e for e in expressions if e["kind"] in ("position", "size", "relation")]
    nouns, chains = nouns_of(things), []
    for anchor in rng.sample(anchors, min(tries, len(anchors))):
        chains += make_relations(things, nouns, anchor, "chain")
    return chains


def make_relations(things, nouns, anchor, kind):
    """All relations to the thing that the expression `anchor` names. At least two things fit the
    noun, without the anchor and the things on the way to it."""
    (base,), way = anchor["things"], {step["things"][0] for step in anchor["steps"]}
    expressions = []
    for noun, members in nouns.items():
        candidates = [i for i in members if i != base]
        if len(set(candidates) - way) < 2:
            continue
        for word in RELATIONS:
            thing = find_related(things, candidates, word, base)
            if thing is None or thing in way:
                continue
            step = {"do": "relation", "noun": noun, "word": word, "candidates": members,
                    "anchor": base, "things": (thing,)}
            words = f"the {noun} {word} {anchor['words']}"
            expressions.append({**new_expression(kind, words, [*anchor["steps"], step]),
                                "outermost": is_outermost(things, candidates, word, thing)})
    return expressions


def new_expression(kind, words, steps):
    return {"kind": kind, "words": words, "steps": steps, "things": steps[-1]["things"]}


def full_name(thing):
    return f"{thing['color']} {thing['shape']}"


def nouns_of(things):
    """{noun: the things it fits}, for "shape", "circle", "red shape", "red circle" and so on."""
    nouns = {"shape": list(range(len(things)))}
    for i, thing in enumerate(things):
        for noun in (thing["shape"], f"{thing['color']} shape", full_name(thing)):
            nouns.setdefault(noun, []).append(i)
    return nouns


def find_extreme(things, candidates, word):
    """The leftmost, ..., largest of the candidates; None if it is not clear which one that is."""
    if len(candidates) < 2 or not comparable(things, candidates):
        return None
    name, sign = {**POSITIONS, **SIZES}[word]
    ranking = sorted(candidates, key=lambda i: sign * things[i]["seen"][name])
    first, second = (things[i]["seen"][name] for i in ranking[:2])
    if word in SIZES:                            # the width of what is hidden is not known
        whole = all(things[i]["visible"] > 0.99 or things[i]["layout"] == "crosses"
                    for i in candidates)
        clear = whole and max(first, second) >= CLEAR_WIDTH * min(first, second)
    else:
        clear = abs(first - second) >= CLEAR_PLACE
    return ranking[0] if clear else None


def find_related(things, candidates, word, anchor):
    """The candidate in this relation to the anchor; None if it is not clear which one that is."""
    if word == "next to":
        if len(candidates) < 2 or not comparable(things, candidates) or not is_clear_of(
                things, candidates, anchor):
            return None
        distances = [distance(things[i], things[anchor]) for i in candidates]
        first, second = sorted(distances)[:2]
        clear = second >= CLEAR_NEAR * first and second - first >= CLEAR_PLACE
        return candidates[distances.index(first)] if clear else None
    sides = find_sides(things, candidates, anchor)
    return candidates[sides.index(word)] if sides.count(word) == 1 else None


def find_sides(things, candidates, anchor):
    """On which side of the anchor each candidate lies, one of DIRECTIONS; [] if that is not clear
    for all of them."""
    if not comparable(things, candidates) or not is_clear_of(things, candidates, anchor):
        return []
    sides = [direction(things[anchor], things[i]) for i in candidates]
    return [] if None in sides else sides


def comparable(things, candidates):
    """Are they few, and no two so close that words could hardly tell them apart?"""
    pairs = [(things[i], things[j]) for n, i in enumerate(candidates) for j in candidates[:n]]
    return len(candidates) <= COMPARED and all(distance(a, b) >= APART for a, b in pairs)


def is_clear_of(things, candidates, anchor):
    """Does no candidate lie so close to the anchor that its side could hardly be told?"""
    return all(distance(things[i], things[anchor]) >= APART for i in candidates)


def distance(a, b):
    """Units between the centres of two things."""
    return math.hypot(a["seen"]["x"] - b["seen"]["x"], a["seen"]["y"] - b["seen"]["y"])


def direction(anchor, thing):
    """Where a thing lies from the anchor: one of DIRECTIONS, or None if it is not clear."""
    dx = thing["seen"]["x"] - anchor["seen"]["x"]
    dy = thing["seen"]["y"] - anchor["seen"]["y"]
    if max(abs(dx), abs(dy)) < CLEAR_PLACE:
        return None
    if abs(dx) >= CLEAR_ANGLE * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= CLEAR_ANGLE * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def is_outermost(things, candidates, word, thing):
    """Is it also the outermost candidate in this direction, so that no anchor is needed?"""
    if word == "next to":
        return False
    name, sign = POSITIONS[dict(zip(DIRECTIONS, POSITIONS))[word]]
    return thing == min(candidates, key=lambda i: sign * things[i]["seen"][name])


def pick_expression(things, expressions, rng, meant=None):
    """One expression. Its kind is drawn first, because relations outnumber all others.

    meant: the expression must mean these things; None is returned if none does."""
    pool = expressions + make_chains(things, expressions, rng)
    if meant is not None:
        pool = [e for e in pool if e["things"] == meant]
    kinds = [kind for kind in KINDS if any(e["kind"] == kind for e in pool)]
    if not kinds:
        return None
    kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
    pool = [e for e in pool if e["kind"] == kind]
    if kind in ("relation", "chain"):
        pool = prefer_relations(pool, rng)
    if kind == "several":
        pool = prefer_crowds(pool, things, rng)
    shared = [e for e in pool if things[e["things"][0]]["layout"] != "apart"]
    if shared and rng.random() < 0.6:            # things that share a place are wanted
        pool = shared
    return rng.choice(pool)


def prefer_crowds(pool, things, rng):
    """Narrow a pool of expressions for several things down, but never to nothing: to those whose
    box encloses something else, then to those that take a relation (half of the calls)."""
    pool = [e for e in pool if encloses_others(things, e["things"])] or pool
    if rng.random() < 0.5:
        pool = [e for e in pool if len(e["steps"]) > 1] or pool
    return pool


def encloses_others(things, meant):
    """Does the box of what is meant hold the centre of something else?"""
    x1, y1, x2, y2 = join_things(things, meant)["box"]
    centres = [((t["box"][0] + t["box"][2]) / 2, (t["box"][1] + t["box"][3]) / 2)
               for i, t in enumerate(things) if i not in meant]
    return any(x1 < x < x2 and y1 < y < y2 for x, y in centres)


def join_things(things, meant):
    """What is meant, as one thing: the mask of all of them, the box around it, its layout."""
    mask = np.any([things[i]["mask"] for i in meant], axis=0)
    return {"shape": things[meant[0]]["shape"], "mask": mask, "box": enclosing_box(mask),
            "layout": "several" if len(meant) > 1 else things[meant[0]]["layout"]}


def prefer_relations(pool, rng):
    """Narrow a pool of relations down, but never to nothing: first to those with a direction (45 %
    of the calls) or to those with "next to"; then to those that the outermost thing would not
    answer; then to those with three candidates or more."""
    directions = rng.random() < 0.45
    pool = [e for e in pool if (e["steps"][-1]["word"] != "next to") == directions] or pool
    pool = [e for e in pool if not e["outermost"]] or pool
    return [e for e in pool if len({*e["steps"][-1]["candidates"]} - {e["steps"][-1]["anchor"]}) > 2
            ] or pool


# --- The world on disk ----------------------------------------------------------------------------

def scenes(split, count, seed=7):
    """-> generator of a split's scenes: image (H, W, 3) uint8, its things, the indices of those
    that are meant, one to three expressions for them. testA has 2 or 3 things, testB 6."""
    rng = random.Random(f"{seed}/{split}")
    for _ in range(count):
        number = {"testA": rng.choice([2, 3]), "testB": 6}.get(split)
        image, things, expressions = make_scene(rng, number)
        first = pick_expression(things, expressions, rng)
        choice = {first["words"]: first}
        for _ in range(4):
            another = pick_expression(things, expressions, rng, first["things"])
            if another and len(choice) < 3:
                choice.setdefault(another["words"], another)
        yield image, things, first["things"], list(choice.values())


def write_shapes_world(root, seed=7, splits=SPLITS):
    """Write ROOT/refer_seg/shapes and its images. A shapes world that is there stays as it is;
    other data is never replaced.

    It is written beside its place and renamed, so that an interrupted run leaves no half world."""
    root, unfinished = Path(root), Path(root) / "refer_seg.unfinished"
    if (root / "refer_seg").exists():
        if (root / "refer_seg/shapes").exists():
            return
        raise SystemExit(f"{root / 'refer_seg'} holds other data: give the shapes world a folder "
                         f"of its own")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder = unfinished / "images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    (unfinished / "shapes").mkdir()
    images, annotations, refs = [], [], []
    for split, count in splits.items():
        for image, things, meant, expressions in scenes(split, count, seed):
            number = len(images) + 1
            name = f"COCO_train2014_{number:012d}.jpg"
            Image.fromarray(image).save(folder / name, quality=95)
            images.append({"id": number, "file_name": name, "height": image.shape[0],
                           "width": image.shape[1]})
            target = join_things(things, meant)
            annotations.append(coco_annotation(target, number))
            refs.append(refer_record(target, expressions, number, split))
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (unfinished / "shapes/instances.json").write_text(json.dumps(instances))
    (unfinished / "shapes/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    unfinished.rename(root / "refer_seg")


def coco_annotation(target, number):
    """COCO's annotation of image `number`, whose only annotated object this is (join_things)."""
    x1, y1, x2, y2 = target["box"]
    rle = coco_mask.encode(np.asfortranarray(target["mask"].astype(np.uint8)))
    return {"id": number, "image_id": number, "category_id": SHAPES.index(target["shape"]) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(target["mask"].sum()), "iscrowd": 0,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


def refer_record(target, expressions, number, split):
    """REFER's record of that object. A sentence's "groups" is our addition: evaluate.py also
    reports results by kind of expression and by layout."""
    def groups(expression):
        return [*dict.fromkeys([expression["kind"], target["layout"]])]

    sentences = [{"sent_id": 10 * number + n, "sent": e["words"], "raw": e["words"],
                  "tokens": e["words"].split(), "groups": groups(e)}
                 for n, e in enumerate(expressions)]
    return {"ref_id": number, "ann_id": number, "image_id": number, "split": split,
            "category_id": SHAPES.index(target["shape"]) + 1,
            "sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences],
            "file_name": f"COCO_train2014_{number:012d}_{number}.jpg"}


def main(argv=None):
    parser = argparse.ArgumentParser("python tests/tiny/world.py",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER")
    write_shapes_world(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
