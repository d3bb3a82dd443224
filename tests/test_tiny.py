"""The laptop's world, whose English an interpreter reads back, and its stand-ins (tests/tiny)."""
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask as coco

import build
import drawn
import world
from data import load_item, read_records, read_refs
from model import load_mllm, load_sam
from rewards import format_reward, parse_box

HUES = {"red": 0, "yellow": 60, "green": 120, "blue": 240}                          # degrees
ENDS = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1),
        "smallest": ("width", 1), "largest": ("width", -1)}
WAYS = {"right of": 0, "below": 90, "left of": 180, "above": -90}                   # degrees
PHRASE = f"the (?:({'|'.join(ENDS)}) )?(.+?)(s?)(?: ({'|'.join(WAYS)}|next to) (the .+))?"
# Places in a box, as shares of it, and which of them a shape covers
PLACES = [(0.08, 0.08), (0.92, 0.08), (0.08, 0.92), (0.92, 0.92), (0.5, 0.5), (0.2, 0.2)]
COVERS = {"111111": "square", "001110": "triangle", "000010": "diamond", "000011": "circle",
          "000001": "ring", "100111": "bar", "011010": "bar"}


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(0)
    return [(image, things, expressions + world.make_chains(things, expressions, rng))
            for image, things, expressions in (world.make_scene(rng) for _ in range(300))]


def understand(words, things):
    """-> the things that are meant, the kind, those on the way to them, those the noun fits.

    It fails where a person might hesitate: its margins are a hair smaller than the world's."""
    unit = math.sqrt(things[0]["mask"].size) / 160
    shown = [{"x": (x1 + x2) / 2 / unit, "y": (y1 + y2) / 2 / unit, "width": (x2 - x1) / unit}
             for x1, y1, x2, y2 in (thing["box"] for thing in things)]
    end, noun, plural, word, anchor = re.fullmatch(PHRASE, words).groups()
    fits = [i for i, thing in enumerate(things)
            if set(noun.split()) <= {"shape", thing["shape"], thing["color"]}]
    if anchor:
        (base,), kind, way, _ = understand(anchor, things)
        fits = [i for i in fits if i != base]
        meant = related(word, {i: (shown[i]["x"] - shown[base]["x"],
                                   shown[i]["y"] - shown[base]["y"]) for i in fits})
        assert (len(meant) > 1) == bool(plural)
        name = "several" if plural else "relation" if kind == "attribute" else "chain"
        return meant, name, [*way, base], fits
    if plural:
        assert 2 <= len(fits) <= 4
        return tuple(fits), "several", [], fits
    if not end:
        only, = fits
        return (only,), "attribute", [], fits
    name, sign = ENDS[end]
    first, second = sorted(fits, key=lambda i: sign * shown[i][name])[:2]
    a, b = (shown[i][name] for i in (first, second))
    if name != "width":
        assert abs(a - b) > 9.99
        return (first,), "position", [], fits
    for x1, y1, x2, y2, r in ((*things[i]["box"], things[i]["r"]) for i in fits):
        assert max(abs(x2 - x1 - 2 * r), abs(y2 - y1 - 2 * r)) <= 2          # nothing is hidden
    assert max(a, b) > 1.249 * min(a, b)
    return (first,), "size", [], fits


def related(word, offsets):
    """The nearest thing, or those in that quarter of the image, clearly so."""
    if word == "next to":
        first, second = sorted(offsets, key=lambda i: math.hypot(*offsets[i]))[:2]
        near, far = math.hypot(*offsets[first]), math.hypot(*offsets[second])
        assert far > 1.499 * near and far - near > 9.99
        return first,
    angles = {i: abs((math.degrees(math.atan2(dy, dx)) - WAYS[word] + 180) % 360 - 180)
              for i, (dx, dy) in offsets.items()}
    assert all(max(map(abs, offset)) > 9.99 for offset in offsets.values())
    assert all(abs(angle % 90 - 45) > 6 for angle in angles.values())        # clear of the borders
    return tuple(i for i, angle in angles.items() if angle < 45)


