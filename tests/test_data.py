"""data.py: every format on small hand-made data, every broken file by name, polygons against an
oracle, order across processes, the prompt and its frames, and the shapes world, whose English is
read back by an interpreter of its own."""
import builtins
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from pycocotools import mask as coco

import data
import world as shapes_world
from data import (Collator, EvaluationRows, LensError, TrainingStream, check, decode_mask, extent,
                  fill_polygon, find_datasets, load_item, load_picture, mllm_frame, read_dataset,
                  read_lines, read_reasonseg, read_records, read_refcoco, read_refs, rescale_box,
                  sam_picture, select, to_device, training_batches)
from rewards import answer_text, chat_messages, format_reward, parse_box

SIDE, CPU = 128, torch.device("cpu")


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm")


def refuses(action, *fragments):
    """The error is a LensError, not a subclass or something wrapped, and its one line says each of
    `fragments`."""
    with pytest.raises(LensError) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is LensError and "Traceback" not in message and "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message, message


# --- refs(*).p is a pickle from the internet ---

class Call:
    """Pickles as a call: whoever unpickles it runs function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("weapon", ["os.system", "builtins.eval"])
def test_a_pickle_that_calls_something_is_refused_and_not_run(weapon, protocol, tmp_path):
    path, marker = tmp_path / "refs(unc).p", tmp_path / "marker"
    call = Call(builtins.eval, f"open({str(marker)!r}, 'w')")
    if weapon == "os.system":
        call = Call(os.system, f"touch '{marker}'")
    path.write_bytes(pickle.dumps([{"ref_id": 1, "sentences": [call]}], protocol))
    # os.system is posix.system
    refuses(lambda: read_refs(path), path, weapon.split(".")[1], "Download it again")
    assert not marker.exists()
    pickle.loads(path.read_bytes())                             # the weapon was loaded
    assert marker.exists()


@pytest.mark.parametrize("content", [
    pickle.dumps([{"ref_id": np.int64(3)}], 2),
    pickle.dumps([{"ref_id": np.zeros(3)}], 2),
    pickle.dumps([Counter("ab")], 2),
    pickle.dumps([{"ref_id": 1}], 2)[:-4],
    b"",
    b"<html>404 Not Found</html>",
    b"\x80\x02}q\x00(U\x01a" + b"(" * 1000 + b"R.",
], ids=["numpy scalar", "numpy array", "a class", "truncated", "empty", "web page", "garbage"])
def test_a_file_that_is_not_plain_refs_is_refused_by_name(content, tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(content)
    refuses(lambda: read_refs(tmp_path / "refs(unc).p"), tmp_path / "refs(unc).p",
            "Download it again")


@pytest.mark.parametrize("content", [
    # [{'ref_id': 5, 'sent': 'caf\xe9', 'raw': u'caf\xe9'}] as Python 2's pickle writes it: str is
    # bytes (S, U), here latin1; unicode is V (raw-unicode-escape) or X (UTF-8)
    b"(lp0\n(dp1\nS'ref_id'\np2\nI5\nsS'sent'\np3\nS'caf\\xe9'\np4\nsS'raw'\np5\nVcaf\xe9\np6\nsa.",
    b"]q\x00}q\x01(U\x06ref_idq\x02K\x05U\x04sentq\x03U\x04caf\xe9q\x04"
    b"U\x03rawq\x05X\x05\x00\x00\x00caf\xc3\xa9q\x06ua.",
    b"\x80\x02]q\x00}q\x01(U\x06ref_idq\x02K\x05U\x04sentq\x03U\x04caf\xe9q\x04"
    b"U\x03rawq\x05X\x05\x00\x00\x00caf\xc3\xa9q\x06ua.",
], ids=["protocol 0", "protocol 1", "protocol 2"])
def test_what_python_2_wrote_is_read(content, tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(content)
    assert read_refs(tmp_path / "refs(unc).p") == [{"ref_id": 5, "sent": "café", "raw": "café"}]


# --- RefCOCO's layout ---

def corners(x1, y1, x2, y2):
    """A COCO polygon that covers the pixels x1 ... x2 - 1, y1 ... y2 - 1."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


# picture 12's object: two runs of a column each
SPOT = np.zeros((50, 24), np.uint8)
SPOT[10:14, 3] = SPOT[20:22, 4] = 1
# Column-major runs: 3 * 50 + 10 zeros, 4 ones, then 36 to the end of column 3 and 20 in column 4,
# 2 ones, the rest
COUNTS = [160, 4, 56, 2, 24 * 50 - 222]


class Refer:
    """A small data set as REFER lays it out: picture 9 of 40 x 30 pixels with three objects,
    picture 12 of 24 x 50."""

    def __init__(self, root, dataset="refcoco", by="unc"):
        self.root, self.dataset = root, dataset
        self.folder = root / "refer_seg" / dataset
        self.refs_file = self.folder / f"refs({by}).p"
        self.instances_file = self.folder / "instances.json"
        self.pictures = root / "refer_seg/images/mscoco/images/train2014"
        self.picture = self.pictures / "COCO_train2014_000000000009.jpg"
        self.folder.mkdir(parents=True)
        self.pictures.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0)
        for image_id, height, width in (9, 30, 40), (12, 50, 24):
            pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.pictures / f"COCO_train2014_{image_id:012d}.jpg")
        self.images = [{"id": 9, "height": 30, "width": 40,
                        "file_name": "COCO_train2014_000000000009.jpg"},
                       {"id": 12, "height": 50, "width": 24,
                        "file_name": "COCO_train2014_000000000012.jpg"}]
        compressed = coco.encode(np.asfortranarray(SPOT))["counts"].decode()
        self.annotations = [
            {"id": 100, "image_id": 9, "bbox": [4, 5, 16, 13],
             "segmentation": [corners(4, 5, 14, 15), corners(10, 8, 20, 18)]},
            {"id": 101, "image_id": 9, "bbox": [30.5, 2.25, 8, 4.5],
             "segmentation": [corners(30, 2, 38, 6)]},
            {"id": 102, "image_id": 12, "bbox": [3, 10, 2, 12],
             "segmentation": {"size": [50, 24], "counts": COUNTS}},
            {"id": 103, "image_id": 12, "bbox": [3, 10, 2, 12],
             "segmentation": {"size": [50, 24], "counts": compressed}},
            {"id": 104, "image_id": 9, "bbox": [0, 0, 5, 5],
             "segmentation": [corners(0, 0, 2, 3), corners(35, 20, 40, 30)]},
        ]
        self.refs = [self.ref(1, 100, 9, "train", "the left one", "left", "one on the left"),
                     self.ref(2, 101, 9, "val", "small one"),
                     self.ref(3, 102, 12, "train", "a spot", "the dots"),
                     self.ref(4, 103, 12, "testA", "a spot"),
                     self.ref(5, 104, 9, "train", "both {ends}")]
        self.save()

    def ref(self, ref_id, ann_id, image_id, split, *texts):
        sentences = [{"sent": text, "raw": text.upper(), "sent_id": i, "tokens": text.split()}
                     for i, text in enumerate(texts)]
        # as REFER: no such file
        return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split,
                "sentences": sentences,
                "category_id": 1, "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"}

    def save(self):
        self.refs_file.write_bytes(pickle.dumps(self.refs, 2))
        self.instances_file.write_text(json.dumps({"images": self.images,
                                                   "annotations": self.annotations}))

    def read(self):
        """What a run does: all records of a split, then every expression of every object."""
        return [load_item(record, i)
                for record in read_records(self.root, [self.dataset], ["train"])
                for i in range(len(record["texts"]))]


def test_records_by_hand(tmp_path):
    refer = Refer(tmp_path)
    first, spot, ends = read_refcoco(tmp_path, "refcoco", ["train"])
    assert first["id"] == "refcoco/1" and first["size"] == (30, 40) and first["split"] == "train"
    assert first["texts"] == ["the left one", "left", "one on the left"]       # sent, not raw
    # image_id's picture; file_name is no file
    assert first["image"] == str(refer.picture)
    assert first["box"] == (4, 5, 20, 18)                                      # 4 + 16, 5 + 13
    assert (spot["id"], spot["texts"], spot["size"]) == ("refcoco/3", ["a spot", "the dots"],
                                                         (50, 24))
    assert spot["box"] == (3, 10, 5, 22) and ends["box"] == (0, 0, 5, 5)
    val, = read_refcoco(tmp_path, "refcoco", ["val"])
    assert val["box"] == (30.5, 2.25, 38.5, 6.75) and val["split"] == "val"
    test, = read_refcoco(tmp_path, "refcoco", ["testA"])
    assert test["id"] == "refcoco/4"
    both = [(record["id"], record["split"])
            for record in read_refcoco(tmp_path, "refcoco", ["testA", "val"])]
    # in the file's order
    assert both == [("refcoco/2", "val"), ("refcoco/4", "testA")]


def test_items_and_masks_by_hand(tmp_path):
    Refer(tmp_path)
    records = read_records(tmp_path, ["refcoco"], ["train"])
    item = load_item(records[0], 2)
    assert (item["id"], item["text"], item["box"]) == ("refcoco/1/2", "one on the left",
                                                       (4, 5, 20, 18))
    assert item["image"].size == (40, 30) and item["image"].mode == "RGB"
    expected = np.zeros((30, 40), bool)
    expected[5:15, 4:14] = expected[8:18, 10:20] = True
    assert item["mask"].dtype == bool and (item["mask"] == expected).all()
    # 100 + 100, 4 x 7 of them twice
    assert item["mask"].sum() == 172
    assert item["ignore"].dtype == bool and item["ignore"].shape == (30, 40)
    assert not item["ignore"].any()
    # two parts far apart: 2 x 3 and 5 x 10
    ends = load_item(records[2], 0)["mask"]
    assert ends.sum() == 56 and ends[:3, :2].all() and ends[20:, 35:].all()
    assert (load_item(records[1], 0)["mask"] == SPOT.astype(bool)).all()       # uncompressed RLE
    compressed, = read_records(tmp_path, ["refcoco"], ["testA"])
    assert (load_item(compressed, 0)["mask"] == SPOT.astype(bool)).all()


def test_masks_against_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = np.asfortranarray(rng.random((17, 23)) < 0.3)
        rle = coco.encode(mask.astype(np.uint8))
        # column by column; the first run counts zeros
        runs, bits = [0], [0, *mask.T.ravel().tolist()]
        for before, bit in zip(bits, bits[1:]):
            runs = runs[:-1] + [runs[-1] + 1] if bit == before else runs + [1]
        for counts in (rle["counts"], rle["counts"].decode(), runs):
            assert (decode_mask({"size": [17, 23], "counts": counts}, (17, 23)) == mask).all()


def test_each_data_set_has_its_own_refs_file(tmp_path):
    Refer(tmp_path, "refcocog", "umd")
    (tmp_path / "refer_seg/refcocog/refs(google).p").write_bytes(b"not this one")
    Refer(tmp_path, "refcoco+")
    ids = [record["id"] for record in read_records(tmp_path, ["refcoco+", "refcocog"], ["train"])]
    assert ids == ["refcoco+/1", "refcoco+/3", "refcoco+/5", "refcocog/1", "refcocog/3",
                   "refcocog/5"]


def resaved(**changes):
    """Change entries of the first object: its ref, its annotation, its picture's entry."""
    def change(refer):
        for name, values in changes.items():
            getattr(refer, name)[0].update(values)
        refer.save()
    return change


def masked(segmentation, *size):
    if size:
        segmentation = {"size": size, "counts": segmentation}
    return resaved(annotations={"segmentation": segmentation})


def without_annotations(refer):
    refer.instances_file.write_text(json.dumps({"images": refer.images}))


def without_pictures(refer):
    for path in refer.pictures.iterdir():
        path.unlink()
    refer.pictures.rmdir()


