"""data.py: every format on small hand-made files, every mistake in them by name, the order of the
training data, batches, and the processes that load them. Also tests/tools/check_data.py."""
import builtins
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask as coco
from sam2.utils.transforms import SAM2Transforms
from torch.utils.data import Dataset
from transformers import AutoProcessor

import check_data
import data
from data import (Collator, EvaluationRows, LensError, TrainingStream, decode_mask, draw_reasonseg,
                  extent, find_datasets, fingerprint, load_batches, load_image, load_item,
                  mllm_frame, read_lines, read_reasonseg, read_records, read_refs, rescale_box,
                  sam_image, select, take_evenly, to_device, training_batches)
from rewards import answer_text, chat_messages, format_reward, parse_box

S, CPU, NAN = 128, torch.device("cpu"), float("nan")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm")


@pytest.fixture(scope="module")
def collate(processor):
    return Collator(processor, "qwen2_5_vl", S, 2048)


def refuses(action, *fragments):
    """The action raises a LensError of one line that says each of `fragments`."""
    with pytest.raises(LensError) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is LensError and "\n" not in message
    assert all(str(fragment) in message for fragment in fragments), message


def random_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def area(x1, y1, x2, y2, size=(20, 30)):
    """A mask of the pixels x1 ... x2 - 1, y1 ... y2 - 1."""
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def corners(x1, y1, x2, y2):
    """A COCO polygon of the pixels x1 ... x2 - 1, y1 ... y2 - 1."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def rle(mask):
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    return {"size": list(mask.shape), "counts": counts}


def load_all(root, dataset="cups", split="train"):
    return [load_item(record, 0) for record in read_records(root, [dataset], [split])]


# --- RefCOCO's layout -----------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("function, command", [(os.system, "touch '{}'"),
                                               (builtins.eval, "open('{}', 'w')")])
def test_a_pickle_that_calls_something_is_refused_and_not_run(function, command, protocol,
                                                              tmp_path):
    path, marker = tmp_path / "refs(unc).p", tmp_path / "marker"
    call = type("Call", (), {"__reduce__": lambda _: (function, (command.format(marker),))})()
    path.write_bytes(pickle.dumps([{"sent": call}], protocol))
    refuses(lambda: read_refs(path), path, function.__name__, "Download it again")
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the weapon was loaded
    assert marker.exists()


@pytest.mark.parametrize("content", [
    pickle.dumps([{"ref_id": np.int64(3)}], 2), pickle.dumps([{"ref_id": np.zeros(3)}], 2),
    pickle.dumps([Counter("ab")], 2), pickle.dumps([{"ref_id": 1}], 2)[:-4], b"", b"<html>404",
    b"\x80\x02}q\x00(U\x01a" + b"(" * 1000 + b"R."])
def test_a_file_that_is_not_plain_refs_is_refused_by_name(content, tmp_path):
    (tmp_path / "refs.p").write_bytes(content)
    refuses(lambda: read_refs(tmp_path / "refs.p"), tmp_path / "refs.p", "Download it again")


@pytest.mark.parametrize("content", [  # of protocols 0 and 2
    # [{'ref_id': 5, 'sent': 'caf\xe9', 'raw': u'caf\xe9'}] as Python 2's pickle writes it: str is
    # bytes (S, U), here latin1; unicode is V (raw-unicode-escape) or X (UTF-8)
    b"(lp0\n(dp1\nS'ref_id'\np2\nI5\nsS'sent'\np3\nS'caf\\xe9'\np4\nsS'raw'\np5\nVcaf\xe9\np6\nsa.",
    b"\x80\x02]q\x00}q\x01(U\x06ref_idq\x02K\x05U\x04sentq\x03U\x04caf\xe9q\x04"
    b"U\x03rawq\x05X\x05\x00\x00\x00caf\xc3\xa9q\x06ua."])
def test_what_python_2_wrote_is_read(content, tmp_path):
    (tmp_path / "refs.p").write_bytes(content)
    assert read_refs(tmp_path / "refs.p") == [{"ref_id": 5, "sent": "café", "raw": "café"}]


# The object in image 12: a run in each of two columns
SPOT = area(3, 10, 4, 14, (50, 24)) | area(4, 20, 5, 22, (50, 24))
# Column-major runs: 3 * 50 + 10 zeros, 4 ones, then 36 to the end of column 3 and 20 in column 4,
# 2 ones, the rest
RUNS = {"size": [50, 24], "counts": [160, 4, 56, 2, 24 * 50 - 222]}
TWO = [corners(4, 5, 14, 15), corners(10, 8, 20, 18)]


class Refer:
    """A small dataset in REFER's layout: image 9 of 40 x 30 pixels with three objects, and image 12
    of 24 x 50 pixels."""

    def __init__(self, root, dataset="refcoco", by="unc"):
        self.root, self.dataset = root, dataset
        self.refs_file = root / f"refer_seg/{dataset}/refs({by}).p"
        self.instances_file = self.refs_file.with_name("instances.json")
        self.image_folder = root / "refer_seg/images/mscoco/images/train2014"
        self.image = self.image_folder / "COCO_train2014_000000000009.jpg"
        self.refs_file.parent.mkdir(parents=True)
        self.image_folder.mkdir(parents=True, exist_ok=True)
        self.images = []
        for n, height, width in (9, 30, 40), (12, 50, 24):
            name = f"COCO_train2014_{n:012d}.jpg"
            random_image(width, height).save(self.image_folder / name)
            self.images.append({"id": n, "height": height, "width": width, "file_name": name})
        self.annotations = [
            {"id": 100, "bbox": [4, 5, 16, 13], "segmentation": TWO},
            {"id": 101, "bbox": [30.5, 2.25, 8, 4.5], "segmentation": [corners(30, 2, 38, 6)]},
            {"id": 102, "bbox": [3, 10, 2, 12], "segmentation": RUNS},
            {"id": 103, "bbox": [3, 10, 2, 12], "segmentation": rle(SPOT)},
            {"id": 104, "bbox": [0, 0, 5, 5],
             "segmentation": [corners(0, 0, 2, 3), corners(35, 20, 40, 30)]}]
        self.refs = [self.ref(1, 100, 9, "train", "the left one", "left", "one on the left"),
                     self.ref(2, 101, 9, "val", "small one"),
                     self.ref(3, 102, 12, "train", "a spot", "the dots"),
                     self.ref(4, 103, 12, "testA", "a spot"),
                     self.ref(5, 104, 9, "train", "both {ends}")]
        self.save()

    def ref(self, ref_id, ann_id, image_id, split, *expressions):
        # as in REFER, file_name names a crop that is no file
        return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split,
                "sentences": [{"sent": text, "raw": text.upper()} for text in expressions],
                "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"}

    def save(self, **changes):
        """changes: entries of the first object's refs, annotations or images"""
        for name, values in changes.items():
            getattr(self, name)[0].update(values)
        self.refs_file.write_bytes(pickle.dumps(self.refs, 2))
        self.instances_file.write_text(json.dumps({"images": self.images,
                                                   "annotations": self.annotations}))

    def records(self, *splits):
        return read_records(self.root, [self.dataset], splits or ["train"])

    def items(self):
        """Every expression of every object of train."""
        return [load_item(record, i) for record in self.records()
                for i in range(len(record["expressions"]))]


def test_refers_layout_by_hand(tmp_path):
    refer = Refer(tmp_path)
    refer.refs[2]["sentences"][1]["groups"] = ["dots", "many"]
    refer.save()
    first, spot, ends = refer.records()
    assert first == {
        "id": "refcoco/1", "split": "train", "size": (30, 40), "image": str(refer.image),
        "expressions": ["the left one", "left", "one on the left"], "groups": [(), (), ()],
        "gt_box": (4, 5, 20, 18), "segmentation": TWO}
    assert (spot["id"], spot["size"], spot["gt_box"]) == ("refcoco/3", (50, 24), (3, 10, 5, 22))
    assert spot["groups"] == [(), ("dots", "many")]
    val, test = refer.records("testA", "val")  # in the file's order
    assert (val["id"], val["gt_box"]) == ("refcoco/2", (30.5, 2.25, 38.5, 6.75))
    assert (test["id"], test["split"], val["split"]) == ("refcoco/4", "testA", "val")
    item = load_item(first, 2)
    assert (item["id"], item["expression"]) == ("refcoco/1/2", "one on the left")
    assert item["gt_box"] == (4, 5, 20, 18)
    assert item["image"].size == (40, 30) and item["image"].mode == "RGB"
    expected = area(4, 5, 14, 15, (30, 40)) | area(10, 8, 20, 18, (30, 40))
    assert item["gt_mask"].dtype == item["ignore_mask"].dtype == bool
    assert (item["gt_mask"] == expected).all()
    assert item["ignore_mask"].shape == (30, 40) and not item["ignore_mask"].any()
    # two parts far apart: 2 x 3 and 5 x 10
    mask = load_item(ends, 0)["gt_mask"]
    assert mask.sum() == 56 and mask[:3, :2].all() and mask[20:, 35:].all()
    for record in spot, test:
        assert (load_item(record, 0)["gt_mask"] == SPOT).all()