def test_every_expression_is_clear_and_no_guess_is_enough(scenes):
    """Two things or more fit the noun of a relation, without those on the way to it. Relations that
    the outermost thing would answer are picked less often than they occur, and several things whose
    box encloses something else more often."""
    rng, seen, kinds, offered, picked = random.Random(1), Counter(), Counter(), [], []
    crowds = [], []
    for _, things, expressions in scenes:
        for expression in expressions:
            meant, kind, way, fits = understand(expression["words"], things)
            assert (meant, kind) == (expression["things"], expression["kind"]), expression["words"]
            if way:
                assert len(set(fits) - set(way)) >= 2 and not {*meant} & {*way}, expression["words"]
                assert kind != "several" or len(meant) < len(fits), expression["words"]
                assert len(set(way)) == len(expression["steps"]) - 1
            words = re.findall("|".join((*ENDS, *WAYS, "next to")), expression["words"])
            seen.update([kind, *words])
        picks = [world.pick_expression(things, expressions, rng) for _ in range(5)]
        kinds.update(e["kind"] for e in picks)
        for some, flags in ((expressions, offered), (picks, picked)):
            flags += [e["outermost"] for e in some if "outermost" in e
                      and e["steps"][-1]["word"] in WAYS]
        for some, flags in zip((expressions, picks), crowds):
            flags += [world.encloses_others(things, e["things"]) for e in some
                      if e["kind"] == "several"]
        expression = world.pick_expression(things, expressions, rng, meant=(1,))
        assert expression is None or expression["things"] == (1,)
    assert set(seen) == {*ENDS, *WAYS, "next to", *world.KINDS} and min(seen.values()) > 200, seen
    assert min(kinds.values()) > kinds.total() / 20
    assert min(kinds["chain"], kinds["attribute"]) > kinds["size"]
    assert 0 < np.mean(picked) < np.mean(offered) - 0.02
    assert np.mean(crowds[1]) > 0.5


def test_masks_and_layouts_are_what_the_image_shows(scenes):
    """Colour, shape, box and visible share of every mask; the rest is grey. Crossing bars have one
    box, what nests lies inside the other's box, what stands apart touches nothing."""
    seen = Counter()
    for image, things, _ in scenes:
        hue = np.asarray(Image.fromarray(image).convert("HSV"))[..., 0] * (360 / 256)
        assert 95.5 < math.sqrt(hue.size) < 512.5 and max(hue.shape) < 2.03 * min(hue.shape)
        masks = np.array([thing["mask"] for thing in things])
        assert masks.sum(0).max() == 1 and (np.ptp(image[~masks.any(0)], axis=1) == 0).all()
        boxes = np.array([thing["box"] for thing in things])
        for i, (thing, mask, box) in enumerate(zip(things, masks, boxes)):
            (y, x), (x1, y1, x2, y2) = np.where(mask), box
            assert tuple(box) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
            off = {name: abs((hue[mask] - value + 180) % 360 - 180) for name, value in HUES.items()}
            own = off.pop(thing["color"])
            assert (own < np.min(list(off.values()), 0)).mean() > 0.98, thing["color"]
            whole = world.shape_mask(thing, image.shape[1::-1]).sum()
            assert mask.sum() > 0.33 * whole and (mask.sum() == whole) == (thing["visible"] == 1)
            covers = "".join(str(int(mask[y1 + int(v * (y2 - y1)), x1 + int(u * (x2 - x1))]))
                             for u, v in PLACES)
            assert thing["visible"] < 1 or COVERS[covers] == thing["shape"]
            seen.update([thing["layout"], "partly hidden"][:1 + (thing["visible"] < 0.99)])
            meets = (boxes[:, :2] < box[2:]).all(1) & (box[:2] < boxes[:, 2:]).all(1)
            others = [j for j in np.flatnonzero(meets) if j != i]
            assert all(things[j]["layout"] == thing["layout"] != "apart" for j in others)
            if thing["layout"] in ("crosses", "nests"):
                other, = others
                assert things[other]["color"] != thing["color"]
                gaps = [box - boxes[other], boxes[other] - box]
                inside = [(gap[:2] >= -1).all() and (gap[2:] <= 1).all() for gap in gaps]
                assert all(inside) if thing["layout"] == "crosses" else any(inside)
    assert min(seen.values()) > 50 and set(seen) == {*world.LAYOUTS, "partly hidden"}, seen