BAD = {  # what is wrong: how it comes about, what the message must name, and the way out
    "no refs": (lambda r: r.refs_file.unlink(), "refs_file", "Download refcoco's annotations"),
    "no instances": (lambda r: r.instances_file.unlink(), "instances_file", "--preset tiny"),
    "no pictures": (without_pictures, "pictures", "COCO's train2014 pictures"),
    "one picture missing": (lambda r: r.picture.unlink(), "refs_file", "ref_id 1", "picture",
                            "Download COCO's train2014"),
    "truncated picture": (lambda r: r.picture.write_bytes(r.picture.read_bytes()[:-300]), "picture",
                          "again"),
    "text named jpg": (lambda r: r.picture.write_text("<html>404 Not Found</html>"), "picture",
                       "again"),
    "empty picture": (lambda r: r.picture.write_bytes(b""), "picture", "again"),
    "other size": (lambda r: Image.new("RGB", (30, 40)).save(r.picture), "picture", "(30, 40)",
                   "(40, 30)", "original"),
    "annotation id missing": (resaved(refs={"ann_id": 999}), "refs_file", "instances_file",
                              "ref_id 1", "999", "Download"),
    "image id missing": (resaved(refs={"image_id": 999}), "refs_file", "instances_file", "ref_id 1",
                         "999", "Download both"),
    "box to the right": (resaved(annotations={"bbox": [40, 5, 3, 3]}), "instances_file",
                         "ref_id 1, ann_id 100", "Download"),
    "box to the left": (resaved(annotations={"bbox": [-3, 5, 3, 3]}), "instances_file",
                        "ref_id 1, ann_id 100", "Download"),
    "box above": (resaved(annotations={"bbox": [4, -6, 3, 6]}), "instances_file",
                  "ref_id 1, ann_id 100", "Download both"),
    "box below": (resaved(annotations={"bbox": [4, 30, 3, 6]}), "instances_file",
                  "ref_id 1, ann_id 100", "Download both"),
    "box without width": (resaved(annotations={"bbox": [4, 5, 0, 3]}), "instances_file",
                          "ref_id 1, ann_id 100", "both"),
    "box without height": (resaved(annotations={"bbox": [4, 5, 3, 0]}), "instances_file",
                           "ref_id 1, ann_id 100", "both"),
    "no expression": (resaved(refs={"sentences": []}), "refs_file", "ref_id 1, ann_id 100",
                      "no expression"),
    "sentences of another kind": (resaved(refs={"sentences": [7]}), "refs_file",
                                  "ref_id 1, ann_id 100", "Download both"),
    "a ref of another kind": (lambda r: r.refs_file.write_bytes(pickle.dumps([r.refs[0], 7])),
                              "refs_file", "record 1"),
    "a number for a segmentation": (masked(7), "refcoco/1", "picture", "40 x 30", "damaged"),
    "a polygon unnested": (masked(corners(4, 5, 14, 15)), "refcoco/1", "picture", "flat list"),
    "points nested": (masked([[[4, 5], [14, 5], [14, 15]]]), "refcoco/1", "picture", "flat list"),
    "a list of RLEs": (masked([{"size": [30, 40], "counts": [1200]}]), "refcoco/1", "picture",
                       "flat list"),
    "RLE of another size": (masked([1200], 40, 30), "refcoco/1", "picture", "40 x 30 pixels",
                            "(30, 40) pixels"),
    "RLE too short": (masked([5, 5], 30, 40), "refcoco/1", "picture", "add up", "again"),
    "RLE too long": (masked([5, 5, 1191], 30, 40), "refcoco/1", "picture", "add up", "again"),
    "RLE below zero": (masked([1205, -5], 30, 40), "refcoco/1", "picture", "out of bounds",
                       "again"),
    "RLE of noise": (masked("hello", 30, 40), "refcoco/1", "picture", "damaged", "again"),
    "instances not JSON": (lambda r: r.instances_file.write_text("<html>"), "instances_file",
                           "Download it again"),
    "instances cut": (lambda r: r.instances_file.write_text(r.instances_file.read_text()[:-9]),
                      "instances_file", "again"),
    "instances a list": (lambda r: r.instances_file.write_text("[]"), "instances_file",
                         "Download it again"),
    "instances not UTF-8": (lambda r: r.instances_file.write_bytes(b'{"\xff": 1}'),
                            "instances_file", "Download it again"),
    "no annotations": (without_annotations, "instances_file", "annotations", "Download it again"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_that_names_the_file_and_the_way_out(name, tmp_path):
    refer = Refer(tmp_path)
    # whole until it is broken
    assert len(refer.read()) == 6
    breaks, *says = BAD[name]
    breaks(refer)
    paths = ("refs_file", "instances_file", "pictures", "picture")
    refuses(refer.read, *(getattr(refer, word) if word in paths else word for word in says))


def test_an_unknown_split_or_data_set_is_named(tmp_path):
    refer = Refer(tmp_path)
    refuses(lambda: read_records(tmp_path, ["refcoco", "refcocog"], ["train"]), "refcocog",
            "refs(umd).p", "Download")
    refuses(lambda: read_records(tmp_path, ["refcoco", "cups"], ["train"]),
            tmp_path / "cups/train.jsonl", "Download")
    refuses(lambda: read_records(tmp_path, ["refcoco"], ["train", "test"]), tmp_path, "'test'",
            "train, val, testA, testB")
    # of val: no train left
    refer.refs = refer.refs[1:2]
    refer.save()
    refuses(lambda: read_records(tmp_path, ["refcoco"], ["train"]), tmp_path, "'train' in refcoco.")
    assert len(read_records(tmp_path, ["refcoco"], ["val"])) == 1


def test_an_empty_segmentation_is_left_out_of_training_and_evaluated_as_no_mask(tmp_path, capsys,
                                                                                monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    refer = Refer(tmp_path)
    masked([])(refer)
    ids = lambda splits: [record["id"] for record in read_records(tmp_path, ["refcoco"], splits)]
    assert ids(["train"]) == ["refcoco/3", "refcoco/5"]
    told = "left out:\nrefcoco/1: no segmentation, left out of training\n"
    assert capsys.readouterr() == ("", told)
    # of many processes one tells
    monkeypatch.setenv("RANK", "1")
    assert ids(["train"]) == ["refcoco/3", "refcoco/5"] and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    # nothing was left out
    assert ids(["val"]) == ["refcoco/2"] and capsys.readouterr() == ("", "")
    resaved(refs={"split": "val"})(refer)
    assert ids(["val"]) == ["refcoco/1", "refcoco/2"] and capsys.readouterr() == ("", "")
    item = load_item(read_records(tmp_path, ["refcoco"], ["val"])[0], 0)
    assert item["mask"].shape == (30, 40) and not item["mask"].any() and not item["ignore"].any()
    assert item["box"] == (4, 5, 20, 18)                                        # as annotated


@pytest.mark.parametrize("segmentation", [
    [corners(5, 5, 5, 5)], [[4, 5, 14, 15]], [[4, 5]], [[]], {"size": [30, 40], "counts": [1200]},
    {"size": [30, 40], "counts": []}, {"size": [30, 40], "counts": ""},
], ids=["no area", "two points", "one point", "no point", "RLE of zeros", "RLE without counts",
        "RLE without a letter"])
def test_a_mask_without_a_pixel_is_no_error(segmentation, tmp_path):
    refer = Refer(tmp_path)
    masked(segmentation)(refer)
    item = refer.read()[0]
    assert item["id"] == "refcoco/1/0" and item["box"] == (4, 5, 20, 18)
    assert item["mask"].shape == (30, 40) and item["mask"].dtype == bool and not item["mask"].any()


def test_degenerate_polygons_are_passed_over(tmp_path):
    # pycocotools takes a first one of two points for a box, and then the rest too
    refer, polygon = Refer(tmp_path), corners(4, 5, 14, 15)
    expected = np.zeros((30, 40), bool)
    expected[5:15, 4:14] = True
    for some in (([0, 0, 30, 25], polygon), ([], [3, 3], polygon, [0, 0, 30, 25]),
                 ([7, 7] * 3, polygon)):
        masked(list(some))(refer)
        assert (refer.read()[0]["mask"] == expected).all()
    # three points do enclose something
    triangle = [0, 0, 10, 0, 0, 10]
    assert 45 <= decode_mask([triangle], (30, 40)).sum() <= 55


@pytest.mark.parametrize("box",
                         [(0, 0, 40, 30), (30, 20, 40, 30), (0, 0, 5, 5), (0, 29, 40, 30),
                          (39, 0, 40, 30)])
def test_an_object_may_touch_the_border(box, tmp_path):
    refer, (x1, y1, x2, y2) = Refer(tmp_path), box
    expected = np.zeros((30, 40), bool)
    expected[y1:y2, x1:x2] = True
    rle = coco.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"].decode()
    for segmentation in [corners(*box)], {"size": [30, 40], "counts": rle}:
        resaved(annotations={"segmentation": segmentation,
                             "bbox": [x1, y1, x2 - x1, y2 - y1]})(refer)
        item = refer.read()[0]
        assert (item["mask"] == expected).all() and item["box"] == extent(item["mask"]) == box
    resaved(annotations={"bbox": [x1 - 2.5, y1 - 1, x2 - x1 + 5, y2 - y1 + 2]})(refer)
    # a loose box may stick out
    assert refer.read()[0]["box"] == (x1 - 2.5, y1 - 1, x2 + 2.5, y2 + 1)


def test_polygons_against_pycocotools():
    rng = np.random.default_rng(3)
    for _ in range(40):
        polygons = [(rng.random(2 * rng.integers(3, 9)) * 25).tolist()
                    for _ in range(rng.integers(1, 4))]
        union = np.any([coco.decode(coco.frPyObjects([polygon], 17, 23))[..., 0]
                        for polygon in polygons], axis=0)
        mask = decode_mask(polygons, (17, 23))
        assert mask.shape == (17, 23) and mask.dtype == bool and (mask == union).all()


def test_the_extent_of_a_mask():
    mask = np.zeros((20, 30), bool)
    assert extent(mask) == (0, 0, 0, 0)
    mask[7, 11] = True
    assert extent(mask) == (11, 7, 12, 8)
    mask[3, 29] = mask[19, 13] = True
    assert extent(mask) == (11, 3, 30, 20) and all(type(v) is int for v in extent(mask))


def test_the_google_split(tmp_path):
    refer = Refer(tmp_path, "refcocog", "google")
    # train and val share picture 9
    refer.refs[1].update(image_id=9)
    refer.save()
    (refer.folder / "refs(umd).p").write_bytes(b"not this one")
    records = read_records(tmp_path, ["refcocog-google"], ["train", "val"])
    assert [(record["id"], record["split"]) for record in records] == [
        ("refcocog-google/1", "train"), ("refcocog-google/2", "val"),
        ("refcocog-google/3", "train"),
        ("refcocog-google/5", "train")]
    assert records[0]["image"] == records[1]["image"] == str(refer.picture)
    assert load_item(records[0], 0)["mask"].sum() == 172
    refer.refs_file.unlink()
    refuses(lambda: read_records(tmp_path, ["refcocog-google"], ["train"]), refer.refs_file,
            "refcocog.zip")


def test_a_prompt_above_the_limit_is_refused_and_not_cut(processor, tmp_path):
    items = Refer(tmp_path).read()[:1]
    length = len(Collator(processor, "qwen2_5_vl", SIDE, 10_000)(items)["ids"][0])
    assert len(Collator(processor, "qwen2_5_vl", SIDE, length)(items)["ids"][0]) == length
    refuses(lambda: Collator(processor, "qwen2_5_vl", SIDE, length - 1)(items),
            "refcoco/1/0", f"{length} tokens", f"limit is {length - 1}", "--max-prompt",
            "--max-pixels")


def test_an_error_in_a_loading_process_ends_with_its_one_line(tmp_path):
    refer = Refer(tmp_path)
    refer.picture.write_text("no picture")
    stream = TrainingStream(read_records(tmp_path, ["refcoco"], ["train"]), seed=0)
    alone, helped = (training_batches(stream, list, 0, 1, 3, 0, 1, workers, CPU) for workers in (0,
                                                                                                 1))
    with pytest.raises(LensError) as expected:
        list(alone)
    with pytest.raises(LensError) as caught:        # torch puts the process's traceback before it
        list(helped)
    assert str(refer.picture) in str(expected.value) and "\n" not in str(expected.value)
    assert str(caught.value).endswith(f"\ndata.LensError: {expected.value}\n")


@pytest.mark.parametrize("mode, suffix",
                         [("L", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("LA", "png"),
                          ("P", "gif"), ("CMYK", "tif"), ("CMYK", "jpg"), ("L", "jpg"),
                          ("RGB", "jpg")])
def test_every_kind_of_picture_comes_as_rgb(mode, suffix, tmp_path):
    # left half and right: whole blocks of JPEG
    pixels = np.full((16, 32, 3), 255, np.uint8)
    pixels[:, :16] = (255, 0, 0) if mode in ("P", "CMYK", "RGBA") else 0
    path = tmp_path / f"picture.{suffix}"
    options = {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(pixels).convert(mode).save(path, **options)
    assert Image.open(path).mode == mode
    picture = load_picture(path)
    assert picture.mode == "RGB" and picture.size == (32, 16)
    assert np.abs(np.asarray(picture).astype(int) - pixels).max() <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])                                 # COCO has both
def test_a_data_sets_picture_may_have_no_rgb(mode, tmp_path):
    refer = Refer(tmp_path)
    random_picture(40, 30).convert(mode).save(refer.picture)
    item = refer.read()[0]
    assert item["image"].mode == "RGB" and item["image"].size == (40, 30)
    assert item["mask"].sum() == 172


# by EXIF's tag 274
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
           5: lambda a: a.swapaxes(0, 1),
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


def turn(tag):
    exif = Image.Exif()
    exif[274] = tag
    return exif


@pytest.mark.parametrize("tag", UPRIGHT)
def test_a_cameras_rotation_is_followed_unless_the_pixels_as_stored_are_annotated(tag, tmp_path):
    stored = np.asarray(random_picture(9, 6))
    Image.fromarray(stored).save(tmp_path / "a.png", exif=turn(tag))
    read = lambda *size: np.asarray(load_picture(tmp_path / "a.png", *size))
    upright = UPRIGHT[tag](stored)
    assert np.array_equal(read(), upright) and np.array_equal(read(None), upright)
    assert np.array_equal(read((6, 9)), stored) and np.array_equal(read([6, 9]), stored)
    if tag > 4:
        assert np.array_equal(read((9, 6)), upright)
    else:
        refuses(lambda: read((9, 6)), tmp_path / "a.png", "(9, 6) pixels, annotated as (6, 9)")
    refuses(lambda: read((3, 3)), tmp_path / "a.png", "annotated as (3, 3)")


def test_rotated_pictures_of_a_data_set(tmp_path):
    refer = Refer(tmp_path)
    random_picture(40, 30).save(refer.picture, exif=turn(6))
    # COCO annotates the pixels as stored
    item = refer.read()[0]
    assert item["image"].size == (40, 30) and item["mask"].shape == (30, 40)
    assert item["mask"].sum() == 172
    assert np.array_equal(item["image"], Image.open(refer.picture))
    # another tool what a viewer shows
    refer.images[0].update(height=40, width=30)
    resaved(annotations={"segmentation": [corners(4, 25, 10, 35)], "bbox": [4, 25, 6, 10]})(refer)
    item = load_item(read_records(tmp_path, ["refcoco"], ["train"])[0], 0)
    assert item["image"].size == (30, 40) and item["mask"].shape == (40, 30)
    assert extent(item["mask"]) == (4, 25, 10, 35)
    assert np.array_equal(item["image"], np.rot90(Image.open(refer.picture), -1))


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (401, 2)])
def test_a_picture_too_long_for_the_processor_is_named(size, tmp_path, capsys):
    own(tmp_path, {"image": "long.png", "text": "a line", "box": [0, 0, 1, 1]})
    Image.new("RGB", size).save(tmp_path / "cups/long.png")
    says = tmp_path / "cups/long.png", f"{size} pixels", "above 200 times", "leave it out"
    refuses(lambda: load_picture(tmp_path / "cups/long.png"), *says)
    record, = read_records(tmp_path, ["cups"], ["train"])
    refuses(lambda: load_item(record, 0), *says)
    assert check(tmp_path) == 1 and "above 200 times" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (399, 2)])
