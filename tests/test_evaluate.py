"""The metrics by hand and against other implementations; an evaluation of every dataset, with any
batch size and number of processes; both ways to prompt SAM; one image; tests/tools/gallery.py and
curves.py."""
import base64
import io
import json
import os
import pickle
import random
import re
import shutil
import time
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SAM_SIDE, call, in_two, random_batch, random_sam, refused
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoProcessor

import align
import data
import evaluate
import gallery
import model
import rewards
import world as shapes_world

EVIL = """<script>alert(1)</script> the "red" & 'blue' <img src=x onerror=alert(2)> </pre>"""


def evaluated(folder, *flags, call=call):
    """Evaluate into a folder -> what --json holds, what --predictions holds."""
    table = call("evaluate.py", *flags, "--json", folder / "a.json", "--predictions",
                 folder / "a.jsonl")
    result = json.loads((folder / "a.json").read_text())
    assert table is None or evaluate.results_table(result) in table
    return result, [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def decode(row):
    return coco_mask.decode(row["mask"]).astype(bool)


# --- Metrics --------------------------------------------------------------------------------------

def row(intersection, union, box=0.0, form=1.0, name="a/1/0", **more):
    return {"intersection": intersection, "union": union, "box_iou": box, "format": form,
            "id": name, **more}


def test_summary_by_hand():
    """I/U: 30/60, 0/40, 0/0 and 10/10. gIoU: (1/2 + 0 + 1 + 1) / 4 = 0.625; cIoU: 40 / 110. If
    all masks are empty, no number is NaN."""
    rows = [row(30, 60, 0.5), row(0, 40, 0.51, 0.0), row(0, 0, 0.9), row(10, 10)]
    metrics = evaluate.summarize(rows)
    assert metrics["giou"] == pytest.approx(0.625, abs=1e-6) and metrics["ciou"] == 40 / 110
    assert metrics["box_iou"] == pytest.approx(1.91 / 4)
    # a box IoU of 0.5 itself is not above 0.5
    assert metrics["acc50"] == 0.5 and metrics["format"] == 0.75 and metrics["n"] == 4
    assert list(metrics) == ["giou", "ciou", "box_iou", "acc50", "format", "n", "giou_95",
                             "ciou_95", "box_iou_95"]
    empty = evaluate.summarize([row(0, 0, 0.6), row(0, 0, 0.2, name="a/2/0")])
    assert empty["giou"] == 1 and empty["ciou"] == 0 and empty["giou_95"] == [1, 1]
    assert empty["box_iou"] == pytest.approx(0.4) and empty["acc50"] == 0.5 and empty["n"] == 2
    json.dumps([metrics, empty], allow_nan=False)


def lisa(masks, truths):
    """gIoU and cIoU as LISA's code counts them, in NumPy: intersectionAndUnionGPU with two classes,
    255 ignored, and its AverageMeters. truths hold 0, 1 and 255."""
    I, U, ious = np.zeros(2), np.zeros(2), []
    for mask, truth in zip(masks, truths):
        output = np.where(truth == 255, 255, mask.astype(int))
        histogram = lambda values: np.bincount(values.ravel(), minlength=256)[:2]
        intersection = histogram(output[output == truth])
        union = histogram(output) + histogram(truth) - intersection
        I, U = I + intersection, U + union
        iou = intersection / (union + 1e-5)
        iou[union == 0] += 1.0
        ious.append(iou)
    return np.mean(ious, 0)[1], (I / (U + 1e-10))[1]


@pytest.mark.parametrize("ignore, label", [("out", 255), ("background", 0)])
def test_metrics_equal_lisas(ignore, label):
    """Random masks of many sizes, and all the corners: no ground truth, no prediction, neither, a
    prediction in ignored pixels alone, everything but the ground truth ignored, and everything."""
    g, cases = np.random.default_rng(5), []
    for n in range(60):
        size = tuple(g.integers(5, 40, 2))
        mask, truth, hidden = g.random((3, *size)) < 0.8 * g.random((3, 1, 1))
        mask, truth, hidden = mask & (n % 5 != 1), truth & (n % 7 > 1), hidden & (n % 3 > 0)
        if n % 10 == 9:
            mask, truth = hidden.copy(), truth & False
        if n == 35:
            truth = np.arange(truth.size).reshape(size) == 7
            hidden = ~truth
        if n == 37:
            hidden = truth | True
        cases.append((mask, truth & ~hidden, hidden))
    assert any(not m.any() and not t.any() for m, t, _ in cases)
    assert any((m & h).any() for m, _, h in cases) and cases[37][0].any()
    counts = [evaluate.count(*map(torch.from_numpy, case), ignore) for case in cases]
    assert all(type(n) is int for pair in counts for n in pair.values())
    metrics = evaluate.summarize([row(**pair) for pair in counts])
    truths = [np.where(hidden, label, truth.astype(int)) for _, truth, hidden in cases]
    expected = lisa([mask for mask, _, _ in cases], truths)
    assert (metrics["giou"], metrics["ciou"]) == pytest.approx(expected, abs=1e-6)


def test_intervals_equal_a_naive_bootstrap():
    """Objects of one to five rows that resemble one another. Drawing rows instead of objects would
    give clearly narrower intervals. One object leaves nothing to draw."""
    g, objects = np.random.default_rng(3), []
    for i in range(40):
        level, size = g.random(), g.integers(10, 1000, 1 + i % 5)
        shares = np.clip(level + g.normal(0, 0.03, len(size)), 0, 1)
        objects.append([row(int(n * share), int(n), float(np.clip(level + g.normal(0, 0.1), 0, 1)),
                            name=f"set/{i}/{j}") for j, (n, share) in enumerate(zip(size, shares))])
    rows = [r for rows in objects for r in rows]
    metrics = evaluate.summarize([rows[i] for i in g.permutation(len(rows))], draws=20000)

    def naive(groups):
        g, draws = np.random.default_rng(4), []
        for _ in range(3000):
            sample = [r for i in g.integers(len(groups), size=len(groups)) for r in groups[i]]
            I, U, box = np.array([(r["intersection"], r["union"], r["box_iou"]) for r in sample]).T
            draws.append([np.mean(I / (U + 1e-5)), I.sum() / U.sum(), box.mean()])
        return np.percentile(draws, [2.5, 97.5], axis=0).T

    names = "giou", "ciou", "box_iou"
    for name, (low, high), by_row in zip(names, naive(objects), naive([[r] for r in rows])):
        assert metrics[name + "_95"] == pytest.approx((low, high), abs=0.08 * (high - low)), name
        assert np.ptp(by_row) < 0.75 * (high - low) and low < metrics[name] < high
    one = evaluate.summarize([row(30, 60, 0.5), row(10, 40, 0.1, name="a/1/1")])
    assert all(one[name + "_95"] == pytest.approx([one[name]] * 2) for name in names)


def test_groups_and_table_by_hand():
    """Behind the split come the names in the first place of the tuples, then those in the second. A
    row without groups counts in the split alone. cIoU of all: (30 + 10 + 10 + 0 + 5) / 140."""
    rows = [row(30, 60, groups=("size", "nests")), row(10, 40, groups=("chain", "nests")),
            row(10, 10, groups=("size",)), row(0, 10, groups=()), row(5, 20, groups=("box",))]
    results = evaluate.summarize_split(evaluate.Split("val", "mine val", rows=None), rows)
    assert [(name, metrics["n"], metrics["ciou"]) for name, metrics in results.items()] == [
        ("val", 5, 55 / 140), ("val: box", 1, 0.25), ("val: chain", 1, 0.25),
        ("val: size", 2, 40 / 70), ("val: nests", 2, 0.4)]
    results["val"]["giou_95"] = [0.25, 0.333]
    lines = evaluate.results_table(results).splitlines()
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("| -")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["split", "gIoU", "cIoU", "box IoU", "Acc@0.5", "format", "n"]
    assert cells[2][1] == "40.0 [25.0, 33.3]" and [line[0] for line in cells[2:]] == list(results)
    assert cells[3] == ["val: box", "25.0 [25.0, 25.0]", "25.0 [25.0, 25.0]", "0.0 [0.0, 0.0]",
                        "0.0", "100.0", "1"]


# --- From a completion to a mask ------------------------------------------------------------------

def test_the_queries_way_equals_forward_one(lens):
    """Two prompts of different lengths and images, in float64: each mask is that of the plainest
    forward of its greedy completion. This holds for both --mask-pass, whose masks differ."""
    lens.double().eval()
    lens.sam.sam_prompt_encoder.pe_layer.float()                 # sam2 makes its inputs in float32
    batch, masks = random_batch(dtype=torch.float64), {}
    tokenizer = SimpleNamespace(batch_decode=lambda completions, **_: [""] * len(completions))
    for lens.mask_pass in "paper", "released":
        with torch.no_grad():
            samples, _, masks[lens.mask_pass], _ = evaluate.predict(lens, lens.mllm, batch,
                                                                    tokenizer, 6)
            for b, (completion,) in enumerate(samples.completions):
                alone = model.forward_one(lens, data.select(batch, [b]), completion)
                assert (masks[lens.mask_pass][b] - alone["mask_logits"]).abs().max() < 1e-10
    assert (masks["paper"] - masks["released"]).abs().max() > 1e-3


def test_boxes_reach_sam_in_its_own_frame(lens):
    """From the MLLM frame, which each image has its own of: (10, 20, 30, 60) of 100 x 80 is (0.1,
    0.25, 0.3, 0.75) of SAM's square. The other image, without a box, does not disturb it."""
    stock_sam = model.SamHead(random_sam(seed=3)).eval()
    batch = {**random_batch(), "mllm_frames": [(100, 80), (128, 64)]}
    with torch.no_grad():
        features = lens.encode_images(batch["sam_pixels"])
        logits = evaluate.prompt_with_boxes(stock_sam, batch, [(10, 20, 30, 60), None], features)
        box = torch.tensor([[0.1, 0.25, 0.3, 0.75]]) * SAM_SIDE
        expected = stock_sam([f[:1] for f in features], stock_sam.box_prompts(box)[:, None])
    assert logits.shape == (2, SAM_SIDE // 4, SAM_SIDE // 4)
    assert torch.allclose(logits[:1], expected, atol=1e-4)


# --- An evaluation: its numbers, its file, batches, processes -------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny models with an untrained context module, as a run's folder. Its prompt embeddings
    are made as large as SAM's own, so that there are masks of all kinds."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        shared = align.SharedArgs(**align.TINY)
        align.start_processes(shared)
        lens, _ = model.build_lens(shared)
        lens.connector.to_sam[2].weight.data *= 10
        model.export(folder, lens, shared)
        dist.destroy_process_group()
    return folder


def encode(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def box_of(mask):
    x, y, w, h = coco_mask.toBbox(encode(mask))
    return [x, y, x + w, y + h]


def write_datasets(root, world):
    """The shapes world and small ReasonSeg, GroundingSuite and a folder of one's own, in their own
    formats. -> {row id: (mask, ignored pixels, box, groups)}"""
    shutil.copytree(world / "refer_seg", root / "refer_seg")
    rng, truth, suite = random.Random(1), {}, []

    def scene(path, height=128, width=128):
        image, things, _ = shapes_world.make_scene(rng)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((width, height)).save(path, quality=95)
        return np.array(Image.fromarray(things[0]["mask"]).resize((width, height)))

    instances = json.loads((world / "refer_seg/shapes/instances.json").read_text())
    masks = {a["id"]: coco_mask.decode(a["segmentation"]) > 0 for a in instances["annotations"]}
    for ref in pickle.loads((world / "refer_seg/shapes/refs(unc).p").read_bytes()):
        for i, sentence in enumerate(ref["sentences"]):
            mask, groups = masks[ref["ann_id"]], sentence["groups"]
            truth[f"shapes/{ref['ref_id']}/{i}"] = mask, mask & False, box_of(mask), groups
    for name in "train/0", "val/0", "val/1", "test/0", "test/1", "test/2":
        path = root / f"reason_seg/ReasonSeg/{name}.jpg"
        mask, hidden = scene(path) & False, np.zeros((128, 128), bool)
        edge = 70 + 2 * int(name[-1])
        mask[:, :edge + 1] = hidden[10:91, 20:111] = True      # half of `hidden` is on the object
        shapes = [{"label": "target", "points": [[0, 0], [edge, 0], [edge, 127], [0, 127]]},
                  {"label": "ignore", "points": [[20, 10], [110, 10], [110, 90], [20, 90]]}]
        path.with_suffix(".json").write_text(json.dumps(
            {"text": ["the thing", "another"], "is_sentence": False, "shapes": shapes}))
        mask &= ~hidden
        truth[f"reasonseg/{name}/0"] = mask, hidden, box_of(mask), []
    classes = ["stuff", "part", "multi", "single"]
    for n, name in enumerate([*classes, "single", "stuff"], 1):
        mask = scene(root / f"COCO/unlabeled2017/{n:012d}.jpg")
        x1, y1, x2, y2 = box_of(mask)
        suite.append({"idx": n, "image_path": f"unlabeled2017/{n:012d}.jpg", "caption": "thing",
                      "class_id": 1 + classes.index(name), "segmentation": encode(mask),
                      "box": [x1 - 2, y1, x2 + 2, y2]})                  # looser than the mask
        truth[f"groundingsuite/eval/{n}/0"] = mask, mask & False, suite[-1]["box"], [name]
    mask, *_ = [scene(root / f"mine/{name}.jpg", 100, 120) for name in "abc"]
    Image.fromarray(mask).save(root / "mine/a.png")
    none, polygon, boxed = np.zeros((3, *mask.shape), bool)
    polygon[20:70, 10:40] = boxed[10:55, 12:60] = True
    mine = [{"image": "a.jpg", "text": ["the first", EVIL], "mask": "a.png"},
            {"image": "c.jpg", "text": "a box", "box": [9, 8, 70, 60], "mask": encode(boxed)},
            {"image": "b.jpg", "text": "polygons", "mask": [[10, 20, 40, 20, 40, 70, 10, 70]]}]
    for name, rows in ("GroundingSuite-Eval", suite), ("mine/train", mine), ("mine/val", mine):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return truth | {"mine/val/1/0": (mask, none, box_of(mask), []),
                    "mine/val/1/1": (mask, none, box_of(mask), []),
                    "mine/val/2/0": (boxed, none, [9, 8, 70, 60], []),
                    "mine/val/3/0": (polygon, none, [10, 20, 40, 70], [])}


@pytest.fixture(scope="module")
def whole(world, checkpoint, tmp_path_factory):
    """An evaluation of every split of every dataset, in batches of 5. `val` holds the rows of the
    shapes world's "val"."""
    root, out = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("whole") / "new"
    truth = write_datasets(root, world)
    flags = ["--data", root, "--checkpoint", checkpoint]
    result, rows = evaluated(out, *flags, "--splits", "all", "--batch", 5)
    return SimpleNamespace(root=root, truth=truth, flags=flags, file=out / "a.jsonl", rows=rows,
                           result=result, val=[r for r in rows if r["split"] == "shapes val"])


SPLITS = ["shapes val", "shapes testA", "shapes testB", "reasonseg val", "reasonseg test",
          "groundingsuite eval", "mine val"]


def test_all_splits_of_all_datasets(whole):
    """Every row of each but the training splits, in order; its expression, groups and ground truth
    are those of its dataset. Its box is the completion's, moved from the MLLM frame: the size to
    which the MLLM's own processor resizes the image, in patches of 8 pixels."""
    assert list(dict.fromkeys(r["split"] for r in whole.rows)) == SPLITS
    assert [whole.result[name]["n"] for name in SPLITS[3:]] == [2, 3, 6, 4]
    for name in SPLITS:
        dataset, split = name.split()
        records = data.read_records(whole.root, [dataset], [split])
        assert [(r["id"], r["expression"]) for r in whole.rows if r["split"] == name] == [
            (f"{record['id']}/{i}", expression) for record in records
            for i, expression in enumerate(record["expressions"])]
    processor, moved = AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm").image_processor, 0
    for r in whole.rows:
        assert list(r) == ["id", "expression", "completion", "format", "box", "gt_box", "box_iou",
                           "intersection", "union", "mask", "box_prompt", "split", "groups"]
        mask, _, gt_box, groups = whole.truth[r["id"]]
        assert r["groups"] == groups and r["gt_box"] == gt_box and decode(r).shape == mask.shape
        box, (height, width) = rewards.parse_box(r["completion"]), mask.shape
        if box:
            _, down, across = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0]
            x, y = width / (8 * int(across)), height / (8 * int(down))
            moved += (x, y) != (1, 1)
            box = pytest.approx([box[0] * x, box[1] * y, box[2] * x, box[3] * y])
        assert r["box"] == box and r["format"] == rewards.format_reward(r["completion"])
    assert moved > 10 and len({r["mask"]["counts"] for r in whole.rows}) > 20


def expected(whole, rows, label=255):
    """gIoU, cIoU, box IoU and accuracy of some rows of the predictions, by LISA's code and by
    pycocotools, from the ground truth that was written. label: LISA's, of ignored pixels."""
    masks, truths, ious = [], [], []
    xywh = lambda b: [b[0], b[1], max(b[2] - b[0], 0), max(b[3] - b[1], 0)]
    for r in rows:
        mask, hidden, box, _ = whole.truth[r["id"]]
        masks.append(decode(r))
        truths.append(np.where(hidden, label, mask.astype(int)))
        ious.append(coco_mask.iou([xywh(r["box"] or [0] * 4)], [xywh(box)], [0])[0, 0])
    return [*lisa(masks, truths), np.mean(ious), np.mean(np.array(ious) > 0.5)]


def test_numbers_equal_an_independent_computation(whole):
    """Those of each split, and of each group of its rows: GroundingSuite's classes; the shapes
    world's kinds of expressions, then its layouts."""
    sets = {}
    for split in SPLITS:
        sets[split] = rows = [r for r in whole.rows if r["split"] == split]
        for place in range(max(len(r["groups"]) for r in rows)):
            for name in sorted({r["groups"][place] for r in rows if r["groups"][place:]}):
                sets[f"{split}: {name}"] = [r for r in rows if name in r["groups"]]
    assert list(whole.result) == list(sets) and len(sets) > 20
    for name, rows in sets.items():
        metrics = whole.result[name]
        five = [metrics[metric] for metric in ("giou", "ciou", "box_iou", "acc50", "n")]
        assert five == pytest.approx([*expected(whole, rows), len(rows)], abs=1e-6), name
    val = whole.result["shapes val"]
    assert 0 < val["ciou"] < 1 and val["box_iou"] > 0.1


def test_ignored_pixels_as_background(whole, tmp_path):
    """One dataset, so its splits go by their short names. The completions stay, the counts do
    not."""
    result, rows = evaluated(tmp_path, *whole.flags, "--datasets", "reasonseg", "--splits", "val",
                             "test", "--batch", 5, "--ignore", "background")
    assert list(result) == ["val", "test"]
    for name, metrics in result.items():
        four = [metrics[metric] for metric in ("giou", "ciou", "box_iou", "acc50")]
        same = [r for r in rows if r["split"] == f"reasonseg {name}"]
        assert four == pytest.approx(expected(whole, same, label=0), abs=1e-6)
        before = [r for r in whole.rows if r["split"] == f"reasonseg {name}"]
        assert [r["union"] for r in same] != [r["union"] for r in before]


def test_a_completion_that_was_cut(whole, tmp_path):
    """Cut after 8 tokens there is no box and no format. The queries still segment; the box does
    not, so that its union is the ground truth. Cut just before the end token the box is there, but
    the format is wrong."""
    result, rows = evaluated(tmp_path, *whole.flags, "--max-completion", 8, "--limit", 5)
    metrics = result["val"]
    assert metrics["box_iou"] == metrics["acc50"] == metrics["format"] == 0 and metrics["n"] == 5
    assert any(decode(r).any() for r in rows)
    for r in rows:
        truth = r["box_prompt"]["union"]
        assert r["box"] is None and r["box_prompt"]["intersection"] == 0 < truth
        assert r["union"] - r["intersection"] == truth + decode(r).sum() - 2 * r["intersection"]
    tokenizer = AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm").tokenizer
    before = whole.val[0]
    length = len(tokenizer(before["completion"])["input_ids"])
    _, (cut,) = evaluated(tmp_path, *whole.flags, "--max-completion", length, "--limit", 1)
    assert before["format"] == 1 and cut["format"] == 0
    assert all(cut[name] == before[name] for name in ("id", "completion", "box"))


def test_processes_and_batches_do_not_change_the_numbers(whole, tmp_path):
    """7 rows, which 2 processes do not divide, give the same as on 1, to the last bit. They are
    decoded one at a time. In batches of 5, the padding changes no completion and at most a pixel in
    ten thousand."""
    flags = [*whole.flags, "--batch", 1, "--limit", 7]
    one, two = (evaluated(tmp_path, *flags, call=way) for way in (call, partial(in_two, call)))
    assert one == two and sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl"]
    assert one[0]["val"]["n"] == len(one[1]) == 7 < len(whole.val)
    by_id = {r["id"]: r for r in one[1]}
    both = [(r, by_id[r["id"]]) for r in whole.val if r["id"] in by_id]
    assert len(both) == 7 and all(r["completion"] == alone["completion"] for r, alone in both)
    assert all((decode(r) ^ decode(alone)).mean() <= 2 / 16384 for r, alone in both)


def test_the_box_as_prompt(whole, tmp_path):
    """Without a checkpoint: the completions are the same ones here, since stage 1 leaves the MLLM
    alone, and what is counted is what the run with queries noted beside. Where the box is good and
    its thing stands apart, so is SAM's mask. With two datasets, splits go by their full names."""
    result, rows = evaluated(tmp_path, "--data", whole.root, "--sam-prompt", "box", "--batch", 5,
                             "--datasets", "shapes", "mine")
    names = [name for name in result if ":" not in name]
    assert names == ["shapes val", "mine val"]
    for r, before in zip(rows, (r for r in whole.rows if r["split"] in names), strict=True):
        assert r == {**before, **before["box_prompt"], "mask": r["mask"]}
    ious = np.array([r["intersection"] / r["union"] for r in rows if r["split"] == "shapes val"])
    assert result["shapes val"]["giou"] == pytest.approx(ious.mean(), abs=1e-6)
    good = [r["box_iou"] > 0.6 and "apart" in r["groups"] for r in rows[:len(ious)]]
    assert any(good) and ious[good].mean() > 0.8


# --- Errors, before any work, and one image -------------------------------------------------------

BOX = ["--sam-prompt", "box"]
ONE = [*BOX, "--image", "docs/shapes.png", "--text", "a", "--output"]
TOGETHER = "--image and --text go together"


@pytest.mark.parametrize("flags, words", [
    ([], "--checkpoint is missing"),
    (["--checkpoint", "EMPTY"], "EMPTY: no finished run here"),
    ([*BOX, "--batch", 0], "--batch must be at least 1, not 0"),
    ([*BOX, "--image", "a.png"], TOGETHER),
    ([*BOX, "--text", "a"], TOGETHER),
    ([*BOX, "--image", "a.png", "--text", " "], TOGETHER),
    ([*BOX, "--ignore", "foreground"], "invalid choice"),
    ([*BOX, "--data", "EMPTY", "--splits", "all"],
     "no dataset with an evaluation split here.*python tests/tools/check_data.py"),
    ([*BOX, "--splits", "test"], "split 'test' in shapes. It has train, val, testA, testB"),
    ([*BOX, "--datasets", "refcoco"], "refcoco.*is missing. Download"),
    ([*BOX, "--image", "EMPTY/no.png", "--text", "a", "--output", "EMPTY/a.png"], "no.png"),
    ([*ONE, "EMPTY/a.xyz"], "a.xyz: cannot be written.*unknown.*ends with .png or .jpg"),
    ([*ONE, "EMPTY/a"], "cannot be written.*ends with .png or .jpg"),
    ([*ONE, "EMPTY/a.psd"], "a.psd: cannot be written"),               # PIL only reads this one
    ([*ONE, "EMPTY/a.xbm"], "a.xbm: cannot be written"),               # and this has no colours
    ([*ONE, "FILE/a.png"], "FILE/a.png: cannot be written"),
    ([*BOX, "--json", "FILE/a.json"], "--json .*FILE/a.json: cannot be written"),
    ([*BOX, "--json", "EMPTY"], "--json .*EMPTY: cannot be written.*a folder"),
    ([*BOX, "--predictions", "FILE/new/a.jsonl"], "--predictions .*cannot be written")])
def test_errors_come_before_the_models_load(flags, words, world, tmp_path, monkeypatch):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("no folder")
    flags = [str(flag).replace("EMPTY", f"{tmp_path}/EMPTY").replace("FILE", f"{tmp_path}/FILE")
             for flag in flags]
    monkeypatch.setattr(evaluate, "build_lens", lambda *given: pytest.fail("the models load"))
    message = refused("evaluate.py", "--data", world, *flags)
    assert re.search(words, message) and message.count("error:") == 1
    assert os.listdir(tmp_path / "EMPTY") == []


def test_one_image(world, checkpoint, tmp_path, monkeypatch):
    """Not the models' size, nor square; drawn at three times the size. What is printed is what is
    drawn. The two masks differ, and the box's lies in the box. It compiles nothing."""
    monkeypatch.setattr(evaluate, "decoding_cache", lambda *given: pytest.fail("it compiles"))
    record = next(record for record in data.read_records(world, ["shapes"], ["testA"])
                  if "apart" in record["groups"][0])
    image, out, tints = tmp_path / "wide.png", tmp_path / "new/overlay.png", {}
    Image.open(record["image"]).resize((150, 120)).save(image)
    before = np.array(Image.open(image).resize((450, 360))).astype(int)
    for way in "queries", "box":
        printed = call("evaluate.py", "--checkpoint", checkpoint, "--image", image, "--text",
                       record["expressions"][0], "--output", out, "--sam-prompt", way)
        after = np.array(Image.open(out)).astype(int)
        assert after.shape == (360, 450, 3) and "<answer>" in printed and str(out) in printed
        area = 9 * int(printed.partition("mask: ")[2].partition(" ")[0])
        box = 3 * np.array(json.loads(printed.partition("box: ")[2].partition(";")[0]))
        tints[way] = (abs(after - (0.45 * before + 0.55 * np.array([255, 0, 200]))) < 2).all(-1)
        edge = (after == 0).all(-1) & (before > 20).any(-1)    # the mask's own outermost pixels
        line = (after == [255, 230, 0]).all(-1)                # hides some of the mask
        assert area > 0 and area - line.sum() <= (tints[way] | edge).sum() <= area
        assert 0 < edge.sum() < 0.3 * area
        y, x = line.nonzero()
        assert abs(np.array([x.min(), y.min(), x.max(), y.max()]) - box).max() <= 3
    x1, y1, x2, y2 = box.astype(int)
    assert tints["box"][y1:y2, x1:x2].sum() > 0.9 * tints["box"].sum()
    both, either = tints["queries"] & tints["box"], tints["queries"] | tints["box"]
    assert both.sum() < either.sum()


def test_overlay_of_odd_boxes():
    """An inverted box is not drawn; one with huge numbers is, and takes no time."""
    black, mask = Image.new("RGB", (64, 64)), np.zeros((64, 64), bool)
    mask[10:20, 30:40] = True
    on_white = np.array(evaluate.draw_overlay(Image.new("RGB", (64, 64), "white"), mask, None))
    edge = [tuple(on_white[y, 280]) for y in (79, 80, 84)]
    assert edge == [(255,) * 3, (0,) * 3, (255, 114, 224)]
    overlay = np.array(evaluate.draw_overlay(black, mask, (60, 60, 4, 4)))
    assert overlay.shape == (512, 512, 3) and tuple(overlay[120, 280]) == (140, 0, 110)
    assert len(np.unique(overlay.reshape(-1, 3), axis=0)) == 2
    started = time.time()
    far = np.array(evaluate.draw_overlay(black, mask, (20.0, -1e300, float("inf"), 1e12)))
    assert time.time() - started < 2 and (far[:, 160] == [255, 230, 0]).all()
    assert (far[:, 200] < 150).all()


# --- tests/tools/gallery.py and curves.py ---------------------------------------------------------

def read_page(text):
    """-> list of [tag, attributes, the text in it alone], in order."""
    elements, parser = [], HTMLParser(convert_charrefs=True)
    parser.handle_starttag = lambda tag, names: elements.append([tag, dict(names), ""])
    parser.handle_data = lambda text: elements and elements[-1].append(elements[-1].pop() + text)
    parser.feed(text)
    parser.close()
    return elements


def test_a_gallery_escapes_what_it_shows(tmp_path):
    """A script tag, quotes and ends of elements in every text: there are the page's own elements
    and attributes, and no others. The images are inside the page, with box and masks on them."""
    mask, truth = np.zeros((64, 96), bool), np.zeros((64, 96), bool)
    mask[8:24, 8:40] = truth[32:56, 48:88] = True                # shown at five times the size
    r = {**row(10, 40, 0.25, name=EVIL, split=EVIL, expression=EVIL, completion=EVIL + "\n%s"),
         "box": [8, 8, 40, 24], "gt_box": [48, 32, 88, 56], "mask": encode(mask)}
    item = {"image": Image.new("RGB", (96, 64), (100, 100, 100)), "gt_mask": truth}
    gallery.write_gallery(tmp_path / "g.html", [("worst", r, item)], EVIL)
    page, own = read_page((tmp_path / "g.html").read_text()), read_page(gallery.PAGE % ("", ""))
    start = len(own) - 1                                         # before the page's own script
    figure, rest = page[start:-1], page[:start]
    assert [e[:2] for e in rest] == [e[:2] for e in own[:-1]] and page[-1] == own[-1]
    assert [e[0] for e in figure] == "figure div img img img p b br small pre".split()
    assert figure[0][1] == {"data-kind": "worst", "data-iou": "0.2500", "data-box": "0.2500",
                            "data-text": EVIL}
    texts = {tag: text for tag, _, text in page}
    assert texts["b"] == texts["h1"].strip() == EVIL and texts["pre"] == EVIL + "\n%s"
    assert texts["small"] == f"({EVIL}, {EVIL})"
    codes = [names["src"].removeprefix("data:image/jpeg;base64,") for _, names, _ in figure[2:5]]
    plain, true, drawn = (np.array(Image.open(io.BytesIO(base64.b64decode(code)))).astype(int)
                          for code in codes)
    inside = np.s_[60:100, 60:180], np.s_[180:260, 260:420]      # of the mask, of the ground truth
    for image, colors in (plain, (100, 100)), (true, (50, [22, 132, 66])), (
            drawn, ([162, 22, 132], 50)):
        assert image.shape == (320, 480, 3)
        assert all((abs(image[at] - color) < 12).all() for at, color in zip(inside, colors))
    for image, box in (true, r["gt_box"]), (drawn, r["box"]):    # its line is yellow
        y, x = (image[..., :2].min(-1) - image[..., 2] > 120).nonzero()
        assert abs(np.array([x.min(), y.min(), x.max(), y.max()]) - 5 * np.array(box)).max() <= 4


def test_the_gallery_of_a_run(whole, tmp_path, monkeypatch):
    """The rows of every split, each once, with their own image and ground truth."""
    cases, draw = [], gallery.draw_figure
    monkeypatch.setattr(gallery, "draw_figure", lambda *case: cases.append(case) or draw(*case))
    page = tmp_path / "new/a.html"
    call("gallery.py", whole.file, page, "--data", whole.root, preset="")
    assert f"<h1>{whole.file}: {', '.join(SPLITS)}</h1>" in page.read_text()
    assert {r["split"] for _, r, _ in cases} == set(SPLITS)
    assert len({r["id"] for _, r, _ in cases}) == len(cases) == page.read_text().count("<figure")
    assert {EVIL, "a box"} <= {r["expression"] for _, r, _ in cases}
    for _, r, item in cases:
        mask, _, box, _ = whole.truth[r["id"]]
        assert (item["id"], item["expression"]) == (r["id"], r["expression"]) and r in whole.rows
        assert (item["gt_mask"] == mask).all() and list(item["gt_box"]) == box
        assert item["image"].size == mask.shape[::-1]


def test_a_gallery_of_other_rows_or_other_data_is_refused(whole, world, tmp_path):
    r, file, page = whole.val[0], tmp_path / "rows.jsonl", tmp_path / "a.html"
    for content, words in (
            (None, "rows.jsonl: not readable.*evaluate.py --predictions"),
            ("no json\n", "line 1: not a row as evaluate.py --predictions writes it"),
            (json.dumps(r) + "\n[1]\n", "line 2: not a row"),
            (json.dumps({"id": "a"}), "line 1: not a row"),
            (json.dumps({**r, "expression": "another"}), "no row shapes/.*expression 'another'"),
            (json.dumps({**r, "id": "shapes/99999/0"}), "no row shapes/99999/0.*Name the folder"),
            (json.dumps({**r, "id": r["id"][:-1] + "9"}), "no row shapes/.*/9"),
            (json.dumps({**r, "split": "refcoco val"}), "is missing. Download")):
        if content:
            file.write_text(content)
        assert re.search(words, refused("gallery.py", file, page, "--data", world, preset=""))
    assert not page.exists()


def test_cases_to_show():
    """20 rows of IoU 0, 0.05, ...: the best and the worst three, and three of those between, the
    same ones each time; all of a short list."""
    rows = [row(i, 20) for i in range(20)]
    pick = lambda *given, **more: [(kind, r["intersection"])
                                   for kind, r in gallery.pick_cases(*given, **more)]
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(20)]
    cases = pick(mixed, number=3)
    assert cases[:6] == [*(("best", i) for i in (19, 18, 17)), *(("worst", i) for i in (0, 1, 2))]
    assert len(set(cases)) == 9 and {kind for kind, _ in cases[6:]} == {"random"}
    assert pick(rows, number=3) == cases != pick(rows, number=3, seed=1)
    assert pick(rows[:3]) == [("best", 2), ("worst", 0), ("random", 1)] and pick([]) == []
    assert pick(rows[:4]) == [("best", 3), ("best", 2), ("worst", 0), ("worst", 1)]


def test_curves(tmp_path, monkeypatch):
    """A panel for each column that the run has, with a mean over a twentieth of the steps."""
    flags = ["curves.py", tmp_path, tmp_path / "curves.png"]
    assert "metrics.jsonl is missing or empty" in refused(*flags, preset="")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [{"step": i, "reward": i / 10, "kl": 1.0, "mask_iou": 0.5} for i in range(40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figures, subplots = [], pyplot.subplots
    monkeypatch.setattr(pyplot, "subplots",
                        lambda *a, **k: figures.append(subplots(*a, **k)) or figures[-1])
    call(*flags, preset="")
    panels = [axis for axis in figures[0][1].flat if axis.axison]
    assert [axis.get_title() for axis in panels] == ["reward", "kl", "mask iou"]
    every, mean = (line.get_xydata() for line in panels[0].lines)
    assert every.tolist() == [[i + 1, i / 10] for i in range(40)]
    assert mean == pytest.approx(np.array([[i + 2, (i + 0.5) / 10] for i in range(39)]))
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