def test_names_of_images_and_blank_expressions_in_refers_layout(tmp_path):
    refer, image = Refer(tmp_path), random_image(40, 30, 5)
    image.save(refer.image_folder / "kitchen.png")
    refer.save(images={"file_name": "kitchen.png"})
    assert np.array_equal(refer.items()[0]["image"], image)  # though COCO's image 9 is there too
    # blank expressions are left out of training alone
    refer.refs[:2] = [refer.ref(1, 100, 9, "train", "the left one", "", "  "),
                      refer.ref(2, 101, 9, "val", "", "small one")]
    for name in "9.jpg", None:  # where instances.json names no file, COCO's name counts
        refer.save(images={"file_name": name})
        assert refer.records()[0]["image"] == str(refer.image)
    assert refer.records()[0]["expressions"] == ["the left one"]
    assert refer.records("val")[0]["expressions"] == ["", "small one"]


def changed(**changes):
    return lambda refer: refer.save(**changes)


@pytest.mark.parametrize("breaks, says", [
    (lambda r: r.refs_file.unlink(), ["refs(unc).p", "Download REFER's refcoco.zip"]),
    (lambda r: r.instances_file.unlink(), ["instances.json", "--preset tiny"]),
    (lambda r: shutil.rmtree(r.image_folder), ["train2014 is missing", "COCO's train2014 images"]),
    (lambda r: r.image.unlink(), ["refs(unc).p, record 0", "009.jpg", "download COCO's train2014"]),
    (lambda r: r.image.write_bytes(r.image.read_bytes()[:-300]), ["009.jpg", "truncated", "again"]),
    (lambda r: r.image.write_bytes(b"<html>404 Not Found</html>"), ["009.jpg", "again"]),
    (lambda r: r.image.write_bytes(b""), ["009.jpg", "again"]),
    (lambda r: Image.new("RGB", (30, 40)).save(r.image), ["(30, 40)", "(40, 30)", "the original"]),
    *((changed(refs={name: 999}), ["record 0", "instances.json", "999", "Download both"])
      for name in ("ann_id", "image_id")),
    *((changed(annotations={"bbox": xywh}), ["refcoco/1", "outside"])
      for xywh in ((40, 5, 3, 3), (-3, 5, 3, 3), (4, -6, 3, 6), (4, 30, 3, 6))),
    *((changed(annotations={"bbox": xywh}), ["record 0", "is empty"])
      for xywh in ((4, 5, 0, 3), (4, 5, 3, 0), (NAN, 5, 3, 3), (4, 5, 1e999, 3))),
    (changed(annotations={"bbox": (4, 5, 3)}), ["record 0", "damaged"]),
    (changed(refs={"sentences": []}), ["record 0", "no expression"]),
    (changed(refs={"sentences": [7]}), ["record 0", "Download both"]),
    (lambda r: r.refs_file.write_bytes(pickle.dumps([7])), ["record 0", "Download both"]),
    (changed(annotations={"segmentation": 7}), ["refcoco/1", "009.jpg, 40 x 30 pixels", "damaged"]),
    (changed(annotations={"segmentation": {"size": [40, 30], "counts": [1200]}}),
     ["refcoco/1", "40 x 30 pixels", "(30, 40) pixels"]),
    *((lambda r, content=content: r.instances_file.write_bytes(content),
       ["instances.json", "Download it again"])
      for content in (b"<html>", b'{"images": [{"id": 9', b"[]", b'{"\xff": 1}')),
    (lambda r: r.instances_file.write_text('{"images": []}'),
     ["instances.json", "'annotations'", "again"])])
def test_a_mistake_in_refers_layout_is_one_error_with_its_place_and_the_way_out(breaks, says,
                                                                                tmp_path):
    refer = Refer(tmp_path)
    assert len(refer.items()) == 6  # whole until it is broken
    breaks(refer)
    refuses(refer.items, tmp_path, *says)


def test_an_empty_segmentation_is_left_out_of_training_and_evaluated_as_no_mask(tmp_path, capsys,
                                                                                monkeypatch):
    refer, told = Refer(tmp_path), "left out:\nrefcoco/1: no segmentation, left out of training\n"
    refer.save(annotations={"segmentation": []})
    for rank, says in ("0", told), ("1", ""):  # of many processes one tells
        monkeypatch.setenv("RANK", rank)
        assert [record["id"] for record in refer.records()] == ["refcoco/3", "refcoco/5"]
        assert capsys.readouterr() == ("", says)
    refer.save(refs={"split": "val"})
    item = load_item(refer.records("val")[0], 0)
    assert item["id"] == "refcoco/1/0" and item["gt_box"] == (4, 5, 20, 18)  # as annotated
    assert item["gt_mask"].shape == (30, 40) and capsys.readouterr() == ("", "")
    assert not (item["gt_mask"] | item["ignore_mask"]).any()


# --- Masks and images -----------------------------------------------------------------------------

def test_rle_against_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((17, 23)) < 0.3
        # column by column; the first run counts zeros
        runs, bits = [0], [0, *mask.T.ravel().tolist()]
        for before, bit in zip(bits, bits[1:]):
            runs = runs[:-1] + [runs[-1] + 1] if bit == before else runs + [1]
        for counts in rle(mask)["counts"].encode(), rle(mask)["counts"], runs:
            assert (decode_mask({"size": [17, 23], "counts": counts}, (17, 23)) == mask).all()


def test_degenerate_masks_are_no_error():
    for nothing in ([], [[]], [[4, 5]], [[4, 5, 14, 15]], [corners(5, 5, 5, 5)],
                    *({"size": [20, 30], "counts": counts} for counts in ([600], [], ""))):
        mask = decode_mask(nothing, (20, 30))
        assert mask.shape == (20, 30) and mask.dtype == bool and not mask.any()
    # pycocotools takes a first polygon of two points for a box, and then the rest too
    polygon = corners(4, 5, 10, 12)
    for polygons in (([0, 0, 30, 20], polygon), ([], [3, 3], polygon, [0, 0, 30, 20]),
                     ([7, 7] * 3, polygon)):
        assert (decode_mask(list(polygons), (20, 30)) == area(4, 5, 10, 12)).all()
    assert 45 <= decode_mask([[0, 0, 10, 0, 0, 10]], (20, 30)).sum() <= 55  # three points enclose


@pytest.mark.parametrize("segmentation, says", [
    (corners(4, 5, 14, 15), "[[x, y, x, y, ...], ...]"), ([[[4, 5], [9, 5], [9, 9]]], "of lists"),
    ([RUNS], "list of lists"), ([[NAN, 5, 9, 5, 9, 12]], "no number"),
    ([["a", 5, 9, 5, 9, 12]], "'a'"), ([[0.1, 0.2, 0.4, 0.2, 0.4, 0.6]], "fractions"),
    ([corners(4, 5, 10, 12), [-164, -221, 2e8, 3e8, 226, 236, 272, 384]], "far outside"),
    ({"size": [20, 30], "counts": [5, 5]}, "add up"), ({"counts": "?!", "size": [20, 30]}, "RLE"),
    ({"size": [20, 30], "counts": [5, 5, 591]}, "add up"),
    ({"size": [20, 30], "counts": [605, -5]}, "out of bounds")], ids=str)
def test_what_is_no_mask_is_refused(segmentation, says):
    with pytest.raises((ValueError, TypeError, OverflowError), match=re.escape(says)):
        decode_mask(segmentation, (20, 30))


def test_the_extent_of_a_mask_that_may_touch_the_border():
    assert extent(np.zeros((20, 30), bool)) == (0, 0, 0, 0)
    for box in (0, 0, 30, 20), (25, 15, 30, 20), (0, 19, 30, 20), (29, 0, 30, 20), (11, 7, 12, 8):
        assert (decode_mask([corners(*box)], (20, 30)) == area(*box)).all()
        assert extent(area(*box)) == box and all(type(v) is int for v in extent(area(*box)))
        both = area(*box) | area(3, 2, 4, 3)
        assert extent(both) == (min(3, box[0]), min(2, box[1]), *box[2:])


WHITE = (255, 255, 255)


@pytest.mark.parametrize("mode, colour, suffix, options, expected", [
    ("1", 1, "png", {}, WHITE), ("L", 77, "png", {}, (77, 77, 77)), ("L", 77, "jpg", {}, (77,) * 3),
    ("P", 3, "gif", {}, (3, 3, 3)), ("P", 3, "png", {}, (3, 3, 3)), ("LA", (50, 255), "png", {},
                                                                     (50, 50, 50)),
    ("RGB", (200, 20, 50), "jpg", {"quality": 100}, (200, 20, 50)),
    ("CMYK", (0, 255, 255, 0), "tif", {}, (255, 0, 0)),
    ("CMYK", (0, 255, 255, 0), "jpg", {"quality": 100}, (255, 0, 0)),
    # transparent pixels are white, and half-transparent ones half white
    ("RGBA", (0, 0, 0, 0), "png", {}, WHITE), ("RGBA", (9, 8, 7, 255), "png", {}, (9, 8, 7)),
    ("RGBA", (100, 0, 200, 128), "png", {}, (177, 127, 227)), ("LA", (0, 0), "png", {}, WHITE),
    ("P", 3, "png", {"transparency": 3}, WHITE), ("L", 7, "png", {"transparency": 7}, WHITE),
    ("L", 8, "png", {"transparency": 7}, (8, 8, 8)),
    ("RGB", (1, 2, 3), "png", {"transparency": (1, 2, 3)}, WHITE),
    # 16 bits keep their shades
    *(("I;16", 257 * grey, suffix, {}, (grey,) * 3)
      for grey in (0, 1, 100, 127) for suffix in ("png", "tif"))])