def test_the_longest_picture_that_the_processor_takes(size, processor):
    picture = random_picture(*size)
    assert processor.image_processor(images=[picture])["image_grid_thw"].min() >= 1


# --- ReasonSeg ---

def reason(root, split, stem, text="the cup", shapes=(), encoding="utf-8", **save):
    """A picture of 30 x 20 pixels and its json as ReasonSeg has them; shapes: (label, points)."""
    folder = root / "reason_seg/ReasonSeg" / split
    folder.mkdir(parents=True, exist_ok=True)
    random_picture(30, 20).save(folder / f"{stem}.jpg", **save)
    shapes = [{"label": label, "labels": [label], "shape_type": "polygon",
               "image_name": f"{stem}.jpg", "points": points,
               "group_id": None, "group_ids": [None], "flags": {}} for label, points in shapes]
    content = json.dumps({"text": text, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
    (folder / f"{stem}.json").write_bytes(content.encode(encoding))
    return folder / f"{stem}.json"


def square(x1, y1, x2, y2):
    """ReasonSeg's points of the pixels x1 ... x2 - 1, y1 ... y2 - 1: the outline belongs to the
    object."""
    return [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]]


def area(*box, size=(20, 30)):
    mask = np.zeros(size, bool)
    mask[box[1]:box[3], box[0]:box[2]] = True
    return mask


def test_reasonseg_by_hand(tmp_path):
    reason(tmp_path, "train", "b_2", ["where tea goes", "the thing with a handle", "cup"],
           [("cup", square(4, 5, 10, 12))])
    reason(tmp_path, "train", "a_10", "one text that is no list", [("cup", square(4, 5, 10, 12))])
    for split in "val", "test":
        reason(tmp_path, split, "9", ["where tea goes", "the thing with a handle"],
               [("cup", square(0, 0, 30, 20))])
    folder = tmp_path / "reason_seg/ReasonSeg"
    (folder / "train/README.txt").write_text("no annotation")
    first, second = read_records(tmp_path, ["reasonseg"], ["train"])
    assert (first["id"], first["texts"]) == ("reasonseg/train/a_10", ["one text that is no list"])
    assert (second["id"], second["split"]) == ("reasonseg/train/b_2", "train")
    assert second["size"] is None
    assert second["texts"] == ["where tea goes", "the thing with a handle", "cup"]
    assert second["image"] == str(folder / "train/b_2.jpg")
    item = load_item(second, 1)
    assert (item["id"], item["text"]) == ("reasonseg/train/b_2/1", "the thing with a handle")
    assert item["image"].size == (30, 20) and item["image"].mode == "RGB"
    assert (item["mask"] == area(4, 5, 10, 12)).all() and not item["ignore"].any()
    assert item["box"] == (4, 5, 10, 12)
    records = read_records(tmp_path, ["reasonseg"], ["test", "val"])
    assert [(record["id"], record["texts"])
            for record in records] == [("reasonseg/test/9", ["where tea goes"]),
                                       ("reasonseg/val/9", ["where tea goes"])]
    assert load_item(records[0], 0)["mask"].all()
    assert len(EvaluationRows(records)) == 2


@pytest.mark.parametrize("encoding, text",
                         [("utf-8", "the café’s “naïve” cup"), ("utf-8", "кот 猫 🚗"),
                          ("utf-8-sig", "the café’s “naïve” cup"), ("utf-8-sig", "plain"),
                          ("cp1252", "the café’s “naïve” cup"), ("cp1252", "plain")])
def test_reasonsegs_encodings(encoding, text, tmp_path):
    path = reason(tmp_path, "val", "a", [text], encoding=encoding)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf") == (encoding == "utf-8-sig")
    record, = read_records(tmp_path, ["reasonseg"], ["val"])
    assert record["texts"] == [text]


def with_json(**changes):
    def change(path):
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value
                                    for name, value in content.items() if value is not None}))
    return change