def test_the_world_on_disk_is_that_of_the_scenes(tmp_path):
    """The same seed writes the same bytes, whatever an interrupted run has left."""
    splits = {"train": 10, "val": 3, "testA": 6, "testB": 6}
    (tmp_path / "again/refer_seg.unfinished/shapes").mkdir(parents=True)
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        world.write_shapes_world(tmp_path / name, seed, splits)
    first, again, other = ({str(path.relative_to(tmp_path / name)): path.read_bytes()
                            for path in (tmp_path / name).rglob("*") if path.is_file()}
                           for name in ("first", "again", "other"))
    assert first == again and len(first) == 25 + 2 and not first.items() & other.items()
    shapes = tmp_path / "first/refer_seg/shapes"
    annotations = json.loads((shapes / "instances.json").read_text())["annotations"]
    refs = read_refs(shapes / "refs(unc).p")
    for split, count in splits.items():
        for record, (image, things, meant, expressions) in zip(
                read_records(tmp_path / "first", ["shapes"], [split]),
                world.scenes(split, count), strict=True):
            ref, annotation = refs.pop(0), annotations.pop(0)
            mask = np.logical_or.reduce([things[i]["mask"] for i in meant])
            assert len(things) in {"testA": [2, 3], "testB": [6]}.get(split, [2, 3, 4, 5, 6])
            assert record["expressions"] == [e["words"] for e in expressions]
            assert 1 <= len(set(record["expressions"])) == len(expressions) <= 3
            for i, words in enumerate(record["expressions"]):
                item = load_item(record, i)
                assert (item["gt_mask"] == mask).all() and item["expression"] == words
                assert tuple(item["gt_box"]) == Image.fromarray(mask).getbbox()
                assert understand(words, things)[:2] == (meant, record["groups"][i][0])
                layout = things[meant[0]]["layout"] if len(meant) == 1 else "several"
                assert record["groups"][i][-1] == layout
            assert abs(np.asarray(item["image"]) - image.astype(float)).mean() < 4      # JPEG
            assert (ref["ann_id"], ref["split"], ref["category_id"]) == (
                annotation["id"], split, 1 + world.SHAPES.index(things[meant[0]]["shape"]))
            assert annotation["area"] == coco.area(annotation["segmentation"])
            assert annotation["bbox"] == coco.toBbox(annotation["segmentation"]).tolist()


def test_the_world_never_replaces_what_is_there(tmp_path):
    (tmp_path / "refer_seg/refcoco").mkdir(parents=True)
    with pytest.raises(SystemExit, match="folder of its own"):
        world.main([str(tmp_path)])
    for count in (2, 3):
        world.write_shapes_world(tmp_path / "new", splits={"val": count})
    assert len(read_records(tmp_path / "new", ["shapes"], ["val"])) == 2


def test_the_two_habits():
    """A look, its words worked out by hand. A glance names any thing that the noun fits."""
    things = [{"color": "red", "shape": "circle", "box": (10, 20, 30, 40)},
              {"color": "blue", "shape": "circle", "box": (70, 20, 110, 60)},
              {"color": "red", "shape": "square", "box": (40, 20, 60, 40)}]
    circles = {"noun": "circle", "candidates": [1, 0], "anchor": 2, "things": (0,)}
    expression = world.new_expression("chain", "an expression", [
        {"do": "name", "noun": "red square", "things": (2,)},
        {**circles, "do": "extreme", "word": "largest", "things": (1,)},
        {**circles, "do": "relation", "word": "left of"}])
    look, *glances = ["".join(text for text, _ in build.write_completion(
        things, expression, (160, 160), n == 0, random.Random(n))) for n in range(200)]
    assert format_reward(look) == 1 and look.startswith(
        "<think>\nThe red square is at 50 30. The circles are at 20 30 20 wide, 90 40 40 wide. So "
        "it is at 90 40, a blue circle. The circles are at 20 30 left, 90 40 right. So it is at 20 "
        "30, a red circle.\n</think>")
    red, blue = (sum(f"It is the {color} circle." in text for text in glances)
                 for color in ("red", "blue"))
    assert min(red, blue) > 80 and red + blue == len(glances)
    assert np.mean([format_reward(text) for text in glances]) == pytest.approx(6 / 7, abs=0.08)


def test_a_look_at_several_things():
    """Its words and its box, worked out by hand. The anchor is listed where the noun fits it."""
    things = [{"color": "red", "shape": "circle", "box": (10, 20, 30, 40)},
              {"color": "blue", "shape": "circle", "box": (70, 20, 110, 60)},
              {"color": "red", "shape": "circle", "box": (20, 80, 40, 100)},
              {"color": "red", "shape": "square", "box": (120, 20, 140, 40)}]
    shapes = {"do": "relation", "noun": "shape", "word": "left of", "candidates": [0, 1, 2, 3],
              "anchor": 1, "things": (0, 2)}
    for steps, looks in (
            ([{"do": "all", "noun": "red circle", "candidates": [0, 2], "things": (0, 2)}],
             "The red circles are at 20 30, 30 90."),
            ([{"do": "name", "noun": "blue circle", "things": (1,)}, shapes],
             "The blue circle is at 90 40. The shapes are at 20 30 left, 30 90 left, 90 40 0 away, "
             "130 30 right. So they are at 20 30, 30 90.")):
        expression = world.new_expression("several", "an expression", steps)
        spans = build.write_completion(things, expression, (160, 160), True, random.Random(0))
        text = "".join(part for part, _ in spans)
        assert format_reward(text) == 1 and f"<think>\n{looks}\n</think>" in text
        assert np.abs(np.subtract(parse_box(text), (10, 20, 40, 100))).max() <= 3
        assert spans[-2][1] == (0, 2)            # its numbers speak of both