def test_every_kind_of_image_comes_as_rgb(mode, colour, suffix, options, expected, tmp_path):
    image, path = Image.new(mode, (8, 8), colour), tmp_path / f"a.{suffix}"
    if mode == "P":
        image.putpalette([value // 3 for value in range(24)])  # colour n is the grey n
    image.save(path, **options)
    assert Image.open(path).mode == mode
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (8, 8)
    assert abs(np.asarray(image).astype(int) - expected).max() <= 2


def turn(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


# by EXIF's orientation
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
           7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("tag", UPRIGHT)
def test_a_cameras_rotation_is_followed_or_refused_where_nothing_says_what_was_annotated(tag,
                                                                                        tmp_path):
    stored, path = np.asarray(random_image(30, 20)), tmp_path / "cups/turned.png"
    own(tmp_path, CUP | POLYGON | {"image": "turned.png"}, NO_BOX | {"image": "turned.png",
                                                                     "mask": "mask.png"})
    Image.fromarray(stored).save(path, exif=turn(tag))
    upright = UPRIGHT[tag](stored)
    Image.fromarray(area(4, 5, 10, 12, upright.shape[:2])).save(tmp_path / "cups/mask.png")
    assert np.array_equal(load_image(path), upright)
    assert all(np.array_equal(load_image(path, size), stored) for size in ((20, 30), [20, 30]))
    if tag > 4:
        assert np.array_equal(load_image(path, (30, 20)), upright)
    else:
        refuses(lambda: load_image(path, (30, 20)), path, "(30, 20) pixels, annotated as (20, 30)")
    refuses(lambda: load_image(path, (3, 3)), path, "annotated as (3, 3)")
    for record in read_records(tmp_path, ["cups"], ["train"]):
        if tag == 1:
            assert np.array_equal(load_item(record, 0)["image"], stored)
        else:  # one's own: even with a mask file of the size that viewers show
            refuses(lambda: load_item(record, 0), path, f"orientation {tag}", "mogrify", "exiftool")
    if tag > 1:
        refuses(lambda: load_image(path, (20, 30), refuse_rotation=True), f"orientation {tag}")


def large_image(path):
    Image.new("1", (16000, 12000)).save(path)  # 192 million pixels, in 23 kB


def damaged_exif(path):
    random_image(30, 20).save(path, exif=b"Exif\x00\x00II*\x00")


@pytest.mark.parametrize("write, says", [
    (large_image, ["192000000 pixels", "another size"]),
    (damaged_exif, ["no readable image", "save a copy"]), (os.mkdir, ["no readable image"]),
    *((lambda path, image=image: image.save(path, "tiff"), ["32 bits", "format"])
      for image in (Image.new("I", (4, 4), 70000), Image.new("F", (4, 4), 0.5))),
    (lambda path: Image.new("L", (401, 2)).save(path), ["(401, 2) pixels", "200 times", "crop it"]),
    (lambda path: Image.new("L", (1, 201)).save(path), ["(1, 201) pixels", "200 times"])])
def test_an_image_that_cannot_be_used_is_named(write, says, tmp_path, processor):
    write(tmp_path / "a.png")
    refuses(lambda: load_image(tmp_path / "a.png"), tmp_path / "a.png", *says)
    if "200 times" in says:  # the longest images that the processor takes
        images = [random_image(*size) for size in ((200, 1), (1, 200), (399, 2))]
        assert processor.image_processor(images=images)["image_grid_thw"].min() >= 1
        images[0].save(tmp_path / "b.png")
        assert load_image(tmp_path / "b.png").size == (200, 1)


# --- ReasonSeg ------------------------------------------------------------------------------------

def reason(root, split, stem, text="the cup", shapes=(), encoding="utf-8", suffix=".jpg", **save):
    """An image of 30 x 20 pixels and its json, as ReasonSeg has them. shapes: (label, points)."""
    folder = root / "reason_seg/ReasonSeg" / split
    folder.mkdir(parents=True, exist_ok=True)
    random_image(30, 20).save(folder / f"{stem}{suffix}", **save)
    shapes = [{"label": label, "shape_type": "polygon", "points": points, "flags": {}}
              for label, points in shapes]
    content = json.dumps({"text": text, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
    (folder / f"{stem}.json").write_bytes(content.encode(encoding))
    return folder / f"{stem}.json"


def square(x1, y1, x2, y2):
    """ReasonSeg's points of the pixels x1 ... x2 - 1, y1 ... y2 - 1: the outline belongs to the
    object."""
    return [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]]


def test_reasonseg_by_hand(tmp_path):
    texts, shapes = ["where tea goes", "with a handle", "cup"], [("cup", square(4, 5, 10, 12))]
    path = reason(tmp_path, "train", "b_2", texts, shapes)
    reason(tmp_path, "train", "a_10", "one text that is no list", shapes)
    for split in "val", "test":
        reason(tmp_path, split, "9", texts, [("cup", square(0, 0, 30, 20))])
    path.with_name("README.txt").write_text("no annotation")
    first, second = read_records(tmp_path, ["reasonseg"], ["train"])
    assert (first["id"], first["expressions"]) == ("reasonseg/train/a_10",
                                                   ["one text that is no list"])
    assert second == {
        "id": "reasonseg/train/b_2", "split": "train", "image": str(path.with_suffix(".jpg")),
        "expressions": texts, "size": None, "gt_box": None, "groups": [(), (), ()],
        "segmentation": (("cup", square(4, 5, 10, 12)),)}
    item = load_item(second, 1)
    assert (item["id"], item["expression"]) == ("reasonseg/train/b_2/1", "with a handle")
    assert item["image"].size == (30, 20) and item["image"].mode == "RGB"
    assert (item["gt_mask"] == area(4, 5, 10, 12)).all() and not item["ignore_mask"].any()
    assert item["gt_box"] == (4, 5, 10, 12)
    records = read_records(tmp_path, ["reasonseg"], ["test", "val"])  # the first text alone
    assert [(record["id"], record["expressions"]) for record in records] == [
        ("reasonseg/test/9", texts[:1]), ("reasonseg/val/9", texts[:1])]
    assert load_item(records[0], 0)["gt_mask"].all()


@pytest.mark.parametrize("encoding, text, suffix", [
    ("utf-8", "the café’s “naïve” cup", ".JPG"), ("utf-8", "кот 猫 🚗", ".jpeg"),
    ("utf-8-sig", "plain", ".png"), ("utf-8-sig", "the café’s “naïve” cup", ".PNG"),
    ("cp1252", "the café’s “naïve” cup", ".jpg")])
def test_reasonsegs_encodings_and_kinds_of_images(encoding, text, suffix, tmp_path):
    path = reason(tmp_path, "val", "a.b", [text], encoding=encoding, suffix=suffix)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf") == (encoding == "utf-8-sig")
    assert load_all(tmp_path, "reasonseg", "val")[0]["expression"] == text


def cup(points, label="cup", **shape):
    return {"shapes": [{"label": label, "points": points, **shape}]}


@pytest.mark.parametrize("broken", [
    b'{"text": "a cup", "shap', b"", b'{"text": "\x81"}', b"[1, 2]",  # neither UTF-8 nor cp1252
    {"text": None}, {"text": []}, {"text": ["  "]}, {"text": 7}, {"text": ["cup", 7]}, "no image",
    {"shapes": None}, {"shapes": [{"label": "cup"}]}, {"shapes": [{"points": [[1, 2]]}]},
    cup([[1, 2]], 7), cup([["a", "b"]]), cup([[1, 2], [3]]), cup([1, 2, 3]), cup([[10 ** 30, 2]]),
    cup([[2e8, 3e8], [1, 1], [2, 9]]), cup([[NAN, 2], [1, 1], [2, 9]]),
    *(cup([[1, 2], [3, 4]], shape_type=kind) for kind in ("line", "rectangle", "circle"))], ids=str)
def test_a_broken_reasonseg_file_is_named_and_left_out_and_does_not_stop(broken, tmp_path, capsys):
    paths = [reason(tmp_path, "test", stem, ["a cup"], [("cup", square(4, 5, 10, 12))])
             for stem in "abc"]
    read = lambda: [record["id"][-1] for record in read_records(tmp_path, ["reasonseg"], ["test"])]
    assert read() == ["a", "b", "c"] and capsys.readouterr() == ("", "")
    if broken == "no image":
        paths[1].with_suffix(".jpg").unlink()
    elif isinstance(broken, bytes):
        paths[1].write_bytes(broken)
    else:
        paths[1].write_text(json.dumps(json.loads(paths[1].read_text()) | broken))
    assert read() == ["a", "c"]
    told, = capsys.readouterr().err.removeprefix("left out:\n").splitlines()
    assert told.startswith(f"{paths[1]}: damaged, or its image is missing")
    if "shape_type" in str(broken):
        kind = broken["shapes"][0]["shape_type"]
        assert f"a shape of type '{kind}': draw a polygon" in told
    _, error, _ = read_reasonseg(tmp_path, "reasonseg", ["test"])
    assert type(error) is LensError and str(error) == told


@pytest.mark.parametrize("order, thing, ignore, flag", [
    ((0, 1, 2, 3), "cup", "ignore", "flag"), ((3, 2, 1, 0), "target", "IGNORE area", "Flag"),
    ((1, 3, 0, 2), "flagpole", "Ignored", "FLAG"), ((2, 0, 3, 1), "A Cup", "to ignore", "flag")])
def test_the_largest_polygon_is_drawn_first(order, thing, ignore, flag, tmp_path):
    # 20 x 16 pixels of the object, on them 10 x 10 to ignore, on these 3 x 3 of the object; a flag
    # over all is nothing
    shapes = [(thing, square(2, 2, 22, 18)), (ignore, square(6, 5, 16, 15)),
              (thing, square(9, 8, 12, 11)), (flag, square(0, 0, 30, 20))]
    reason(tmp_path, "val", "a", ["a cup"], [shapes[i] for i in order])
    item, = load_all(tmp_path, "reasonseg", "val")
    hidden = area(6, 5, 16, 15) & ~area(9, 8, 12, 11)
    assert item["ignore_mask"].dtype == item["gt_mask"].dtype == bool
    assert (item["ignore_mask"] == hidden).all() and item["gt_box"] == (2, 2, 22, 18)
    assert (item["gt_mask"] == area(2, 2, 22, 18) & ~hidden).all()


def test_further_shapes_of_reasonseg(tmp_path):
    shapes = [("cup", square(9, 8, 12, 11)), ("ignore", square(6, 5, 16, 15)),
              ("cup", square(14, 13, 20, 17))]
    for stem, some in zip("abcd", (shapes, [], [("flag", square(1, 1, 9, 9))], [("cup", [])])):
        reason(tmp_path, "val", stem, ["a cup"], some)
    fractions = [[-0.9, 2.9], [4.99, 2.1], [4.5, 25.5], [0.2, 25.99]]
    reason(tmp_path, "val", "turned", ["a cup"], [("cup", fractions)], exif=turn(6))
    first, *empty, turned = load_all(tmp_path, "reasonseg", "val")
    # both objects are smaller, so they cover what is ignored; the box is that of the objects alone
    objects = area(9, 8, 12, 11) | area(14, 13, 20, 17)
    assert (first["gt_mask"] == objects).all() and first["gt_box"] == (9, 8, 20, 17)
    assert (first["ignore_mask"] == area(6, 5, 16, 15) & ~objects).all()
    assert all(item["gt_box"] == (0, 0, 0, 0) and not item["ignore_mask"].any() for item in empty)
    # points lose their fractions and belong to the image that stands upright
    assert turned["image"].size == (20, 30)
    assert (turned["gt_mask"] == area(0, 2, 5, 26, (30, 20))).all()


@pytest.mark.parametrize("points, counts", [
    ([[31, -26], [29, 36], [-32, -13], [68, 42]],
     "49<0O100O010O10000O01O001O001O1O001O001O1O001O001O001Oe0c0"),
    ([[30, 4], [17, 40], [51, -27]], "b?2`02M3M3N000L"),
    ([[-783, 5], [2619, 22]], "82b000000000000000000000000000010O000000000000000000000000000G"),
    ([[-213, 22], [216, 16]], "W11c0000000000000000000000000000O010000000000000000000000000^O")])
def test_polygons_that_leave_the_image_are_cut_as_in_opencv_4_11(points, counts):
    """An OpenCV that cuts sides in another way would change ReasonSeg's numbers, as 4.10 did."""
    mask, _ = draw_reasonseg((("cup", points),), (20, 30))
    assert (mask == coco.decode({"size": [20, 30], "counts": counts})).all()


# --- Lines of json: folders of one's own, GroundingSuite ------------------------------------------

NO_BOX, POLYGON = {"image": "a.png", "text": "cup"}, {"mask": [corners(4, 5, 10, 12)]}
CUP = {"image": "a.png", "text": "the cup", "box": [4, 5, 10, 12.5]}
RLE = rle(area(4, 5, 10, 12))


# --- Lines of json: folders of one's own, GroundingSuite ------------------------------------------

NO_BOX, POLYGON = {"image": "a.png", "text": "cup"}, {"mask": [corners(4, 5, 10, 12)]}
CUP = {"image": "a.png", "text": "the cup", "box": [4, 5, 10, 12.5]} | POLYGON
RLE = rle(area(4, 5, 10, 12))


def own(root, *lines, split="train"):
    """A folder of one's own with an image of 30 x 20 pixels. A line is bytes as they are, or what
    json writes."""
    (root / "cups").mkdir(parents=True, exist_ok=True)
    random_image(30, 20).save(root / "cups/a.png")
    path = root / f"cups/{split}.jsonl"
    content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in content))
    return path


def test_a_folder_of_ones_own(tmp_path):
    (tmp_path / "cups/sub").mkdir(parents=True)
    random_image(24, 16).save(tmp_path / "cups/sub/b.jpg")
    Image.fromarray(area(1, 2, 9, 8, (16, 24))).save(tmp_path / "cups/sub/b_mask.png")
    # columns of 20: 5 + 4 x 20 zeros, 7 ones, ...
    runs = {"size": [20, 30], "counts": [85, *[7, 13] * 5, 7, 408]}
    own(tmp_path, CUP, CUP | {"mask": RLE, "text": ["cup", "mug"], "groups": ["small", "white"]},
        NO_BOX | POLYGON, {"image": "sub/b.jpg", "text": "d", "mask": "sub/b_mask.png"},
        CUP | {"text": "кот 猫 🚗", "box": None}, CUP | {"mask": runs})
    own(tmp_path, CUP | {"mask": [[]]}, split="val")
    records = read_records(tmp_path, ["cups"], ["train"])
    assert [record["id"] for record in records] == [f"cups/train/{n}" for n in range(1, 7)]
    assert records[0] == {
        "id": "cups/train/1", "split": "train", "image": str(tmp_path / "cups/a.png"),
        "expressions": ["the cup"], "size": None, "gt_box": (4, 5, 10, 12.5), "groups": [()],
        "segmentation": [corners(4, 5, 10, 12)]}
    assert records[1]["size"] == (20, 30) and records[1]["groups"] == [("small", "white")] * 2
    assert records[1]["expressions"] == ["cup", "mug"]
    assert records[4]["expressions"] == ["кот 猫 🚗"]
    items, loose, whole = load_all(tmp_path), (4, 5, 10, 12.5), (4, 5, 10, 12)
    assert [item["gt_box"] for item in items] == [loose, loose, whole, (1, 2, 9, 8), whole, loose]
    assert items[3]["image"].size == (24, 16)
    for n, item in enumerate(items):
        expected = area(1, 2, 9, 8, (16, 24)) if n == 3 else area(4, 5, 10, 12)
        assert (item["gt_mask"] == expected).all() and not item["ignore_mask"].any()
    val, = load_all(tmp_path, split="val")  # an empty mask: not ignored
    assert val["id"] == "cups/val/1/0" and not (val["gt_mask"] | val["ignore_mask"]).any()


@pytest.mark.parametrize("mode, off, on", [
    ("1", 0, 1), ("L", 0, 1), ("L", 0, 255), ("L", 99, 128), ("P", 0, 1), ("I;16", 0, 1),
    ("I;16", 0, 300), ("I;16", 30000, 40000), ("RGB", (0, 0, 0), (0, 0, 3)),
    ("RGB", (0, 0, 0), (255, 255, 255)), ("RGBA", (0, 0, 0, 255), (9, 0, 0, 255)),
    ("LA", (0, 255), (7, 255)), ("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
    ("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("RGBA", (80, 90, 99, 20), (1, 2, 3, 200)),
    ("LA", (255, 0), (0, 255)), ("transparent P", 1, 0), ("turned L", 0, 255)])
def test_a_mask_is_an_image_of_any_mode(mode, off, on, tmp_path):
    """Half of the range decides. Alpha holds the mask where it varies."""
    path, options = tmp_path / "cups/m.png", {}
    own(tmp_path, NO_BOX | {"mask": "m.png"})
    mask = Image.new(mode.split()[-1], (30, 20), off)
    mask.paste(on, (4, 5, 10, 12))
    if mode == "I;16":
        mask = Image.fromarray(np.where(area(4, 5, 10, 12), on, off).astype(np.uint16))
    if mask.mode == "P":
        mask.putpalette([255, 255, 255, 0, 0, 0])  # the numbers count, not their colours
    if mode == "transparent P":
        options["transparency"] = off
    if mode == "turned L":  # a viewer turns it by a quarter
        mask, options["exif"] = mask.transpose(Image.Transpose.ROTATE_90), turn(6)
    mask.save(path, **options)
    assert Image.open(path).mode == mask.mode
    item, = load_all(tmp_path)
    assert item["gt_mask"].dtype == bool and (item["gt_mask"] == area(4, 5, 10, 12)).all()
    assert item["gt_box"] == (4, 5, 10, 12)


def test_noise_and_soft_edges_do_not_let_a_mask_grow(tmp_path):
    true, bilinear = area(10, 10, 50, 40, (60, 80)), Image.Resampling.BILINEAR
    own(tmp_path, *(NO_BOX | {"image": "b.png", "mask": name} for name in ("m.jpg", "m.png")))
    random_image(80, 60).save(tmp_path / "cups/b.png")
    mask = Image.fromarray(true.astype(np.uint8) * 255)
    mask.save(tmp_path / "cups/m.jpg", quality=30)
    # smaller and back to its size: the same edges, in several greys
    mask.resize((40, 30), bilinear).resize((80, 60), bilinear).save(tmp_path / "cups/m.png")
    for name, item in zip(("m.jpg", "m.png"), load_all(tmp_path), strict=True):
        assert (np.asarray(Image.open(tmp_path / "cups" / name)) > 0).sum() > 1.1 * true.sum()
        assert abs(item["gt_mask"].sum() / true.sum() - 1) < 0.02


@pytest.mark.parametrize("text", ["a\u2028b\x85c".encode(), b"a\\u2028b\\u0085c"])
def test_lines_end_at_line_feeds_alone_and_empty_ones_are_skipped(text, tmp_path):
    # a BOM, CR and LF, and empty lines at the end
    line = b'\xef\xbb\xbf{"image": "a.png", "mask": [[1, 2, 3, 4]], "text": "' + text + b'"}\r'
    own(tmp_path, line, CUP, b"\r", b"")
    first, second = read_records(tmp_path, ["cups"], ["train"])
    assert first["expressions"] == ["a\u2028b\x85c"] and second["id"] == "cups/train/2"


@pytest.mark.parametrize("line, says", [
    (b"{'image': 'a.png'}", "JSONDecodeError"), (b'{"text": "caf\xe9"}', "UnicodeDecodeError"),
    ([1], "TypeError"), (POLYGON | {"text": "cup"}, "'image'"), (CUP | {"image": 7}, "TypeError"),
    (CUP | {"image": "b.png"}, "cups/b.png is missing"), (POLYGON | {"image": "a.png"}, "'text'"),
    *((CUP | {"text": text}, "a text that is not blank")
      for text in ([], ["cup", 7], "", ["", "cup"], [" \t"])), (CUP | {"text": 7}, "TypeError"),
    *((line, "it needs a mask; a box alone does not say what to segment")
      for line in (NO_BOX, CUP | {"mask": None}, CUP | {"mask": []}, CUP | {"mask": ""})),
    (CUP | {"mask": {"counts": ""}}, "'size'"),
    *((CUP | {"box": box}, says) for box, says in (
        ([1, 2, 3], "ValueError"), ([1, 2, 3, 4, 5], "ValueError"), ("abcd", "ValueError"),
        ([3, 2, 1, 4], "no box"), ([1, 4, 3, 4], "no box"), ([1, 2, 1e999, 4], "no box"),
        ([1, NAN, 3, 4], "no box"), ([1, 2, 10 ** 400, 4], "OverflowError")))],
    ids=lambda v: str(v)[:60])
def test_a_bad_line_is_named_by_file_and_number(line, says, tmp_path):
    path = own(tmp_path, CUP, line, CUP)
    refuses(lambda: load_all(tmp_path), f"{path}, line 2: ", "damaged", says)
    first, error, third = read_lines(tmp_path, "cups", ["train"])  # it does not stop check_data.py
    assert type(error) is LensError
    assert (first["id"], third["id"]) == ("cups/train/1", "cups/train/3")


@pytest.mark.parametrize("line, says", [  # what only opening the image can tell
    *((POLYGON | {"mask": mask}, says) for mask, says in (
        ("m.png", "cups/m.png"), (".", "IsADirectoryError"), ("train.jsonl", "cups/train.jsonl"),
        ("b.png", "(20, 30) pixels"), ("bomb.png", "192000000 pixels"), (7, "TypeError"),
        ("numbers.png", "brightest value is 2, and it holds others"),
        ([[NAN, 5, 9, 5, 9, 12]], "no number"), ({"size": [20, 30]}, "'counts'"))),
    *((POLYGON | {"box": box}, says) for box, says in (
        ([0.1, 0.25, 0.4, 0.6], "in fractions of the image"), ([0, 0, 1, 1], "fractions"),
        ([30, 5, 40, 12], "outside the image"), ([5000, 5000, 6000, 6000], "outside the"),
        ([4, -9, 9, -1], "outside the"), ([11, 5, 20, 12], "no pixel in common"))),
    # of the mask's 20 x 7 pixels, x 6 to 26 and y 3 to 10, these corners share 14 x 4
    ({"mask": [corners(6, 3, 26, 10)], "box": [6, 3, 20, 7]}, "only as x, y, width"),
    *(({"mask": RLE | {"size": size}}, "(30, 20) pixels, annotated as")
      for size in ([30, 20], [20, 30, 3], ["a", "b"], [-20, 30], [10 ** 6] * 2))], ids=str)
def test_a_bad_mask_or_box_is_named_by_its_row_or_image(line, says, tmp_path):
    own(tmp_path, NO_BOX | line)
    Image.new("L", (20, 30)).save(tmp_path / "cups/b.png")
    Image.fromarray(area(4, 5, 10, 12) + 2 * area(20, 5, 24, 12).astype(np.uint8)).save(
        tmp_path / "cups/numbers.png")
    if "192" in says:
        large_image(tmp_path / "cups/bomb.png")
    place = ["the original"] if "annotated" in says else ["cups/train/1", "30 x 20 pixels"]
    refuses(lambda: load_all(tmp_path), tmp_path / "cups/a.png", says, *place)


@pytest.mark.parametrize("line", [
    POLYGON | {"box": [0, 0, 30, 20]}, POLYGON | {"box": [-3, -2, 31.5, 22]},  # loose ones
    POLYGON | {"box": [9.5, 11.5, 20, 20]},  # it shares the mask's last pixel
    # as x, y, width, height the first is the same; a polygon may stick out
    {"mask": [corners(0, 0, 9, 7)], "box": [0, 0, 9, 7]}, {"mask": [[0, 0, 30, 0, 30, 20, -8, 29]]},
    *({"mask": [corners(*edges)], "box": box} for edges, box in (
        ((0, 0, 1, 2), [0, 0, 1, 1.5]), ((29, 19, 30, 20), [29, 19, 30, 20])))])
def test_a_loose_box_or_polygon_is_accepted(line, tmp_path):
    own(tmp_path, NO_BOX | line)
    item, = load_all(tmp_path)
    assert item["gt_box"] == tuple(line.get("box", extent(item["gt_mask"])))


def suite(root, *class_ids, **changes):
    """GroundingSuite-Eval as published, one object of 30 x 20 pixels per class id."""
    (root / "COCO/unlabeled2017").mkdir(parents=True, exist_ok=True)
    rows = []
    for idx, class_id in enumerate(class_ids):
        name = f"unlabeled2017/{idx:012d}.jpg"
        random_image(30, 20, idx).save(root / "COCO" / name)
        rows.append({"idx": idx, "image_path": name, "class_id": class_id, "label": "cup",
                     "caption": f"A cup, number {idx}.", "box": [3.1999999, 4.5, 10.75, 13.25],
                     "segmentation": RLE} | changes)
    path = root / "GroundingSuite-Eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_grounding_suite_by_hand(tmp_path):
    suite(tmp_path, 1, 2, 3, 4, 4)
    read = lambda: read_records(tmp_path, ["groundingsuite"], ["eval"])
    records = read()
    assert [(record["id"], record["groups"]) for record in records] == [
        (f"groundingsuite/eval/{n}", [(name,)])
        for n, name in enumerate(("stuff", "part", "multi", "single", "single"), 1)]
    assert records[0]["split"] == "eval" and records[0]["size"] == (20, 30)
    item = load_item(records[2], 0)
    assert item["expression"] == "A cup, number 2."
    assert (item["gt_mask"] == area(4, 5, 10, 12)).all() and not item["ignore_mask"].any()
    assert item["gt_box"] == (3.1999999, 4.5, 10.75, 13.25)  # loose, as it is
    assert np.array_equal(item["image"], Image.open(records[2]["image"]))
    assert records[2]["image"] == str(tmp_path / "COCO/unlabeled2017/000000000002.jpg")
    for changes, says in (({"class_id": 5}, "KeyError(5)"), ({"caption": None}, "a text"),
                          ({"image_path": "7.jpg"}, "7.jpg is missing")):
        path = suite(tmp_path, 1, **changes)
        refuses(read, f"{path}, line 1: ", says)


# --- All datasets together, and tests/tools/check_data.py -----------------------------------------

def everything(root):
    """Every dataset but the shapes world, all of it in order."""
    refer, google = Refer(root), Refer(root, "refcocog", "google")
    google.refs = google.refs[:2]
    google.save()
    google.refs_file.with_name("refs(umd).p").write_bytes(pickle.dumps(refer.refs[:2], 2))
    for split, stems in {"train": "ab", "val": "a", "test": "abc"}.items():
        for stem in stems:
            reason(root, split, stem, ["a cup", "a mug"], [("cup", square(4, 5, 10, 12))])
    suite(root, 1, 4)
    own(root, CUP | {"text": ["cup", "mug"]}, CUP)
    own(root, CUP, split="val")
    return refer


def test_datasets_are_found_and_mixed_in_the_order_asked_for(collate, tmp_path):
    assert find_datasets(tmp_path) == {} == find_datasets(tmp_path / "nowhere")
    refer = everything(tmp_path)
    (tmp_path / "not/deeper").mkdir(parents=True)
    (tmp_path / "not/deeper/train.jsonl").write_text("")
    expected = {"refcoco": ["train", "val", "testA", "testB"],
                "refcocog": ["train", "val", "test"], "refcocog-google": ["train", "val"],
                "reasonseg": ["train", "val", "test"], "groundingsuite": ["eval"],
                "cups": ["train", "val"]}
    assert find_datasets(tmp_path) == expected == find_datasets(str(tmp_path))
    records = read_records(str(tmp_path), ["cups", "refcocog-google", "refcocog"], ["val", "train"])
    assert [(record["id"], record["split"]) for record in records] == [
        ("cups/val/1", "val"), ("cups/train/1", "train"), ("cups/train/2", "train"),
        ("refcocog-google/1", "train"), ("refcocog-google/2", "val"), ("refcocog/1", "train"),
        ("refcocog/2", "val")]
    assert records[3]["image"] == records[4]["image"] == str(refer.image)  # they share images
    records = read_records(tmp_path, ["reasonseg", "cups", "refcoco"], ["train"])
    ids = ["reasonseg/train/a", "reasonseg/train/b", "cups/train/1", "cups/train/2", "refcoco/1",
           "refcoco/3", "refcoco/5"]
    assert [record["id"] for record in records] == ids
    batch, = training_batches(TrainingStream(records, seed=0), collate, 0, 1, 7, 0, 1, 0, CPU)
    assert sorted(row_id.rpartition("/")[0] for row_id in batch["row_ids"]) == sorted(ids)


@pytest.mark.parametrize("dataset, split, gone, says", [
    ("refcoco", "val", "refer_seg/refcoco", "refer_seg/refcoco/refs(unc).p is missing. Download "
                                            "REFER's refcoco.zip and COCO's train2014"),
    ("refcoco", "val", "refer_seg/images", "refer_seg/images/mscoco/images/train2014 is missing"),
    ("refcocog", "train", "refer_seg/refcocog/instances.json", "cocog/instances.json is missing"),
    ("refcocog", "train", "refer_seg/refcocog/refs(umd).p", "refcocog/refs(umd).p is missing"),
    ("reasonseg", "test", "reason_seg/ReasonSeg/test", "test is missing. Download ReasonSeg, to "),
    ("groundingsuite", "eval", "GroundingSuite-Eval.jsonl", "Eval.jsonl is missing. Download Gro"),
    ("groundingsuite", "eval", "COCO", "COCO is missing. Download GroundingSuite-Eval.jsonl and C"),
    ("cups", "train", "cups", "cups/train.jsonl is missing. Put your own data there"),
    ("shapes", "val", None, "shapes/refs(unc).p is missing. Write the shapes world: python tests/"),
    # splits and datasets that do not exist; of testB no object is there
    ("refcoco", "test", None, "no split 'test' in refcoco. It has train, val, testA, testB."),
    ("refcoco", "testB", None, "no split 'testB' in refcoco"),
    ("refcocog", "testA", None, "It has train, val, test."),
    ("refcocog-google", "test", None, "It has train, val."),
    ("groundingsuite", "train", None, "no split 'train' in groundingsuite. It has eval."),
    ("reasonseg", "testA", None, "ReasonSeg/testA is missing"),
    ("mugs", "train", None, "mugs/train.jsonl is missing")], ids=str)
def test_what_is_not_there_is_named_with_what_to_do(dataset, split, gone, says, tmp_path):
    everything(tmp_path)
    if gone:
        assert read_records(tmp_path, [dataset], [split])
        (tmp_path / gone).rename(tmp_path.parent / f"{tmp_path.name}.gone")
    refuses(lambda: read_records(tmp_path, [dataset], [split]), tmp_path, says)


def checked(root, capsys, workers=0):
    """-> exit status, {dataset and split: (objects, expressions, without a mask, broken)}, the same
    of what is published, and all other lines that it prints"""
    status = check_data.main([str(root), "--workers", str(workers)])
    line = (r"(\S+) +(\w+) +(\d+) objects, +(\d+) expressions \(published: (.+)\), "
            r"(\d+) without a mask, (\d+) broken")
    counts, published, others = {}, {}, []
    for row in capsys.readouterr().out.splitlines():
        if match := re.fullmatch(line, row):
            name = f"{match[1]} {match[2]}"
            counts[name], published[name] = tuple(map(int, match.group(3, 4, 6, 7))), match[5]
        else:
            others.append(row)
    return status, counts, published, others


WHOLE = {name: (*numbers, 0, 0) for name, numbers in {
    "refcoco train": (3, 6), "refcoco val": (1, 1), "refcoco testA": (1, 1),
    "refcoco testB": (0, 0), "refcocog train": (1, 3), "refcocog val": (1, 1),
    "refcocog test": (0, 0), "refcocog-google train": (1, 3), "refcocog-google val": (1, 1),
    "reasonseg train": (2, 4), "reasonseg val": (1, 1), "reasonseg test": (3, 3),
    "groundingsuite eval": (2, 2), "cups train": (2, 3), "cups val": (1, 1)}.items()}


def test_check_data_counts_what_is_whole_and_the_images_that_sets_share(tmp_path, capsys):
    status, *_, others = checked(tmp_path, capsys)
    assert status == 1 and f"{tmp_path}: no dataset here" in others[0]
    everything(tmp_path)
    status, counts, published, others = checked(tmp_path, capsys)
    assert status == 0 and counts == WHOLE
    assert published["refcoco train"] == "42404/120624" and published["reasonseg train"] == "239/?"
    assert published["groundingsuite eval"] == "3715/3715" and published["cups val"] == "-"
    # image 9 is in refcoco's train and val and in all of refcocog's, image 12 in refcoco's train
    # and testA; cups trains and evaluates on a.png
    assert [(int(line[0]), int(line[9]), *re.findall(r"images of (\S+)", line))
            for line in others] == [
        (2, 2, "refcoco", "refcoco"),
        *((1, 2 if a == "refcoco" else 1, a, b)
          for a in ("refcoco", "refcocog", "refcocog-google")
          for b in ("refcoco", "refcocog", "refcocog-google") if a != b or a != "refcoco"),
        (1, 1, "cups", "cups")]


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_names_and_counts_what_is_broken(workers, tmp_path, capsys):
    refer, folder, cups = everything(tmp_path), tmp_path / "reason_seg/ReasonSeg", tmp_path / "cups"
    (folder / "test/b.json").write_text("{")  # a run leaves it out
    jpeg = (folder / "train/a.jpg").read_bytes()
    (folder / "train/a.jpg").write_bytes(jpeg[:-200])  # its header is whole
    (folder / "val").rename(folder / "val.zip")
    own(tmp_path, CUP, b"{", CUP | {"mask": "m.png"}, CUP | {"mask": [[]]},
        CUP | {"image": "turned.jpg", "mask": "turned.png"}, CUP | {"image": "large.png"},
        CUP | {"image": "exif.png"})
    random_image(30, 20).save(cups / "turned.jpg", exif=turn(6))
    Image.new("L", (20, 30), 255).save(cups / "turned.png")
    large_image(cups / "large.png")
    damaged_exif(cups / "exif.png")
    suite_file = tmp_path / "GroundingSuite-Eval.jsonl"
    suite_file.write_text(suite_file.read_text().replace('"class_id": 4', '"class_id": 7'))
    # refs 3 and 5, of train, are broken; 6 has no mask, and the images of 7 and 8 do not fit
    refer.refs[2]["ann_id"] = 999
    refer.annotations[4]["segmentation"] = corners(0, 0, 2, 3)
    refer.annotations.append(refer.annotations[0] | {"id": 105, "segmentation": []})
    refer.refs += [refer.ref(6, 105, 9, "testB", "a"), refer.ref(7, 100, 13, "testB", "a"),
                   refer.ref(8, 100, 14, "testB", "a")]
    refer.images += [{"id": 13, "height": 30, "width": 40}, {"id": 14, "height": 30, "width": 41}]
    random_image(40, 30).save(refer.image_folder / "COCO_train2014_000000000014.jpg")
    refer.save()
    status, counts, _, others = checked(tmp_path, capsys, workers)
    assert status == 1 and counts == WHOLE | {
        "refcoco train": (1, 3, 0, 2), "refcoco testB": (1, 1, 1, 2),
        "reasonseg train": (1, 2, 0, 1), "reasonseg val": (0, 0, 0, 1),
        "reasonseg test": (2, 2, 0, 1), "groundingsuite eval": (1, 1, 0, 1),
        "cups train": (2, 2, 1, 5)}
    names = ["refs(unc).p, record 2", "refcoco/5 ", "000000000013.jpg is missing",
             "014.jpg: (40, 30) pixels, annotated as (41, 30)", "train/a.jpg", "val is missing",
             "test/b.json", "GroundingSuite-Eval.jsonl, line 2", "train.jsonl, line 2",
             "cups/train/3", "exif.png", "large.png", "turned.jpg"]
    told = [row for row in others if "training images" not in row]
    assert len(told) == len(names) and all(name in row for name, row in zip(names, told)), told


# --- Order and batches ----------------------------------------------------------------------------

@pytest.fixture
def records(tmp_path):
    """Nine objects of one to three expressions each."""
    refer = Refer(tmp_path)
    refer.refs = [refer.ref(n, 100, 9, "train", *(f"object {n}, words {i}"
                                                  for i in range(1 + n % 3))) for n in range(9)]
    refer.save()
    return refer.records()


def row_ids(items):
    return [item["id"] for item in items]


def test_an_epoch_holds_every_object_once_with_one_of_its_expressions(records, monkeypatch):
    for item in map(TrainingStream(records, seed=3).__getitem__, range(9)):
        n, i = map(int, item["id"].split("/")[1:])
        assert item["expression"] == f"object {n}, words {i}"
    # many epochs, without images
    ref_id = lambda row_id: int(row_id.split("/")[1])
    monkeypatch.setattr(data, "load_item", lambda record, i: {"id": f"{record['id']}/{i}"})
    stream, other = TrainingStream(records, seed=3), TrainingStream(records, seed=4)
    ids, others = row_ids(stream[k] for k in range(9 * 300)), row_ids(other[k] for k in range(9))
    # an item depends on nothing but its place; with another seed it is another one
    places = random.Random(0).sample(range(45), 45)
    assert row_ids(TrainingStream(records, seed=3)[k] for k in places) == [ids[k] for k in places]
    assert list(map(ref_id, ids[:9])) != list(map(ref_id, others))
    assert sorted(ids[:9]) != sorted(others)
    epochs = [{ref_id(row_id): row_id[-1] for row_id in ids[k:k + 9]} for k in range(0, 2700, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len(set(map(tuple, epochs[:8]))) == 8  # the orders
    drawn = Counter(ids)
    for n in range(9):
        shares = [drawn[f"refcoco/{n}/{i}"] for i in range(1 + n % 3)]
        # 100 +- 25 is three deviations
        assert sum(shares) == 300 and min(shares) > 0.75 * 300 / len(shares)
    # each object draws by itself: 2, 5 and 8, of three expressions each, agree in a ninth of the
    # epochs, 33 +- 5.4
    assert 15 < sum(e[2] == e[5] == e[8] for e in epochs) < 55


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_a_step_holds_the_same_items_on_any_number_of_processes(records, world, start):
    stream = TrainingStream(records, seed=3)
    ranks = [list(training_batches(TrainingStream(records, seed=3), row_ids, start, 6, 4, rank,
                                   world, 0, CPU)) for rank in range(world)]
    assert all(len(rank) == 6 - start for rank in ranks)
    for step, shares in zip(range(start, 6), zip(*ranks)):  # 24 items: into the third epoch of 9
        assert all(len(share) == 4 // world for share in shares)
        assert sum(shares, []) == row_ids(stream[k] for k in range(4 * step, 4 * step + 4))


def test_evaluation_takes_every_expression_once(records):
    rows, some = EvaluationRows(records), EvaluationRows(records, 3)  # of the latter 0, 8 and 17
    assert len(rows) == 3 * (1 + 2 + 3) and len(some) == 3
    assert row_ids(rows[k] for k in range(18)) == [f"refcoco/{n}/{i}" for n in range(9)
                                                   for i in range(1 + n % 3)]
    assert rows[4]["expression"] == "object 2, words 1"
    assert row_ids(some[k] for k in range(3)) == ["refcoco/0/0", "refcoco/4/1", "refcoco/8/2"]


def test_a_limit_takes_evenly():
    for limit in None, 0, 7, 8, 1000:
        assert take_evenly("abcdefg", limit) == "abcdefg"
    assert take_evenly("abcdefg", 1) == ["a"]
    assert take_evenly("abcdefg", 5) == ["a", "b", "d", "e", "g"]  # 0, 1.5, 3, 4.5, 6
    for total in range(2, 60):
        for limit in range(2, total):
            taken = take_evenly(range(total), limit)
            steps = np.diff(taken)
            assert len(taken) == limit and taken[0] == 0 and taken[-1] == total - 1
            assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_the_fingerprint_sees_every_change_of_an_annotation_and_no_change_of_place(tmp_path):
    for place in "here", "there":
        refer = everything(tmp_path / place)
        own(tmp_path / place, CUP, CUP | {"mask": "m.png"})
    read = lambda place: read_records(tmp_path / place, ["refcoco", "reasonseg", "cups"], ["train"])
    records = read("here")
    first = fingerprint(records)
    assert re.fullmatch("[0-9a-f]{16}", first) and first == fingerprint(read("there"))
    prints = [first, fingerprint(records[:-1]), fingerprint([*records[1:], records[0]])]
    for change in (changed(annotations={"bbox": (4, 5, 16, 14)}),
                   changed(annotations={"segmentation": TWO[:1]}),
                   changed(refs={"sentences": [{"sent": "the right one"}]}),
                   lambda _: reason(tmp_path / "there", "train", "a", "a cup", [("cup", [[1, 1]])]),
                   lambda _: own(tmp_path / "there", CUP | {"text": "mug"}, CUP)):
        change(refer)
        prints.append(fingerprint(read("there")))
    assert len(set(prints)) == 8


# --- The processes that load ----------------------------------------------------------------------

class Numbers(Dataset):
    """Item k is k. The process that loads it can be made to die, hang or fail at some item."""

    def __init__(self, dies=None, hangs=None, fails=None, error=None, late=0):
        self.dies, self.hangs, self.fails, self.error, self.late = dies, hangs, fails, error, late

    def __getitem__(self, k):
        if k == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if k == self.fails:
            raise self.error
        time.sleep(100 if k == self.hangs else self.late)
        return k


def number_batches(workers=1, received=(), **happens):
    """Batches of two numbers each: 0 and 1, 2 and 3."""
    return load_batches(Numbers(**happens), [range(2), range(2, 4)], list, workers, CPU, received)


@pytest.fixture
def loaders_end():
    """At the end, what align.run does at the end of every run."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for loader in multiprocessing.active_children():
        loader.kill()
        loader.join()
    signal.signal(signal.SIGCHLD, before)


def test_worker_processes_change_nothing(records, collate):
    stream = TrainingStream(records, seed=3)
    alone, helped = (list(training_batches(stream, collate, 1, 4, 4, 0, 1, workers, CPU))
                     for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert_same_batch(a, b)


def many_tensors(items):
    return {"tensors": [torch.full((3, 2), float(k)) for k in range(300)]}


def test_a_batch_takes_no_descriptor_of_its_tensors(loaders_end):
    """A tensor that came through shared memory is an open file of this process."""
    files = lambda: len(os.listdir("/proc/self/fd"))
    before = files()
    batches = load_batches(Numbers(), [range(2), range(2, 4)], many_tensors, 1, CPU)
    first = next(batches)["tensors"]
    assert files() - before < 30
    assert len(first) == 300 and torch.equal(first[7], torch.full((3, 2), 7.0))
    first[7] += 1  # it can be written, and belongs to this batch alone
    assert torch.equal(next(batches)["tensors"][7], torch.full((3, 2), 7.0))


def test_loaders_that_die_are_silent_or_cannot_start_end_the_run_with_the_ways_out(loaders_end,
                                                                                  monkeypatch):
    ways_out = "ulimit -n", "--shm-size", "--workers 0"
    refuses(lambda: list(number_batches(dies=3)), *ways_out, "DataLoader worker")
    monkeypatch.setattr(data, "PATIENCE", 2)
    batches = number_batches(hangs=3)
    assert next(batches) == [0, 1]
    refuses(lambda: next(batches), *ways_out, "for 2 seconds")

    def refuse(*_):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(multiprocessing.context.Process, "start", refuse)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # torch's half-made loader
    refuses(lambda: list(number_batches()), *ways_out, "Too many open files")


def test_a_signal_ends_the_wait_for_a_batch_that_does_not_come(loaders_end):
    received = []
    batches = number_batches(hangs=3, received=received)
    assert next(batches) == [0, 1]
    began = time.time()
    threading.Timer(0.5, received.append, [15]).start()  # as a signal's handler would
    refuses(lambda: next(batches), "signal 15", "--resume")
    assert time.time() - began < 5
    # one that is only late still comes, after 1.4 seconds
    assert next(number_batches(late=0.7, received=[15])) == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("it timed out"), FileNotFoundError("gone"),
                                   LensError("a.jpg: damaged")])
def test_an_error_of_the_data_stays_what_it_is(error, workers, loaders_end):
    with pytest.raises(type(error)) as caught:
        list(number_batches(workers, fails=1, error=error))
    # torch puts the traceback of the other process before the message
    assert type(caught.value) is type(error) and str(caught.value).strip().endswith(str(error))
    assert "ulimit" not in str(caught.value)


# --- The prompt, the answer, the frames, and what the models see ----------------------------------

FIG_4 = ('You are a helpful assistant. Find the object that best matches "',
         '" and provide its bounding box.\n\nPlease:\n'
         "1. Analyze all objects in the image carefully\n"
         "2. Compare candidates against the target description\n"
         "3. Select the most closely matching object\n4. Provide precise bounding box coordinates"
         "\n\nFormat your response as:\n<think>\n[Your step-by-step analysis and reasoning]\n"
         '</think>\n<answer>\n```json\n[\n  {"bbox_2d": [x1,y1,x2,y2], "label": question}\n]\n```\n'
         "</answer>")


@pytest.mark.parametrize("text", ["the red circle", "{object}", "a {object} in {braces} {0} {",
                                  'the "left" one\\n', "%s %(x)d", "кот 猫 🚗", ""])
def test_prompts_and_answers(text):
    conversation = lambda system, user: [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user}]}]
    assert chat_messages(text) == conversation(text.join(FIG_4), text)
    system, box = "You are a helpful assistant. ", (0.4, 128.6, 364.9, 347)
    asked = f"Output the bounding box of the {text} in the image."
    assert chat_messages(text, "released") == conversation(system, asked)
    asked = chat_messages(text, "released-cot")[1]["content"][1]["text"]
    assert chat_messages(text, "released-cot") == conversation(system, asked)
    # all of it: 357 letters and the expression
    assert asked.startswith(f'Locate "{text}", report the bbox coordinates in JSON format.Compare ')
    assert asked.endswith("i.e., <think>thinking process here</think><answer>answer here</answer>")
    assert len(asked) == len(text) + 357

    answer, written = answer_text(box, text), (0, 129, 365, 347)
    assert parse_box(answer) == written and format_reward(answer) == 0.0  # no think block
    full = answer_text(box, text, "The car is on the left.")
    assert parse_box(full) == written and format_reward(full) == 1.0
    assert full == f"<think>\nThe car is on the left.\n</think>\n{answer}"
    row, = json.loads(answer.split("```json")[1].split("```")[0])
    assert row == {"bbox_2d": list(written), "label": text}
    assert all(type(v) is int for v in row["bbox_2d"])
    # in its own letters, not escaped
    assert '"' in text or "\\" in text or f'"label": "{text}"' in answer
    for prompt in "released", "released-cot":
        assert answer_text(box, text, prompt=prompt) == (
            f"<|object_ref_start|>{text}.<|object_ref_end|>"
            "<|box_start|>(0,129),(365,347)<|box_end|>")


def test_frames_by_hand():
    # 640 x 480 pixels are resized to multiples of 28, 644 x 476: 46 x 34 patches of 14
    grid, box, size = torch.tensor([1, 34, 46]), (64, 48, 320, 240), (640, 480)
    pixels = mllm_frame("qwen2_5_vl", grid, 14)
    assert pixels == (644, 476) and all(type(v) is int for v in pixels)
    assert mllm_frame("qwen2_vl", grid, 14) == mllm_frame("qwen3_vl", grid, 14) == (1000, 1000)
    # 64 x 644 / 640 = 64.4; 48 x 476 / 480 = 47.6; half of 644 and of 476
    for frame, expected in ((pixels, (64.4, 47.6, 322, 238)), ((1000, 1000), (100, 100, 500, 500))):
        assert rescale_box(box, size, frame) == pytest.approx(expected, rel=1e-14)
        assert rescale_box(expected, frame, size) == pytest.approx(box, rel=1e-14)
    # as an answer writes it, in whole numbers
    assert parse_box(answer_text(rescale_box(box, size, pixels), "car")) == (64, 48, 322, 238)


@pytest.mark.parametrize("size", [(90, 61), (301, 200), (128, 128), (40, 400)])
def test_sams_image_is_sam_2s_own(size):
    image = random_image(*size)
    expected, actual = SAM2Transforms(S, mask_threshold=0.0)(image), sam_image(image, S)
    assert actual.shape == (3, S, S) and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)  # values of -2.2 to 2.7


def two_items():
    """100 x 70 pixels, which the processor resizes, and 128 x 128, which is SAM's own size here."""
    rng = np.random.default_rng(5)
    noise = rng.random((S, S)) < 0.4
    return [{"id": "a/1/0", "expression": "the red circle", "image": random_image(100, 70, 1),
             "gt_mask": area(21, 13, 80, 52, (70, 100)),
             "ignore_mask": np.zeros((70, 100), bool), "gt_box": (21, 13, 80, 52)},
            {"id": "b/2/1", "expression": "the smallest blue square",
             "image": random_image(S, S, 2), "gt_mask": noise,
             "ignore_mask": ~noise & (rng.random((S, S)) < 0.2), "gt_box": (0.5, 1, 127, 128)}]


def assert_same_batch(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert len(a[name]) == len(b[name]), name
        for x, y in zip(a[name], b[name]):
            assert type(x) is type(y), name
            assert torch.equal(x, y) and x.dtype == y.dtype if torch.is_tensor(x) else x == y, name


def test_a_batch_by_hand(processor, collate):
    items = two_items()
    batch = collate(items)
    # Patches of 8, merged 2 x 2: sides are multiples of 16, with at least 150^2 pixels.
    # 100 x 70, times sqrt(22500 / 7000) = 1.79, is 179 x 125: up to 192 x 128, 24 x 16 patches;
    # 128 becomes 150: up to 160, 20 patches
    assert batch["grid_thw"].tolist() == [[1, 16, 24], [1, 20, 20]]
    assert batch["mllm_frames"] == [(192, 128), (160, 160)]
    thousandths = Collator(processor, "qwen2_vl", S, 2048)(items)["mllm_frames"]
    assert thousandths == [(1000, 1000)] * 2
    # colours, frames, a patch
    assert batch["pixel_values"].shape == (384 + 400, 3 * 2 * 8 * 8)
    alone = [processor.image_processor(images=[item["image"]], return_tensors="pt")["pixel_values"]
             for item in items]
    torch.testing.assert_close(batch["pixel_values"], torch.cat(alone), atol=1e-6, rtol=0)
    assert batch["sam_pixels"].shape == (2, 3, S, S)
    assert torch.equal(batch["sam_pixels"][0], sam_image(items[0]["image"], S))
    assert batch["expressions"] == ["the red circle", "the smallest blue square"]
    assert batch["row_ids"] == ["a/1/0", "b/2/1"]
    assert batch["gt_boxes"] == [(21, 13, 80, 52), (0.5, 1, 127, 128)]
    for name in "gt_mask", "ignore_mask":
        assert all(m.dtype == torch.bool and (m.numpy() == item[name]).all()
                   for m, item in zip(batch[f"{name}s"], items, strict=True))


@pytest.mark.parametrize("prompt", ["paper", "released", "released-cot"])
def test_the_tokens_of_a_batch(prompt, processor):
    items, tokenizer = two_items(), processor.tokenizer
    batch = Collator(processor, "qwen2_5_vl", S, 2048, prompt)(items)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for item, ids, types, pieces in zip(items, batch["prompt_ids"], batch["token_types"],
                                        (384 // 4, 400 // 4), strict=True):
        assert ids.dtype == types.dtype == torch.long and ids.shape == types.shape == (len(ids),)
        assert (types == (ids == pad)).all() and types.sum() == pieces
        where = types.nonzero()[:, 0]
        assert where[-1] - where[0] == pieces - 1  # in one run
        system, user = chat_messages(item["expression"], prompt)
        assert tokenizer.decode(ids[:where[0]]) == (
            f"<|im_start|>system\n{system['content'][0]['text']}<|im_end|>\n"
            "<|im_start|>user\n<|vision_start|>")
        assert tokenizer.decode(ids[where[-1] + 1:]) == (
            f"<|vision_end|>{user['content'][1]['text']}<|im_end|>\n<|im_start|>assistant\n")


def test_what_the_collator_refuses(processor, collate):
    items = two_items()
    length = max(map(len, collate(items)["prompt_ids"]))  # never cut
    exact = Collator(processor, "qwen2_5_vl", S, length)(items)
    assert max(map(len, exact["prompt_ids"])) == length
    refuses(lambda: Collator(processor, "qwen2_5_vl", S, length - 1)(items), "b/2/1",
            f"{length} tokens", f"limit is {length - 1}", "--max-prompt", "--max-pixels")
    for expression in "<|image_pad|>", "the <|im_end|> sign", "<|endoftext|>s":
        items[1]["expression"] = expression
        refuses(lambda: collate(items), "b/2/1", repr(expression), "special token", "other words")
    items[1]["expression"] = "a < b, |x| > 1 <image_pad>"
    assert collate(items)["expressions"][1] == "a < b, |x| > 1 <image_pad>"


def test_low_res_masks_are_area_averages(collate):
    items = two_items()
    items[1]["ignore_mask"][:] = False
    batch = collate(items)
    low = batch["low_res_masks"]
    assert low.shape == (2, 32, 32) and low.dtype == torch.float32
    assert low.min() >= 0 and low.max() <= 1 and (batch["low_res_weights"] == 1).all()
    assert 0.3 < low[1].mean() < 0.5 and len(low[1].unique()) > 5  # it is no threshold
    # each cell: the pixels that it touches; of 128 x 128, blocks of 4 x 4
    cells = lambda n: [slice(i * n // 32, -(-(i + 1) * n // 32)) for i in range(32)]
    for item, averages in zip(items, low, strict=True):
        height, width = item["gt_mask"].shape
        expected = [[item["gt_mask"][y, x].mean() for x in cells(width)] for y in cells(height)]
        np.testing.assert_allclose(averages, expected, atol=1e-6)


def test_ignored_pixels_weigh_nothing(collate):
    # 128 x 128: a cell is 4 x 4 pixels
    item = two_items()[1]
    mask, ignore = item["gt_mask"], item["ignore_mask"] = np.zeros((2, S, S), bool)
    ignore[0:4, 0:2], mask[0:4, 2:4] = True, True  # half ignored, all else the object
    ignore[0:2, 4:8], mask[2, 4:8] = True, True  # half ignored, half the rest the object
    ignore[0:4, 8:12] = True  # nothing left
    ignore[0, 12:16] = True  # a quarter ignored, no object
    mask[4:7, 0:4] = True  # three quarters the object, none ignored
    batch = collate([item])
    low, weights = batch["low_res_masks"][0], batch["low_res_weights"][0]
    assert low.shape == weights.shape == (32, 32) and low.dtype == weights.dtype == torch.float32
    assert low[0, :4].tolist() == [1, 0.5, 0, 0] and weights[0, :4].tolist() == [0.5, 0.5, 0, 0.75]
    assert low[1, 0] == 0.75 and weights[1, 0] == 1
    # all other cells: no object, full weight
    assert low.sum() == 2.25 and weights.sum() == 32 * 32 - 2.25


def test_a_batch_can_be_cut_and_moved(collate):
    items = two_items()
    batch = collate(items)
    for indices in [0], [1], [0, 1], [1, 0], [1, 1, 0], range(1, 2):
        assert_same_batch(select(batch, indices), collate([items[i] for i in indices]))
    moved = to_device(batch, "meta")  # a device that every machine has
    on_device = {"pixel_values", "grid_thw", "sam_pixels", "low_res_masks", "low_res_weights"}
    assert moved.keys() == batch.keys() and all(moved[name].is_meta for name in on_device)
    assert all(moved[name] is batch[name] for name in batch.keys() - on_device)
    assert not batch["pixel_values"].is_meta
    assert_same_batch(to_device(batch, "cpu"), batch)