BROKEN = {  # what is wrong with a ReasonSeg annotation
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "neither UTF-8 nor cp1252": lambda path: path.write_bytes(b'{"text": "\x81"}'),
    "a list": lambda path: path.write_text("[1, 2]"),
    "no json": lambda path: path.unlink(),
    "no picture": lambda path: path.with_suffix(".jpg").unlink(),
    "no text": with_json(text=None),
    "an empty list of texts": with_json(text=[]),
    "a number for a text": with_json(text=7),
    "numbers for texts": with_json(text=["cup", 7]),
    "no shapes": with_json(shapes=None),
    "a shape without points": with_json(shapes=[{"label": "cup"}]),
    "a shape without a label": with_json(shapes=[{"points": [[1, 2]]}]),
    "a number for a label": with_json(shapes=[{"label": 7, "points": [[1, 2]]}]),
    "words for points": with_json(shapes=[{"label": "cup", "points": [["a", "b"]]}]),
    "half a point": with_json(shapes=[{"label": "cup", "points": [[1, 2], [3]]}]),
    "an odd number": with_json(shapes=[{"label": "cup", "points": [1, 2, 3]}]),
    "points far beyond": with_json(shapes=[{"label": "cup", "points": [[10 ** 30, 2]]}]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reasonseg_file_is_named_and_left_out_and_does_not_stop(name, tmp_path, capsys):
    paths = [reason(tmp_path, "test", stem, ["a cup"], [("cup", square(4, 5, 10, 12))])
             for stem in "abc"]
    read = lambda: [record["id"][-1] for record in read_records(tmp_path, ["reasonseg"], ["test"])]
    assert read() == ["a", "b", "c"] and capsys.readouterr() == ("", "")
    BROKEN[name](paths[1])
    assert read() == ["a", "c"]
    told, = capsys.readouterr().err.removeprefix("left out:\n").splitlines()
    assert told.startswith(f"{paths[1]}: ") and "b.jpg" in told
    _, error, _ = read_reasonseg(tmp_path, "reasonseg", ["test"])
    assert type(error) is LensError and str(error) == told


LABELS = [("cup", "ignore"), ("target", "IGNORE area"), ("flagpole", "Ignored"),
          ("A Cup", "to ignore")]


@pytest.mark.parametrize("thing, ignore", LABELS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_the_largest_polygon_is_drawn_first(thing, ignore, order, tmp_path):
    # 20 x 16 pixels of the object, on them 10 x 10 to ignore, on these 3 x 3 of the object; a flag
    # over all is nothing
    shapes = [(thing, square(2, 2, 22, 18)), (ignore, square(6, 5, 16, 15)),
              (thing, square(9, 8, 12, 11)),
              (("flag", "Flag", "FLAG", "flag")[order[0]], square(0, 0, 30, 20))]
    reason(tmp_path, "val", "a", ["a cup"], [shapes[i] for i in order])
    item = load_item(read_records(tmp_path, ["reasonseg"], ["val"])[0], 0)
    hidden = area(6, 5, 16, 15) & ~area(9, 8, 12, 11)
    assert item["ignore"].dtype == item["mask"].dtype == bool and (item["ignore"] == hidden).all()
    assert (item["mask"] == area(2, 2, 22, 18) & ~hidden).all()
    assert item["mask"].sum() == 320 - 91 and item["box"] == (2, 2, 22, 18)


def test_a_small_object_within_a_large_ignored_area(tmp_path):
    shapes = [("cup", square(9, 8, 12, 11)), ("ignore", square(6, 5, 16, 15)),
              ("cup", square(14, 13, 20, 17))]
    reason(tmp_path, "val", "a", ["a cup"], shapes)
    item = load_item(read_records(tmp_path, ["reasonseg"], ["val"])[0], 0)
    # both smaller: they cover what is ignored
    objects = area(9, 8, 12, 11) | area(14, 13, 20, 17)
    assert (item["mask"] == objects).all()
    assert (item["ignore"] == area(6, 5, 16, 15) & ~objects).all()
    # of the objects alone
    assert item["box"] == (9, 8, 20, 17)


@pytest.mark.parametrize("shapes", [[], [("flag", square(1, 1, 9, 9))], [("cup", [])]])
def test_a_reasonseg_picture_without_an_object(shapes, tmp_path):
    reason(tmp_path, "val", "a", ["a cup"], shapes)
    item = load_item(read_records(tmp_path, ["reasonseg"], ["val"])[0], 0)
    assert not item["mask"].any() and not item["ignore"].any() and item["mask"].shape == (20, 30)
    assert item["box"] == (0, 0, 0, 0)


def test_reasonsegs_points_lose_their_fractions_and_its_pictures_stand_upright(tmp_path):
    reason(tmp_path, "val", "a", ["a cup"],
           [("cup", [[-0.9, 2.9], [4.99, 2.1], [4.5, 25.5], [0.2, 25.99]])], exif=turn(6))
    item = load_item(read_records(tmp_path, ["reasonseg"], ["val"])[0], 0)
    assert item["image"].size == (20, 30)
    assert (item["mask"] == area(0, 2, 5, 26, size=(30, 20))).all()


# --- fill_polygon ---

def oracle(points, size):
    """The same, slowly, for points inside: Bresenham's outline by its running error, then every
    pixel by itself, which lies inside if an odd number of sides pass to the left of it."""
    mask, sides = np.zeros(size, bool), list(zip(points, points[1:] + points[:1]))
    for (x, y), (x2, y2) in (sorted(side) for side in sides):
        dx, dy, up, error = x2 - x, abs(y2 - y), 1 if y2 > y else -1, 0
        for _ in range(max(dx, dy) + 1):
            mask[y, x] = True
            error += 2 * min(dx, dy)
            aside = error > max(dx, dy)
            error -= 2 * max(dx, dy) * aside
            x, y = (x + 1, y + up * aside) if dx >= dy else (x + aside, y + up)
    for y in range(size[0]):
        for x in range(size[1]):
            left = 0
            for (x1, y1), (x2, y2) in (sorted(side, key=lambda point: point[1]) for side in sides):
                left += y1 <= y < y2 and (y - y1) * (x2 - x1) < (x - x1) * (y2 - y1)
            mask[y, x] |= left % 2 == 1
    return mask


def drawing(text):
    return np.array([[c == "#" for c in row] for row in text.split()])


# a bow tie
# y = x + 1
DRAWN = [([[3, 1]], "....... ...#... ....... ......."),
         ([[1, 2], [5, 2]], "....... ....... .#####. ......."),
         ([[2, 0], [2, 3], [2, 0]], "..#.... ..#.... ..#.... ..#...."),
         ([[0, 0], [3, 3]], "#...... .#..... ..#.... ...#..."),
         ([[1, 0], [4, 0], [4, 2], [1, 2]], ".####.. .####.. .####.. ......."),
         ([[0, 3], [3, 0], [6, 3]], "...#... ..###.. .#####. #######"),
         ([[0, 0], [6, 3], [6, 0], [0, 3]], "##....# ####### ####### ##....#"),
         ([[-5, -5], [2, -5], [2, 1], [-5, 1]], "###.... ###.... ....... ......."),
         ([[5, 2], [99, 2], [99, 99], [5, 99]], "....... ....... .....## .....##"),
         ([[-9, -9], [99, -9], [99, 99], [-9, 99]], "####### ####### ####### #######"),
         ([[-3, 2], [20, 2]], "....... ....... ####### ......."),
         ([[-2, -1], [9, 10]], "....... #...... .#..... ..#...."),
         ([[7, 0], [9, 0], [9, 3]], "....... ....... ....... ......."),
         ([[-1, -1], [-1, 9], [-7, 4]], "....... ....... ....... ......."),
         ([[0, 4], [6, 4], [3, 9]], "....... ....... ....... ......."),
         ([[0, -1], [6, -1], [3, -9]], "....... ....... ....... ......."),
         ([], "....... ....... ....... .......")]


@pytest.mark.parametrize("points, text", DRAWN)
def test_polygons_by_hand(points, text):
    expected = drawing(text)
    # whichever is first, either way round
    for start in range(max(1, len(points))):
        some = np.array(points[start:] + points[:start]).reshape(-1, 2)
        for ordered in some, some[::-1]:
            mask = fill_polygon(ordered, (4, 7))
            assert mask.shape == (4, 7) and mask.dtype == bool
            assert (mask == expected).all(), mask.astype(int)


def test_polygons_against_the_oracle():
    rng = np.random.default_rng(0)
    for n in range(250):
        size = (20, 30) if n % 5 else (1, 30)
        points = np.stack([rng.integers(0, size[1], 1 + n % 9),
                           rng.integers(0, size[0], 1 + n % 9)], axis=-1)
        assert (fill_polygon(points, size) == oracle(points.tolist(), size)).all(), points.tolist()
        assert (fill_polygon(points + 0.99, size) == fill_polygon(points, size)).all()


@pytest.mark.parametrize("points, counts", [
    ([[31, -26], [29, 36], [-32, -13], [68, 42]],
     "49<0O100O010O10000O01O001O001O1O001O001O1O001O001O001Oe0c0"),
    ([[30, 4], [17, 40], [51, -27]], "b?2`02M3M3N000L"),
    ([[-783, 5], [2619, 22]], "82b000000000000000000000000000010O000000000000000000000000000G"),
    ([[-213, 22], [216, 16]], "W11c0000000000000000000000000000O010000000000000000000000000^O"),
])
def test_polygons_that_leave_the_picture_are_cut_as_opencv_cuts_them(points, counts):
    # drawn by OpenCV 4.11 (polylines, fillPoly) on 30 x 20 pixels; each cut shifts a side by less
    # than a pixel
    expected = coco.decode({"size": [20, 30], "counts": counts})
    assert (fill_polygon(np.array(points), (20, 30)) == expected).all()


# --- lines of json: GroundingSuite, folders of one's own ---

def own(root, *lines, name="cups", split="train"):
    """A folder of one's own, with a.png of 30 x 20 pixels; a line is bytes as they are, or what
    json writes."""
    (root / name).mkdir(parents=True, exist_ok=True)
    random_picture(30, 20).save(root / name / "a.png")
    path = root / name / f"{split}.jsonl"
    content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in content))
    return path


CUP = {"image": "a.png", "text": "the cup", "box": [4, 5, 10, 12.5]}
RLE = coco.encode(np.asfortranarray(area(4, 5, 10, 12).astype(np.uint8)))["counts"].decode()
# columns of 20: 5 + 4 x 20 zeros, 7 ones, ...
ZEROS_AND_ONES = [85, *[7, 13] * 5, 7, 408]


def test_a_folder_of_ones_own(tmp_path):
    polygon, rle = [corners(4, 5, 10, 12)], {"size": [20, 30], "counts": RLE}
    (tmp_path / "cups/sub").mkdir(parents=True)
    random_picture(24, 16).save(tmp_path / "cups/sub/b.jpg")
    Image.fromarray(area(1, 2, 9, 8, size=(16, 24))).save(tmp_path / "cups/sub/b_mask.png")
    own(tmp_path, CUP | {"mask": polygon}, CUP | {"mask": rle, "text": ["cup", "mug"]},
        {"image": "a.png", "text": "c", "mask": polygon},
        {"image": "sub/b.jpg", "text": "d", "mask": "sub/b_mask.png"},
        CUP | {"text": "кот 猫 🚗", "mask": None}, CUP | {"mask": polygon, "box": None},
        CUP | {"mask": {"size": [20, 30], "counts": ZEROS_AND_ONES}})
    own(tmp_path, CUP | {"mask": []}, split="val")
    records = read_records(tmp_path, ["cups"], ["train"])
    assert [record["id"] for record in records] == [f"cups/train/{n}" for n in range(1, 8)]
    assert {record["split"] for record in records} == {"train"}
    assert records[0]["image"] == str(tmp_path / "cups/a.png")
    assert [record["texts"] for record in records[:5]] == [["the cup"], ["cup", "mug"], ["c"],
                                                           ["d"], ["кот 猫 🚗"]]
    items = [load_item(record, 0) for record in records]
    assert [item["box"] for item in items] == [(4, 5, 10, 12.5), (4, 5, 10, 12.5), (4, 5, 10, 12),
                                               (1, 2, 9, 8),
                                               (4, 5, 10, 12.5), (4, 5, 10, 12), (4, 5, 10, 12.5)]
    for n in 0, 1, 2, 5, 6:
        assert (items[n]["mask"] == area(4, 5, 10, 12)).all() and not items[n]["ignore"].any()
    assert items[3]["image"].size == (24, 16)
    assert (items[3]["mask"] == area(1, 2, 9, 8, size=(16, 24))).all()
    # a box alone
    assert not items[4]["mask"].any() and items[4]["ignore"].all()
    assert items[4]["mask"].shape == (20, 30)
    # an empty mask is none to ignore
    val, = read_records(tmp_path, ["cups"], ["val"])
    assert val["id"] == "cups/val/1" and not load_item(val, 0)["mask"].any()
    assert not load_item(val, 0)["ignore"].any()


@pytest.mark.parametrize("mode, on",
                         [("1", 1), ("L", 1), ("L", 255), ("P", 1), ("I;16", 300),
                          ("RGB", (0, 0, 3)),
                          ("RGB", (255, 255, 255)), ("RGBA", (9, 0, 0, 255)), ("LA", (7, 255))])
def test_a_mask_is_a_picture_of_any_mode(mode, on, tmp_path):
    mask = Image.new(mode, (30, 20), {"RGBA": (0, 0, 0, 255), "LA": (0, 255)}.get(mode, 0))
    if mode == "P":
        # its numbers count, not their colours
        mask.putpalette([255, 255, 255, 0, 0, 0])
    mask.paste(on, (4, 5, 10, 12))
    own(tmp_path, {"image": "a.png", "text": "cup", "mask": "m.png"})
    mask.save(tmp_path / "cups/m.png")
    assert Image.open(tmp_path / "cups/m.png").mode == mode
    item = load_item(read_records(tmp_path, ["cups"], ["train"])[0], 0)
    assert item["mask"].dtype == bool and (item["mask"] == area(4, 5, 10, 12)).all()
    assert item["box"] == (4, 5, 10, 12)


@pytest.mark.parametrize("line",
                         ['"text": "a\u2028b\x85c"'.encode(), b'"text": "a\\u2028b\\u0085c"'])
def test_a_text_may_hold_what_some_take_for_the_end_of_a_line(line, tmp_path):
    # a BOM, CR and LF
    own(tmp_path, b'\xef\xbb\xbf{"image": "a.png", "box": [1, 2, 3, 4], ' + line + b"}\r", CUP)
    first, second = read_records(tmp_path, ["cups"], ["train"])
    assert first["texts"] == ["a\u2028b\x85c"] and second["id"] == "cups/train/2"


BAD_LINES = {  # what is wrong: the line, and what the message says of it
    "no json": (b"{'image': 'a.png'}", "JSONDecodeError"),
    "nothing": (b"", "JSONDecodeError"),
    "no UTF-8": (b'{"image": "a.png", "text": "caf\xe9", "box": [1, 2, 3, 4]}',
                 "UnicodeDecodeError"),
    "a list": ([1], "TypeError"),
    "no image": ({"text": "cup", "box": [1, 2, 3, 4]}, "'image'"),
    "a number for an image": (CUP | {"image": 7}, "TypeError"),
    "a picture that is not there": (CUP | {"image": "b.png"}, "cups/b.png is missing"),
    "no text": ({"image": "a.png", "box": [1, 2, 3, 4]}, "'text'"),
    "an empty list of texts": (CUP | {"text": []}, "a text"),
    "a number for a text": (CUP | {"text": 7}, "TypeError"),
    "numbers for texts": (CUP | {"text": ["cup", 7]}, "a text"),
    "neither mask nor box": ({"image": "a.png", "text": "cup"}, "a mask or a box"),
    "an empty mask and no box": ({"image": "a.png", "text": "cup", "mask": []}, "a mask or a box"),
    "a box of three": (CUP | {"box": [1, 2, 3]}, "ValueError"),
    "a box of five": (CUP | {"box": [1, 2, 3, 4, 5]}, "ValueError"),
    "a box of words": (CUP | {"box": ["a", "b", "c", "d"]}, "ValueError"),
    "a box from right to left": (CUP | {"box": [3, 2, 1, 4]}, "no box"),
    "a box without height": (CUP | {"box": [1, 4, 3, 4]}, "no box"),
    "an infinite box": (b'{"image": "a.png", "text": "cup", "box": [1, 2, 1e999, 4]}', "no box"),
    "a box of NaN": (b'{"image": "a.png", "text": "cup", "box": [1, NaN, 3, 4]}', "no box"),
    "a box far beyond": (CUP | {"box": [1, 2, 10 ** 400, 4]}, "OverflowError"),
    "RLE without a size": (CUP | {"mask": {"counts": RLE}}, "'size'"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number(name, tmp_path):
    line, *says = BAD_LINES[name]
    path = own(tmp_path, CUP, line, CUP)
    refuses(lambda: read_records(tmp_path, ["cups"], ["train"]), f"{path}, line 2: ", "damaged",
            *says)
    # it does not stop --check
    first, error, third = read_lines(tmp_path, "cups", ["train"])
    assert type(error) is LensError
    assert (first["id"], third["id"]) == ("cups/train/1", "cups/train/3")


BAD_MASKS = {  # what only opening the picture can tell
    "a mask that is not there": ("m.png", "cups/m.png"),
    "a folder": (".", "IsADirectoryError"),
    "no picture": ("train.jsonl", "cups/train.jsonl"),
    "a mask of another size": ("b.png", "(20, 30) pixels"),
    "a polygon unnested": (corners(4, 5, 10, 12), "flat list"),
    "points nested": ([[[4, 5], [9, 5], [9, 12], [4, 12]]], "flat list"),
    "a number": (7, "TypeError"),
    "RLE too short": ({"size": [20, 30], "counts": [5]}, "add up"),
    "RLE of noise": ({"size": [20, 30], "counts": "?!"}, "RLE"),
    "RLE without counts": ({"size": [20, 30]}, "'counts'"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_bad_mask_is_named_by_its_object(name, tmp_path):
    mask, *says = BAD_MASKS[name]
    own(tmp_path, CUP, CUP | {"mask": mask})
    Image.new("L", (20, 30)).save(tmp_path / "cups/b.png")
    records = read_records(tmp_path, ["cups"], ["train"])
    refuses(lambda: load_item(records[1], 0), "cups/train/2", tmp_path / "cups/a.png",
            "30 x 20 pixels", "make it", *says)


@pytest.mark.parametrize("size", [[30, 20], [20, 30, 3], ["a", "b"], [-20, 30]])
def test_a_picture_of_another_size_than_its_mask_says_is_named(size, tmp_path):
    own(tmp_path, CUP | {"mask": {"size": size, "counts": RLE}})
    record, = read_records(tmp_path, ["cups"], ["train"])
    refuses(lambda: load_item(record, 0), tmp_path / "cups/a.png", "(30, 20) pixels",
            "Take the original")
    assert check(tmp_path) == 1


def suite(root, *class_ids, file="groundingsuite/GroundingSuite-Eval.jsonl", pictures="COCO",
          **changes):
    """GroundingSuite-Eval as published, one object of 30 x 20 pixels per class id."""
    (root / pictures / "unlabeled2017").mkdir(parents=True)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for idx, class_id in enumerate(class_ids):
        random_picture(30, 20, idx).save(root / pictures / f"unlabeled2017/{idx:012d}.jpg")
        rows.append({"idx": idx, "image_path": f"unlabeled2017/{idx:012d}.jpg",
                     "class_id": class_id, "label": "cup",
                     "caption": f"A cup, number {idx}.", "box": [3.1999999, 4.5, 10.75, 13.25],
                     "segmentation": {"size": [20, 30], "counts": RLE}} | changes)
    (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / file


@pytest.mark.parametrize("file",
                         ["groundingsuite/GroundingSuite-Eval.jsonl",
                          "GroundingSuite/GroundingSuite-Eval.jsonl",
                          "GroundingSuite-Eval.jsonl"])
@pytest.mark.parametrize("pictures", ["COCO", "coco"])
def test_grounding_suite_by_hand(file, pictures, tmp_path):
    suite(tmp_path, 1, 2, 3, 4, 4, file=file, pictures=pictures)
    records = read_records(tmp_path, ["groundingsuite"], ["eval"])
    assert [record["class"] for record in records] == ["stuff", "part", "multi", "single", "single"]
    assert [record["id"] for record in records] == [f"groundingsuite/eval/{n}" for n in range(1, 6)]
    item = load_item(records[2], 0)
    assert item["text"] == "A cup, number 2." and (item["mask"] == area(4, 5, 10, 12)).all()
    assert not item["ignore"].any()
    assert item["box"] == (3.1999999, 4.5, 10.75, 13.25)                        # loose, as it is
    assert np.array_equal(item["image"],
                          Image.open(tmp_path / pictures / "unlabeled2017/000000000002.jpg"))
    assert records[0]["split"] == "eval" and records[0]["size"] == (20, 30)
    assert find_datasets(tmp_path) == {"groundingsuite": ["eval"]}


def test_grounding_suite_is_for_evaluation(tmp_path):
    path = suite(tmp_path, 1, 2)
    refuses(lambda: read_records(tmp_path, ["groundingsuite"], ["train"]),
            "'train' in groundingsuite", "It has eval.")
    refuses(lambda: read_records(tmp_path, ["groundingsuite"], ["eval", "val"]),
            "'val' in groundingsuite")
    path.unlink()
    refuses(lambda: read_records(tmp_path, ["groundingsuite"], ["eval"]),
            "GroundingSuite-Eval.jsonl is missing", "Download")


@pytest.mark.parametrize("changes, says",
                         [({"class_id": 5}, "KeyError(5)"), ({"caption": None}, "a text"),
                          ({"segmentation": None, "box": None}, "a mask or a box"),
                          ({"image_path": "unlabeled2017/7.jpg"},
                           "unlabeled2017/7.jpg is missing")])
def test_a_bad_line_of_grounding_suite(changes, says, tmp_path):
    path = suite(tmp_path, 1, **changes)
    refuses(lambda: read_records(tmp_path, ["groundingsuite"], ["eval"]), f"{path}, line 1: ", says)


# --- all together ---

def everything(root):
    """Every data set but the shapes world, all of it in order."""
    refer, google = Refer(root), Refer(root, "refcocog", "google")
    google.refs = google.refs[:2]
    google.save()
    (google.folder / "refs(umd).p").write_bytes(pickle.dumps(refer.refs[:1], 2))
    for split, stems in {"train": "ab", "val": "a", "test": "abc"}.items():
        for stem in stems:
            reason(root, split, stem, ["a cup", "a mug"], [("cup", square(4, 5, 10, 12))])
    suite(root, 1, 4)
    own(root, CUP | {"mask": [corners(4, 5, 10, 12)], "text": ["cup", "mug"]}, CUP)
    own(root, CUP, split="val")
    return refer


def test_every_data_set_is_found(tmp_path):
    assert find_datasets(tmp_path) == {} == find_datasets(tmp_path / "nowhere")
    everything(tmp_path)
    (tmp_path / "not/deeper").mkdir(parents=True)
    (tmp_path / "not/deeper/train.jsonl").write_text("")
    assert find_datasets(tmp_path) == {
        "refcoco": ["train", "val", "testA", "testB"], "refcocog": ["train", "val", "test"],
        "refcocog-google": ["train", "val"], "reasonseg": ["train", "val", "test"],
        "groundingsuite": ["eval"],
        "cups": ["train", "val"]}


def test_data_sets_mix_in_the_order_asked_for(processor, tmp_path):
    everything(tmp_path)
    ids = lambda *datasets: [record["id"] for record in read_records(tmp_path, datasets, ["train"])]
    assert ids("reasonseg", "cups", "refcoco") == ["reasonseg/train/a", "reasonseg/train/b",
                                                   "cups/train/1", "cups/train/2",
                                                   "refcoco/1", "refcoco/3", "refcoco/5"]
    assert ids("refcoco", "reasonseg")[:4] == ["refcoco/1", "refcoco/3", "refcoco/5",
                                               "reasonseg/train/a"]
    both = read_records(str(tmp_path), ["cups", "refcocog-google"], ["val", "train"])
    assert [(record["id"], record["split"]) for record in both] == [
        ("cups/val/1", "val"), ("cups/train/1", "train"), ("cups/train/2", "train"),
        ("refcocog-google/1", "train"),
        ("refcocog-google/2", "val")]
    records = read_records(tmp_path, ["refcoco", "reasonseg", "cups"], ["train"])
    collate = Collator(processor, "qwen2_5_vl", SIDE, 2048)
    batch, = training_batches(TrainingStream(records, seed=0), collate, 0, 1, 7, 0, 1, 0, CPU)
    objects = sorted(key.rpartition("/")[0] for key in batch["keys"])
    assert objects == sorted(record["id"] for record in records)
    has_mask = [weights.any().item() for weights in batch["low_weights"]]
    assert has_mask == ["cups/train/2" not in key for key in batch["keys"]]


@pytest.mark.parametrize("dataset, split, gone, missing, download", [
    ("refcoco", "val", "refer_seg/refcoco", "refer_seg/refcoco/refs(unc).p", "refcoco.zip"),
    ("refcoco", "val", "refer_seg/images", "refer_seg/images/mscoco/images/train2014", "train2014"),
    ("refcocog", "train", "refer_seg/refcocog/instances.json", "refer_seg/refcocog/instances.json",
     "refcocog.zip"),
    ("reasonseg", "test", "reason_seg/ReasonSeg/test", "reason_seg/ReasonSeg/test", "LISA"),
    ("reasonseg", "train", "reason_seg", "reason_seg/ReasonSeg/train", "LISA"),
    ("groundingsuite", "eval", "groundingsuite", "GroundingSuite-Eval.jsonl", "unlabeled2017"),
    ("groundingsuite", "eval", "COCO", "COCO", "unlabeled2017"),
    ("cups", "train", "cups", "cups/train.jsonl", "your own"),
    ("cups", "val", "cups/val.jsonl", "cups/val.jsonl", "your own"),
], ids=str)
def test_what_is_missing_is_named_with_what_to_download(dataset, split, gone, missing, download,
                                                        tmp_path):
    everything(tmp_path)
    assert read_records(tmp_path, [dataset], [split])
    (tmp_path / gone).rename(tmp_path.parent / f"{tmp_path.name}.gone")
    refuses(lambda: read_records(tmp_path, [dataset], [split]), f"{tmp_path / missing} is missing",
            download, "tiny")


@pytest.mark.parametrize("dataset, split, says", [
    ("refcoco", "test", "train, val, testA, testB"), ("refcocog", "testA", "train, val, test."),
    ("refcocog-google", "test", "train, val."), ("groundingsuite", "val", "eval."),
    ("reasonseg", "testA", "ReasonSeg/testA is missing"),
    ("cups", "test", "cups/test.jsonl is missing")])
def test_a_split_that_a_data_set_lacks_is_named(dataset, split, says, tmp_path):
    everything(tmp_path)
    refuses(lambda: read_records(tmp_path, [dataset], [split]), tmp_path, split, says)


def counted(printed):
    """--check's lines -> {data set and split: (objects, expressions, without a mask, broken)}, the
    same of what is published, and all other lines."""
    line = (r"(\S+ +\w+) +(\d+) objects, +(\d+) expressions \(published: (.+)\), "
            r"(\d+) without a mask, (\d+) broken")
    counts, published, told = {}, {}, []
    for row in printed.splitlines():
        if match := re.fullmatch(line, row):
            name = " ".join(match[1].split())
            counts[name], published[name] = tuple(map(int, match.group(2, 3, 5, 6))), match[4]
        else:
            told.append(row)
    return counts, published, told


WHOLE = {"refcoco train": (3, 6, 0, 0), "refcoco val": (1, 1, 0, 0), "refcoco testA": (1, 1, 0, 0),
         "refcoco testB": (0, 0, 0, 0), "refcocog train": (1, 3, 0, 0),
         "refcocog val": (0, 0, 0, 0),
         "refcocog test": (0, 0, 0, 0), "refcocog-google train": (1, 3, 0, 0),
         "refcocog-google val": (1, 1, 0, 0),
         "reasonseg train": (2, 4, 0, 0), "reasonseg val": (1, 1, 0, 0),
         "reasonseg test": (3, 3, 0, 0),
         "groundingsuite eval": (2, 2, 0, 0), "cups train": (2, 3, 0, 0), "cups val": (1, 1, 0, 0)}


def test_check_counts_what_is_whole(tmp_path, capsys):
    everything(tmp_path)
    assert check(tmp_path) == 0
    counts, published, told = counted(capsys.readouterr().out)
    assert counts == WHOLE and told == []
    assert published["refcoco train"] == "42404/120624" and published["reasonseg train"] == "239/?"
    assert published["groundingsuite eval"] == "3715/3715" and published["cups val"] == "-"


def test_check_names_and_counts_what_is_broken(tmp_path, capsys):
    refer = everything(tmp_path)
    turned = turn(6)
    folder = tmp_path / "reason_seg/ReasonSeg"
    (folder / "test/b.json").write_text("{")                                    # left out
    (folder / "train/a.jpg").write_text("no picture")
    # not broken: upright, a mask is drawn anyway
    random_picture(30, 20).save(folder / "val/a.jpg", exif=turned)
    own(tmp_path, CUP, b"{", CUP | {"mask": "m.png"}, CUP | {"mask": []},
        CUP | {"image": "turned.jpg", "mask": "turned.png"})
    random_picture(30, 20).save(tmp_path / "cups/turned.jpg", exif=turned)
    Image.new("L", (20, 30), 255).save(tmp_path / "cups/turned.png")
    path = suite(tmp_path, 1, 7, file="GroundingSuite-Eval.jsonl", pictures="coco")
    (tmp_path / "groundingsuite/GroundingSuite-Eval.jsonl").unlink()
    # refs 3 and 5, of train, are broken
    refer.refs[2]["ann_id"] = 999
    refer.annotations[4]["segmentation"] = corners(0, 0, 2, 3)
    refer.refs += [refer.ref(6, 105, 9, "testB", "nothing"),
                   refer.ref(7, 100, 13, "testB", "no picture"),
                   refer.ref(8, 100, 14, "testB", "another size")]
    refer.annotations.append(refer.annotations[0] | {"id": 105, "segmentation": []})
    refer.images += [{"id": 13, "height": 30, "width": 40}, {"id": 14, "height": 30, "width": 41}]
    random_picture(40, 30).save(refer.pictures / "COCO_train2014_000000000014.jpg")
    refer.save()
    (folder / "val").rename(folder / "val.zip")
    assert check(tmp_path) == 1
    counts, _, told = counted(capsys.readouterr().out)
    assert counts == WHOLE | {
        "refcoco train": (1, 3, 0, 2), "refcoco testB": (1, 1, 1, 2),
        "reasonseg train": (1, 2, 0, 1),
        "reasonseg val": (0, 0, 0, 1), "reasonseg test": (2, 2, 0, 1),
        "groundingsuite eval": (1, 1, 0, 1),
        "cups train": (3, 3, 1, 2)}
    names = [f"{refer.refs_file}, ref_id 3, ann_id 999", "refcoco/5 ",
             "000000000013.jpg is missing",
             "000000000014.jpg: (40, 30) pixels, annotated as (41, 30)",
             str(folder / "train/a.jpg"),
             f"{folder / 'val'} is missing", str(folder / "test/b.json"), f"{path}, line 2",
             f"{tmp_path / 'cups/train.jsonl'}, line 2", "cups/train/3"]
    assert len(told) == len(names) and all(name in row for name, row in zip(names, told)), told


def test_check_from_the_command_line(tmp_path):
    own(tmp_path, CUP)
    done = run(sys.executable, "data.py", "--check", tmp_path)
    assert counted(done.stdout)[0] == {"cups train": (1, 1, 0, 0)}
    own(tmp_path, CUP, b"{")
    done = run(sys.executable, "data.py", "--check", tmp_path, check=False)
    assert done.returncode == 1 and f"{tmp_path / 'cups/train.jsonl'}, line 2" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_check_finds_nothing(tmp_path, capsys):
    assert check(tmp_path) == 1
    assert f"{tmp_path}: no dataset here" in capsys.readouterr().out

# --- order and batches ---

@pytest.fixture
def records(tmp_path):
    """Nine objects of one to three expressions each."""
    refer = Refer(tmp_path)
    refer.refs = [refer.ref(n, 100, 9, "train",
                            *(f"object {n}, words {i}" for i in range(1 + n % 3)))
                  for n in range(9)]
    refer.save()
    return read_records(tmp_path, ["refcoco"], ["train"])


def keys(items):
    return [item["id"] for item in items]


def ref_id(key):
    return int(key.split("/")[1])


def test_an_item_of_the_stream_depends_on_nothing_but_its_place(records):
    stream = TrainingStream(records, seed=3)
    ids = keys(stream[k] for k in range(45))
    # another order, another object
    places = random.Random(0).sample(range(45), 45)
    assert keys(TrainingStream(records, seed=3)[k] for k in places) == [ids[k] for k in places]
    other = keys(TrainingStream(records, seed=4)[k] for k in range(45))
    assert list(map(ref_id, other)) != list(map(ref_id, ids))
    # the same objects, of other words
    assert sorted(other[:9]) != sorted(ids[:9])


def test_an_epoch_holds_every_object_once_in_an_order_of_its_own(records):
    stream = TrainingStream(records, seed=3)
    epochs = [[ref_id(stream[9 * e + k]["id"]) for k in range(9)] for e in range(8)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_the_expression_is_drawn_anew_in_each_epoch_from_the_objects_own(records, monkeypatch):
    items = [TrainingStream(records, seed=3)[k] for k in range(9)]
    for item in items:
        n, i = map(int, item["id"].split("/")[1:])
        assert item["text"] == f"object {n}, words {i}"
    # many, without pictures
    monkeypatch.setattr(data, "load_item", lambda record, i: {"id": f"{record['id']}/{i}"})
    stream = TrainingStream(records, seed=3)
    drawn = Counter(stream[k]["id"] for k in range(9 * 300))
    for n in range(9):
        shares = [drawn[f"refcoco/{n}/{i}"] for i in range(1 + n % 3)]
        # 100 +- 25 is three deviations
        assert sum(shares) == 300 and min(shares) > 0.75 * 300 / len(shares)
    # and for each object by itself: 2, 5 and 8, of three expressions each, agree in a ninth of the
    # epochs, 33 +- 5.4
    epochs = [{ref_id(key): key[-1] for key in keys(stream[9 * e + k] for k in range(9))}
              for e in range(300)]
    assert 15 < sum(e[2] == e[5] == e[8] for e in epochs) < 55


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_a_step_holds_the_same_items_on_any_number_of_processes(records, world, start):
    def batches(rank, world, start):
        return list(training_batches(TrainingStream(records, seed=3), keys, start, 6, 4, rank,
                                     world, 0, CPU))

    ranks = [batches(rank, world, start) for rank in range(world)]
    stream = TrainingStream(records, seed=3)
    assert all(len(rank) == 6 - start for rank in ranks)
    # 24 items: into the third epoch of 9
    for step, shares in zip(range(start, 6), zip(*ranks)):
        assert all(len(share) == 4 // world for share in shares)
        assert sum(shares, []) == keys(stream[k] for k in range(4 * step, 4 * step + 4))


def test_worker_processes_change_nothing(records):
    alone, helped = (list(training_batches(TrainingStream(records, seed=3), keys, 1, 6, 4, 0, 1, n,
                                           CPU)) for n in (0, 2))
    assert alone == helped


def test_evaluation_takes_every_expression_once(records):
    rows = EvaluationRows(records)
    assert len(rows) == rows.total == 3 * (1 + 2 + 3)
    assert keys(rows[k] for k in range(18)) == [f"refcoco/{n}/{i}" for n in range(9)
                                                for i in range(1 + n % 3)]
    assert rows[4]["text"] == "object 2, words 1"


# 0, 1.5, 3, 4.5, 6
@pytest.mark.parametrize("limit, kept", [
    (None, range(7)), (0, range(7)), (7, range(7)), (8, range(7)), (1000, range(7)),
    (1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (5, [0, 1, 3, 4, 6]),
])
def test_a_limit_takes_rows_evenly(limit, kept):
    rows = EvaluationRows([{"texts": "ab"}, {"texts": "c"}, {"texts": "defg"}], limit)
    assert ["abcdefg".index(record["texts"][i]) for record, i in rows.rows] == list(kept)
    assert len(rows) == len(kept) and rows.total == 7


def test_any_limit_takes_the_ends_and_equal_steps():
    for total in range(2, 60):
        for limit in range(2, total):
            taken = [i for _, i in EvaluationRows([{"texts": range(total)}], limit).rows]
            steps = np.diff(taken)
            assert len(taken) == limit and taken[0] == 0 and taken[-1] == total - 1
            assert steps.min() >= 1 and steps.max() - steps.min() <= 1


# --- the prompt, the answer, the frames ---

FIG_4 = ('You are a helpful assistant. Find the object that best matches "',
         '''" and provide its bounding box.

Please:
1. Analyze all objects in the image carefully
2. Compare candidates against the target description
3. Select the most closely matching object
4. Provide precise bounding box coordinates

Format your response as:
<think>
[Your step-by-step analysis and reasoning]
</think>
<answer>
```json
[
  {"bbox_2d": [x1,y1,x2,y2], "label": question}
]
```
</answer>''')
EXPRESSIONS = ["the red circle", "{object}", "a {object} in {braces} {0} {", 'the "left" one\\n',
               "%s %(x)d", "кот 猫 🚗", ""]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_the_conversation_of_figure_4(text):
    system, user = chat_messages(text)
    assert system == {"role": "system", "content": [{"type": "text", "text": text.join(FIG_4)}]}
    assert user == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_answer_is_read_back(text):
    answer, written = answer_text((0.4, 128.6, 364.9, 347), text), (0, 129, 365, 347)
    assert parse_box(answer) == written and format_reward(answer) == 0.0        # no reasoning
    full = answer_text((0.4, 128.6, 364.9, 347), text, "The car is on the left.")
    assert parse_box(full) == written and format_reward(full) == 1.0
    assert full == f"<think>\nThe car is on the left.\n</think>\n{answer}"
    row, = json.loads(answer.split("```json")[1].split("```")[0])
    # in its own letters, not escaped
    assert '"' in text or "\\" in text or f'"label": "{text}"' in answer
    assert row == {"bbox_2d": list(written), "label": text}
    assert all(type(v) is int for v in row["bbox_2d"])


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_the_released_prompts(text):
    starts = {"released": f"Output the bounding box of the {text} in the image.",
              "released-cot": f'Locate "{text}", report the bbox coordinates in JSON format.'}
    for prompt, words in starts.items():
        system, user = chat_messages(text, prompt)
        assert system == {"role": "system",
                          "content": [{"type": "text", "text": "You are a helpful assistant. "}]}
        picture, asked = user["content"]
        assert user["role"] == "user" and picture == {"type": "image"} and asked["type"] == "text"
        assert asked["text"].startswith(words)
        if prompt == "released":
            assert asked["text"] == words
        # all of it: 357 letters and the expression
        else:
            assert asked["text"].endswith("format.i.e., <think>thinking process here</think>"
                                          "<answer>answer here</answer>")
            assert len(asked["text"]) == len(text) + 357
            assert "format.Compare the difference between objects" in asked["text"]
        answer = answer_text((0.4, 128.6, 364.9, 347), text, prompt=prompt)
        assert answer == (f"<|object_ref_start|>{text}.<|object_ref_end|>"
                          f"<|box_start|>(0,129),(365,347)<|box_end|>")


def test_frames_by_hand():
    # 640 x 480 pixels are resized to multiples of 28: 23 x 28 = 644 and 17 x 28 = 476, 46 x 34
    # patches of 14
    grid = torch.tensor([1, 34, 46])
    assert mllm_frame("qwen2_5_vl", grid, 14) == (644, 476)
    assert mllm_frame("qwen2_vl", grid, 14) == mllm_frame("qwen3_vl", grid, 14) == (1000, 1000)
    assert all(type(v) is int for v in mllm_frame("qwen2_5_vl", grid, 14))
    box = (64, 48, 320, 240)
    # 64 x 644 / 640 = 64.4; 48 x 476 / 480 = 47.6; half of 644 and of 476
    near = lambda box: pytest.approx(box, rel=1e-14)
    assert rescale_box(box, (640, 480), (644, 476)) == near((64.4, 47.6, 322, 238))
    assert rescale_box(box, (640, 480), (1000, 1000)) == near((100, 100, 500, 500))
    # and back, from what the model would write: 64 x 640 / 644, 48 x 480 / 476
    back = rescale_box((64, 48, 322, 238), (644, 476), (640, 480))
    assert back == pytest.approx((63.602484, 48.403361, 320, 240), rel=1e-7)
    assert rescale_box((100, 100, 500, 500), (1000, 1000), (640, 480)) == near(box)
    answer = answer_text(rescale_box(box, (640, 480), (644, 476)), "car")
    assert parse_box(answer) == (64, 48, 322, 238)


# --- what the models see ---

def random_picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(90, 61), (301, 200), (128, 128), (40, 400)])
def test_sams_picture_is_sam_2s_own(size):
    from sam2.utils.transforms import SAM2Transforms
    picture = random_picture(*size)
    expected, actual = SAM2Transforms(SIDE, mask_threshold=0.0)(picture), sam_picture(picture, SIDE)
    assert actual.shape == (3, SIDE, SIDE) and actual.dtype == torch.float32
    # of values between -2.2 and 2.7
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def two_items():
    """100 x 70 pixels, which the processor resizes, and 128 x 128, which is SAM's own size here."""
    rng = np.random.default_rng(5)
    small, square = np.zeros((70, 100), bool), rng.random((SIDE, SIDE)) < 0.4
    small[13:52, 21:80] = True
    return [{"id": "a/1/0", "text": "the red circle", "image": random_picture(100, 70, 1),
             "mask": small,
             "ignore": np.zeros_like(small), "box": (21, 13, 80, 52)},
            {"id": "b/2/1", "text": "the smallest blue square",
             "image": random_picture(SIDE, SIDE, 2), "mask": square,
             "ignore": ~square & (rng.random((SIDE, SIDE)) < 0.2), "box": (0.5, 1, 127, 128)}]


def assert_same_batch(a, b):
    assert a.keys() == b.keys()
    for name in a:
        values = zip(a[name], b[name]) if isinstance(a[name], list) else [(a[name], b[name])]
        assert len(a[name]) == len(b[name]), name
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in values), name


@pytest.fixture(scope="module")
def collate(processor):
    return Collator(processor, "qwen2_5_vl", SIDE, 2048)


def test_a_batch_by_hand(processor, collate):
    items = two_items()
    batch = collate(items)
    # Patches of 8, merged 2 x 2: sides are multiples of 16, and at least 150^2 pixels are asked for.
    # 100 x 70, times sqrt(22500 / 7000) = 1.79, is 179 x 125: up to 192 x 128, 24 x 16 patches;
    # 128 becomes 150: up to 160, 20 patches
    assert batch["grid_thw"].tolist() == [[1, 16, 24], [1, 20, 20]]
    assert batch["frames"] == [(192, 128), (160, 160)]
    assert Collator(processor, "qwen2_vl", SIDE, 2048)(items)["frames"] == [(1000, 1000)] * 2
    # colours, frames, a patch
    assert batch["pixel_values"].shape == (384 + 400, 3 * 2 * 8 * 8)
    alone = [processor.image_processor(images=[item["image"]], return_tensors="pt")["pixel_values"]
             for item in items]
    torch.testing.assert_close(batch["pixel_values"], torch.cat(alone), atol=1e-6, rtol=0)

    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for ids, types, text, pieces in zip(batch["ids"], batch["types"], batch["texts"],
                                        (384 // 4, 400 // 4)):
        assert ids.dtype == types.dtype == torch.long and ids.shape == types.shape == (len(ids),)
        assert (types == (ids == pad)).all() and types.sum() == pieces
        where = types.nonzero()[:, 0]
        assert where[-1] - where[0] == pieces - 1                               # in one run
        before, after = (processor.tokenizer.decode(part)
                         for part in (ids[:where[0]], ids[where[-1] + 1:]))
        assert f'best matches "{text}" and provide' in before
        assert before.endswith("<|vision_start|>")
        assert after == f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"

    assert batch["sam_pixels"].shape == (2, 3, SIDE, SIDE)
    assert torch.equal(batch["sam_pixels"][0], sam_picture(items[0]["image"], SIDE))
    assert batch["texts"] == ["the red circle", "the smallest blue square"]
    assert batch["keys"] == ["a/1/0", "b/2/1"]
    assert batch["boxes"] == [(21, 13, 80, 52), (0.5, 1, 127, 128)]
    for name in "mask", "ignore":
        values = batch[name + "s"]
        assert all(m.dtype == torch.bool and (m.numpy() == item[name]).all()
                   for m, item in zip(values, items, strict=True))


@pytest.mark.parametrize("prompt", ["paper", "released", "released-cot"])
def test_a_batch_asks_as_the_prompt_says(prompt, processor):
    items = two_items()
    batch = Collator(processor, "qwen2_5_vl", SIDE, 2048, prompt)(items)
    for item, ids, types in zip(items, batch["ids"], batch["types"]):
        messages, before = chat_messages(item["text"], prompt), ids[:types.nonzero()[0, 0]]
        after = ids[types.nonzero()[-1, 0] + 1:]
        asked = messages[1]["content"][1]["text"]
        ends = f"<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
        assert processor.tokenizer.decode(after) == ends
        assert messages[0]["content"][0]["text"] in processor.tokenizer.decode(before)


def test_low_masks_are_area_averages(collate):
    items = two_items()
    for item in items:
        item["ignore"][:] = False
    low = collate(items)["low_masks"]
    assert low.shape == (2, 32, 32) and low.dtype == torch.float32 and low.min() >= 0
    assert low.max() <= 1
    # 128 / 32 = 4: blocks of 4 x 4
    blocks = items[1]["mask"].reshape(32, 4, 32, 4).mean((1, 3))
    np.testing.assert_allclose(low[1], blocks, atol=1e-7)
    assert 0.3 < low[1].mean() < 0.5 and len(low[1].unique()) > 5               # it is no threshold
    # each cell: the pixels that it touches
    for y in range(32):
        for x in range(32):
            rows, columns = (slice(i * n // 32, -(-(i + 1) * n // 32))
                             for i, n in ((y, 70), (x, 100)))
            assert low[0, y, x].item() == pytest.approx(items[0]["mask"][rows, columns].mean(),
                                                        abs=1e-6)
    assert (collate(items)["low_weights"] == 1).all()


def test_ignored_pixels_weigh_nothing(collate):
    # 128 x 128: a cell is 4 x 4 pixels
    item = two_items()[1]
    item["mask"], item["ignore"] = np.zeros((2, SIDE, SIDE), bool)
    # half ignored, all else the object
    item["ignore"][0:4, 0:2], item["mask"][0:4, 2:4] = True, True
    # half ignored, half the rest the object
    item["ignore"][0:2, 4:8], item["mask"][2, 4:8] = True, True
    item["ignore"][0:4, 8:12] = True                                            # nothing left
    # a quarter ignored, no object
    item["ignore"][0, 12:16] = True
    # three quarters the object, none ignored
    item["mask"][4:7, 0:4] = True
    batch = collate([item])
    low, weights = batch["low_masks"][0], batch["low_weights"][0]
    assert low.shape == weights.shape == (32, 32) and low.dtype == weights.dtype == torch.float32
    assert low[0, :4].tolist() == [1, 0.5, 0, 0] and weights[0, :4].tolist() == [0.5, 0.5, 0, 0.75]
    assert low[1, 0] == 0.75 and weights[1, 0] == 1
    # all other cells: no object, full weight
    assert low.sum() == 2.25 and weights.sum() == 32 * 32 - 2.25
    item["mask"][:], item["ignore"][:] = False, True                            # a box alone
    batch = collate([item])
    assert not batch["low_masks"].any() and not batch["low_weights"].any()
    assert batch["ignores"][0].all()


@pytest.mark.parametrize("indices", [[0], [1], [0, 1], [1, 0], [1, 1, 0], range(1, 2)])
def test_a_selection_is_the_batch_of_the_selected(collate, indices):
    items = two_items()
    assert_same_batch(select(collate(items), indices), collate([items[i] for i in indices]))


def test_only_what_the_models_read_is_moved(collate):
    batch = collate(two_items())
    # a device that every machine has
    moved = to_device(batch, "meta")
    on_device = {"pixel_values", "grid_thw", "sam_pixels", "low_masks", "low_weights"}
    assert moved.keys() == batch.keys() and all(moved[name].is_meta for name in on_device)
    assert all(moved[name] is batch[name] for name in batch.keys() - on_device)
    assert not batch["pixel_values"].is_meta
    assert_same_batch(to_device(batch, "cpu"), batch)


# --- the shapes world ---

SPLITS = {"train": 10, "val": 3, "testA": 6, "testB": 6}


def files(root):
    return {str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    shapes_world.write_shapes_world(root, splits=SPLITS)
    return root


@pytest.fixture(scope="module")
def drawn():
    """300 scenes -> list of (picture, things, all expressions, those of them that are chains)."""
    rng, found = random.Random(0), []
    for _ in range(300):
        picture, things, expressions = shapes_world.make_scene(rng)
        chains = shapes_world.chains(things, expressions, rng)
        found.append((picture, things, expressions + chains, chains))
    return found


# An interpreter of the expressions, written from their words: it knows what things are called and
# measures the rest in their masks. Lengths are in units (a square picture has 160 x 160). It fails
# where a person might hesitate; its margins lie a hair below those that the world promises.

HUES = {"red": 0, "yellow": 60, "green": 120, "blue": 240}                          # degrees
NOUNS = {"circle", "square", "triangle", "diamond", "ring", "bar"}
ENDS = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1),
        "smallest": ("width", 1), "largest": ("width", -1)}
WAYS = {"right of": 0, "below": 90, "left of": 180, "above": -90}                   # degrees


def measured(things):
    """What the masks show of some things -> a list of {"words", "x", "y", "width", "whole"}."""
    height, width = things[0]["mask"].shape
    unit, shown = math.sqrt(height * width) / 160, []
    for thing in things:
        y, x = np.where(thing["mask"])
        extent = x.max() + 1 - x.min(), y.max() + 1 - y.min()
        shown.append({"words": {"shape", thing["shape"], thing["color"]},
                      "x": (x.min() + x.max() + 1) / 2 / unit,
                      "y": (y.min() + y.max() + 1) / 2 / unit, "width": extent[0] / unit,
                      "whole": max(abs(side - 2 * thing["r"]) for side in extent) <= 2})
    return shown


def called(noun, shown):
    """Those that a noun may mean: "shape", "circle", "red shape", "red circle"."""
    *adjectives, name = noun.split()
    assert name in NOUNS | {"shape"} and len(adjectives) < 2 and set(adjectives) <= set(HUES), noun
    return [i for i, thing in enumerate(shown) if set(noun.split()) <= thing["words"]]


def outermost(among, word, shown):
    """The one of `among` at this end; it must be so clearly."""
    name, sign = ENDS[word]
    first, second = sorted(among, key=lambda i: sign * shown[i][name])[:2]
    a, b = shown[first][name], shown[second][name]
    if name == "width":
        assert all(shown[i]["whole"] for i in among)          # what is hidden has no known size
        assert max(a, b) > 1.249 * min(a, b)
    else:
        assert abs(a - b) > 9.99
    return first


def nearest(among, base, shown):
    far = {i: math.hypot(shown[i]["x"] - shown[base]["x"], shown[i]["y"] - shown[base]["y"])
           for i in among}
    first, second = sorted(among, key=far.get)[:2]
    assert far[second] > 1.349 * far[first] and far[second] - far[first] > 9.99
    return first


def towards(among, word, base, shown):
    """The only one of `among` in that quarter of the picture; the others lie clearly in another."""
    inside = []
    for i in among:
        dx, dy = shown[i]["x"] - shown[base]["x"], shown[i]["y"] - shown[base]["y"]
        assert max(abs(dx), abs(dy)) > 9.99
        away = abs((math.degrees(math.atan2(dy, dx)) - WAYS[word] + 180) % 360 - 180)
        assert abs(away - 45) > 6 and abs(away - 135) > 6     # of the quarters' borders
        inside += [i] if away < 45 else []
    only, = inside
    return only


def understand(text, shown):
    """-> the thing that is meant, its kind, the things found on the way to it, those that its noun
    fits."""
    phrase = text.removeprefix("the ")
    assert phrase != text
    parts = re.split(f" ({'|'.join(WAYS)}|next to) (?=the )", phrase, maxsplit=1)
    if len(parts) == 3:
        noun, word, anchor = parts
        base, kind, passed, _ = understand(anchor, shown)
        fits = [i for i in called(noun, shown) if i != base]
        if word == "next to":
            answer = nearest(fits, base, shown)
        else:
            answer = towards(fits, word, base, shown)
        return answer, "relation" if kind == "attribute" else "chain", [*passed, base], fits
    word, _, noun = phrase.partition(" ")
    if word in ENDS:
        fits = called(noun, shown)
        kind = "size" if ENDS[word][0] == "width" else "position"
        return outermost(fits, word, shown), kind, [], fits
    only, = called(phrase, shown)
    return only, "attribute", [], [only]


def test_every_expression_means_one_thing_and_no_other(drawn):
    """To the letter and clearly so; its kind is that of its words."""
    seen = Counter()
    for _, things, expressions, _ in drawn:
        shown = measured(things)
        for found in expressions:
            answer, kind, _, _ = understand(found["text"], shown)
            assert (answer, kind) == (found["thing"], found["kind"]), found["text"]
            seen.update([kind, *re.findall("|".join((*ENDS, *WAYS, "next to")), found["text"])])
    # every word and kind was put to the test
    assert set(seen) == {*ENDS, *WAYS, "next to", "attribute", "position", "size", "relation",
                         "chain"}
    assert min(seen.values()) > 200, seen


def test_a_relation_leaves_more_than_one_to_choose_from(drawn):
    """Whoever reads the noun alone, or knows the things named as well, has still two or more to
    choose from; and no chain leads back to a thing on its way."""
    seen = 0
    for _, things, expressions, chains in drawn:
        shown = measured(things)
        for found in expressions:
            answer, kind, passed, fits = understand(found["text"], shown)
            if kind in ("relation", "chain"):
                assert len(set(fits) - set(passed)) >= 2 and answer not in passed, found["text"]
                assert len(set(passed)) == len(found["steps"]) - 1
                seen += 1
        assert all(len(found["steps"]) > 1 for found in chains)
    assert seen > 2000


def test_every_kind_is_picked_and_the_outermost_more_seldom_than_it_comes(drawn):
    """Of what a picture offers, relations whose answer is also the outermost thing in their
    direction are picked more seldom than they come."""
    rng, kinds, offered, taken = random.Random(1), Counter(), [], []
    for _, things, expressions, _ in drawn:
        for _ in range(5):
            picked = shapes_world.pick_expression(things, expressions, rng)
            kinds[picked["kind"]] += 1
            if picked["steps"][-1].get("word") in WAYS:
                taken.append(picked["outermost"])
        offered.append([found["outermost"] for found in expressions
                        if found["steps"][-1].get("word") in WAYS])
        chosen = rng.randrange(len(things))
        more = shapes_world.pick_expression(things, expressions, rng, chosen)
        assert more is None or more["thing"] == chosen
    assert min(kinds.values()) > 100 and min(kinds["chain"], kinds["attribute"]) > kinds["size"]
    share = np.mean([np.mean(flags) for flags in offered if flags])
    assert 0 < np.mean(taken) < share - 0.02, (np.mean(taken), share)


def looks(mask):
    """The shape that a mask shows, by a few places of its box."""
    y, x = np.where(mask)
    inside = mask[y.min():y.max() + 1, x.min():x.max() + 1]

    def at(across, down):
        return bool(inside[int(down * len(inside)), int(across * len(inside[0]))])
    upper, lower = [at(0.08, 0.08), at(0.92, 0.08)], [at(0.08, 0.92), at(0.92, 0.92)]
    if all(upper + lower):
        return "square"
    if any(upper):
        return "bar" if upper == lower[::-1] and at(0.5, 0.5) else None
    if any(lower):
        return "triangle" if all(lower) else None
    if not at(0.5, 0.5):
        return "ring"
    return "circle" if at(0.2, 0.2) else "diamond"


def test_the_truth_is_what_the_picture_shows(drawn):
    """Pixel by pixel: every mask has its colour, what no mask holds is grey, no two masks share a
    pixel, a box is what is visible of its thing, and at least a third of everything is."""
    for picture, things, _, _ in drawn:
        hue = np.asarray(Image.fromarray(picture).convert("HSV"))[..., 0] * (360 / 256)
        for thing in things:
            mask, (x1, y1, x2, y2) = thing["mask"], thing["box"]
            assert mask.shape == picture.shape[:2] and mask.dtype == bool
            assert all(type(v) is int for v in thing["box"])
            assert mask[y1:y2, x1:x2].sum() == mask.sum()
            assert mask[y1].any() and mask[y2 - 1].any()
            assert mask[:, x1].any() and mask[:, x2 - 1].any()
            far = {name: abs((hue[mask] - value + 180) % 360 - 180) for name, value in HUES.items()}
            own = far.pop(thing["color"])
            assert (own < np.min(list(far.values()), 0)).mean() > 0.98, thing["color"]
            if thing["visible"] == 1:
                assert looks(mask) == thing["shape"]
            whole = shapes_world.shape_mask(thing, picture.shape[1::-1]).sum()
            assert mask.sum() > 0.33 * whole and not (mask.sum() == whole) ^ (thing["visible"] == 1)
        masks = np.array([thing["mask"] for thing in things])
        assert masks.sum(0).max() == 1
        assert (np.ptp(picture[~masks.any(0)], axis=1) == 0).all()


def test_things_share_a_place_as_their_layout_says(drawn):
    """Crossing bars have one box, what nests lies in the other's box, what hides lies before
    something; those that stand apart touch nothing. So a box alone leaves a doubt."""
    seen = Counter()
    for _, things, _, _ in drawn:
        boxes = np.array([thing["box"] for thing in things])
        for i, thing in enumerate(things):
            x1, y1, x2, y2 = boxes.T
            meets = (x1 < x2[i]) & (x1[i] < x2) & (y1 < y2[i]) & (y1[i] < y2)
            others = [j for j in np.flatnonzero(meets) if j != i]
            seen[thing["layout"]] += 1
            if thing["layout"] == "apart":
                assert not others
                continue
            assert all(things[j]["layout"] == thing["layout"] for j in others)
            if thing["layout"] in ("crosses", "nests"):
                other, = others
                assert things[other]["color"] != thing["color"]
                near = [boxes[i] - boxes[other], boxes[other] - boxes[i]]
                inside = [(gap[:2] >= -1).all() and (gap[2:] <= 1).all() for gap in near]
                assert all(inside) if thing["layout"] == "crosses" else any(inside)
            seen["partly hidden"] += thing["visible"] < 0.99
    assert min(seen.values()) > 50 and set(seen) == {*shapes_world.LAYOUTS, "partly hidden"}, seen


def test_pictures_have_many_sizes(drawn):
    """Half of them square, the others up to 2 : 1; a side is 96 to 512 in the mean of both."""
    sizes = np.array([picture.shape[:2] for picture, _, _, _ in drawn])
    sides, aspect = np.sqrt(sizes.prod(1)), sizes.max(1) / sizes.min(1)
    assert 95.5 < sides.min() < 105 and 400 < sides.max() < 512.5
    assert 0.4 < (aspect == 1).mean() < 0.6 and 1.8 < aspect.max() < 2.03
    assert len({tuple(size) for size in sizes}) > 200
    assert {len(things) for _, things, _, _ in drawn} == {2, 3, 4, 5, 6}


def test_the_generator_finishes(monkeypatch):
    """Whatever number of things is asked for, few pictures are thrown away."""
    draw, tries = shapes_world.draw_scene, []

    def counted(*given):
        tries.append(given)
        assert len(tries) < 15
        return draw(*given)
    monkeypatch.setattr(shapes_world, "draw_scene", counted)
    rng = random.Random(2)
    for count in (2, 3, 4, 5, 6):
        for _ in range(30):
            tries.clear()
            _, things, _ = shapes_world.make_scene(rng, count)
            assert 2 <= len(things) <= count


def test_the_same_seed_writes_the_same_bytes(world, tmp_path):
    assert len(files(world)) == sum(SPLITS.values()) + 2
    shapes_world.write_shapes_world(tmp_path / "again", splits=SPLITS)
    assert files(tmp_path / "again") == files(world)
    shapes_world.write_shapes_world(tmp_path / "other", seed=8, splits=SPLITS)
    assert files(tmp_path / "other").keys() == files(world).keys()
    assert not files(tmp_path / "other").items() & files(world).items()


def test_two_writers_at_once_leave_one_whole_world(world, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(2)

    def write():
        ready.wait(60)
        shapes_world.write_shapes_world(tmp_path, splits=SPLITS)

    writers = [fork.Process(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["refer_seg"]
    assert files(tmp_path) == files(world)


def test_the_world_on_disk_is_true(world):
    """Through the loader: words, kinds, layout, pixels, mask and box of each record are those of
    the scene that was drawn for it, and its words mean the thing whose mask it has."""
    for split, count in SPLITS.items():
        records = read_records(world, ["shapes"], [split])
        scenes = list(shapes_world.scenes(split, count))
        assert len(records) == len(scenes) == count
        for record, (picture, things, chosen, picked) in zip(records, scenes):
            assert len(things) in {"testA": [2, 3], "testB": [6]}.get(split, [2, 3, 4, 5, 6])
            assert 1 <= len(set(record["texts"])) == len(record["texts"]) <= 3
            assert record["texts"] == [found["text"] for found in picked]
            assert record["layout"] == things[chosen]["layout"]
            for i, (text, kind) in enumerate(zip(record["texts"], record["kinds"], strict=True)):
                item = load_item(record, i)
                assert item["text"] == text and (item["mask"] == things[chosen]["mask"]).all()
                y, x = np.where(item["mask"])
                assert item["box"] == (x.min(), y.min(), x.max() + 1, y.max() + 1)
                assert understand(text, measured(things))[:2] == (chosen, kind)
            difference = np.asarray(item["image"]).astype(float) - picture
            assert difference.shape == picture.shape and abs(difference).mean() < 4        # JPEG


def test_only_the_world_knows_kinds_and_layouts(tmp_path):
    Refer(tmp_path)
    records = list(read_refcoco(tmp_path, "refcoco", ["train", "val"]))
    assert len(records) == 4
    for record in records:
        assert record["kinds"] == [None] * len(record["texts"]) and record["layout"] is None


def test_the_annotations_are_coco_and_refer(world):
    folder = world / "refer_seg/shapes"
    instances = json.loads((folder / "instances.json").read_text())
    refs = read_refs(folder / "refs(unc).p")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    sizes = [(image["height"], image["width"]) for image in instances["images"]]
    assert set(names.values()) == NOUNS and Counter(ref["split"] for ref in refs) == SPLITS
    for ref, annotation, size in zip(refs, instances["annotations"], sizes, strict=True):
        assert (ref["ann_id"], ref["image_id"]) == (annotation["id"], annotation["image_id"])
        assert annotation["area"] == coco.area(annotation["segmentation"])
        assert annotation["bbox"] == coco.toBbox(annotation["segmentation"]).tolist()
        assert tuple(annotation["segmentation"]["size"]) == size
        assert ref["category_id"] == annotation["category_id"]
        if annotation["layout"] == "apart":
            shape = looks(decode_mask(annotation["segmentation"], size))
            assert names[ref["category_id"]] == shape
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
    ids = [i for ref in refs for i in ref["sent_ids"]]
    assert len(set(ids)) == len(ids) and ids == sorted(ids)


def test_a_missing_world_is_an_error_that_names_the_command(tmp_path):
    root = tmp_path / "shapes"
    read = lambda: read_records(root, ["shapes"], ["val"])
    refuses(read, root / "refer_seg/shapes", f"python tests/tiny/world.py {root}")
    assert list(tmp_path.iterdir()) == []                                       # nothing is written
    shapes_world.write_shapes_world(root, splits={"val": 2})
    assert len(read()) == 2
    shapes_world.write_shapes_world(root, splits={"val": 3})                    # what is there stays
    assert len(read()) == 2


def test_the_world_from_the_command_line(tmp_path):
    done = run(sys.executable, "tests/tiny/world.py", check=False)
    assert done.returncode and "python tests/tiny/world.py [-h] FOLDER" in done.stderr
    done = run(sys.executable, ROOT / "tests/tiny/world.py", "--help", cwd=tmp_path)
    assert "FOLDER" in done.stdout and list(tmp_path.iterdir()) == []
    Refer(tmp_path)
    done = run(sys.executable, "tests/tiny/world.py", tmp_path, check=False)
    assert done.returncode and "folder of its own" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_world_does_not_take_the_place_of_real_data(tmp_path, monkeypatch):
    Refer(tmp_path)
    before = files(tmp_path)
    write = lambda: shapes_world.write_shapes_world(tmp_path, splits={"train": 1})
    monkeypatch.setattr(shapes_world, "scenes", None)            # refused before any work
    refuses(write, tmp_path / "refer_seg", "folder of its own")
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["refer_seg"]