def test_the_training_forward_is_hugging_faces():
    """Padded prompts and completions, two of which share an image, give the same logits."""
    mllm, processor = load_mllm(str(ROOT / "tests/tiny/mllm"), torch.float32)
    scenes = [build.new_scene(*build.draw_scene(key)) for key in "ab"]
    batch = build.draw_batch(scenes, processor, 0.5, 3, random.Random(0))
    mllm.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        features = mllm.model.get_image_features(batch.pixel_values, batch.grid_thw).pooler_output
        for prompt, completion, n, scene, states in zip(
                batch.prompts, batch.completions, batch.lengths, batch.scene_of,
                build.mllm_forward(mllm, batch, features)[0]):
            ids = torch.cat([prompt[prompt != processor.tokenizer.pad_token_id], completion[:n]])
            image = processor.image_processor([batch.scenes[scene]["image"]], return_tensors="pt")
            types = (ids == mllm.config.image_token_id).long()[None]
            logits = mllm(input_ids=ids[None], mm_token_type_ids=types, **image).logits
            assert torch.allclose(mllm.lm_head(states[:n + 1]), logits[0, -n - 1:], atol=1e-4)


def test_sams_stand_in_keeps_its_maps_small(scenes):
    """The committed one: the coarse map, and what the decoder's MLPs add to its tokens. An earlier
    one had 87 and 200, and stage 1 exploded. `Sizes` sees the same three; 0.001 of them is a loss.
    """
    sam = load_sam("tests/tiny/sam").eval()
    sizes = build.Sizes(sam)
    batch = [build.new_scene(image, things) for image, things, _ in scenes[:4]]
    low = build.stack(batch, "low").float() / 255
    torch.manual_seed(0)
    with torch.no_grad():
        build.draw_masks(sam, batch, *build.draw_points(low, torch.tensor([[0, 1]] * 4), 8))
    deviations = [seen.std().item() for seen in sizes.seen]
    assert len(deviations) == 3 and max(deviations) < 5
    expected = sum(seen.square().mean() for seen in sizes.seen) / 1000
    assert torch.isclose(sizes.loss(), expected) and not sizes.seen


def test_a_box_prompts_sam_for_one_thing_only(monkeypatch):
    """As in SAM 2's own training. Points ask for several as well."""
    batch = [build.new_scene(*build.draw_scene(key)) for key in "abcd"]
    sam, asked, choose = load_sam("tests/tiny/sam"), [], build.choose
    monkeypatch.setattr(build, "choose", lambda values, targets: (
        asked.append(targets) or choose(values, targets)))
    for sort in list(build.SORTS):
        monkeypatch.setattr(build, "SORTS", {sort: 1})
        asked.clear()
        torch.manual_seed(0)
        build.sam_losses(sam, build.CoarseReader(sam), build.Sizes(sam), batch, False,
                         random.Random(0))
        assert (torch.cat(asked) >= build.THINGS).any() == (sort == "points")


def test_the_stand_ins_can_be_trained_again(tmp_path, capsys, monkeypatch):
    """Two steps, and for SAM one more after resuming. What is saved fits the committed ones."""
    small = ["--output", str(tmp_path), "--scenes", "12", "--held-out", "1", "--batch", "2"]
    losses, steps = build.sam_losses, []
    monkeypatch.setattr(build, "sam_losses", lambda *given: steps.append(1) or losses(*given))
    build.main(["sam", *small, "--steps", "2"])
    build.main(["sam", *small, "--steps", "3", "--resume"])
    build.main(["mllm", *small, "--steps", "2"])
    text = capsys.readouterr().out
    assert len(steps) == 3 and text.count("8 points: ") == 2 and text.count("sampled: ") == 1
    assert load_sam(str(tmp_path / "sam")).image_size == build.SIDE
    new, committed = (json.loads((folder / "mllm/tokenizer.json").read_text())
                      for folder in (tmp_path, ROOT / "tests/tiny"))
    assert new["model"] == committed["model"] and len(new["model"]["vocab"]) == 928


def test_the_drawings(tmp_path):
    drawn.main([str(tmp_path)])
    for record, (size, background, words, meant, things) in zip(
            read_records(tmp_path, ["drawn"], ["val"]), drawn.DRAWINGS, strict=True):
        item, indices = load_item(record, 0), np.atleast_1d(meant)
        colors = {things[i][1] for i in indices}
        assert item["expression"] == words and item["image"].size == size
        pixels = np.asarray(item["image"])[item["gt_mask"]]
        assert {tuple(color) for color in np.unique(pixels, axis=0)} == colors - {background}
        assert tuple(item["gt_box"]) == Image.fromarray(item["gt_mask"]).getbbox()
