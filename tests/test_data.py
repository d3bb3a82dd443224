"""data.py: a hand-made REFER folder, every broken file by name, order across processes, the prompt and its frames, and the
shapes world, whose English is read back by an interpreter of its own."""
import builtins
import json
import multiprocessing
import os
import pickle
import random
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask as coco

import data
from data import (Collator, EvaluationRows, LensError, TrainingStream, answer_text, chat_messages, decode_mask, load_item,
                  load_picture, mllm_frame, read_records, read_refcoco, read_refs, rescale_box, sam_picture, select,
                  to_device, training_batches)
from rewards import format_reward, parse_box

SIDE = 128


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor
    return AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm")


def refuses(action, *fragments):
    """The error is a LensError, not a subclass or something wrapped, and its one line says each of `fragments`."""
    with pytest.raises(LensError) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is LensError and "Traceback" not in message
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
    refuses(lambda: read_refs(path), path, weapon.split(".")[1], "Download it again")   # os.system is posix.system
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
    refuses(lambda: read_refs(tmp_path / "refs(unc).p"), tmp_path / "refs(unc).p", "Download it again")


@pytest.mark.parametrize("content", [
    # [{'ref_id': 5, 'sent': 'caf\xe9', 'raw': u'caf\xe9'}] as Python 2's pickle writes it: str is bytes (S, U), here latin1;
    # unicode is V (raw-unicode-escape) or X (UTF-8)
    b"(lp0\n(dp1\nS'ref_id'\np2\nI5\nsS'sent'\np3\nS'caf\\xe9'\np4\nsS'raw'\np5\nVcaf\xe9\np6\nsa.",
    b"]q\x00}q\x01(U\x06ref_idq\x02K\x05U\x04sentq\x03U\x04caf\xe9q\x04U\x03rawq\x05X\x05\x00\x00\x00caf\xc3\xa9q\x06ua.",
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


SPOT = np.zeros((50, 24), np.uint8)                             # picture 12's object: two runs of a column each
SPOT[10:14, 3] = SPOT[20:22, 4] = 1
# Column-major runs: 3 * 50 + 10 zeros, 4 ones, then 36 to the end of column 3 and 20 in column 4, 2 ones, the rest
COUNTS = [160, 4, 56, 2, 24 * 50 - 222]


class Refer:
    """A small data set as REFER lays it out: picture 9 of 40 x 30 pixels with three objects, picture 12 of 24 x 50."""

    def __init__(self, root, dataset="refcoco", by="unc"):
        self.root, self.dataset = root, dataset
        self.folder, self.pictures = root / "refer_seg" / dataset, root / "refer_seg/images/mscoco/images/train2014"
        self.refs_file, self.instances_file = self.folder / f"refs({by}).p", self.folder / "instances.json"
        self.picture = self.pictures / "COCO_train2014_000000000009.jpg"
        self.folder.mkdir(parents=True)
        self.pictures.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0)
        for image_id, height, width in (9, 30, 40), (12, 50, 24):
            pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.pictures / f"COCO_train2014_{image_id:012d}.jpg")
        self.images = [{"id": 9, "height": 30, "width": 40, "file_name": "COCO_train2014_000000000009.jpg"},
                       {"id": 12, "height": 50, "width": 24, "file_name": "COCO_train2014_000000000012.jpg"}]
        compressed = coco.encode(np.asfortranarray(SPOT))["counts"].decode()
        self.annotations = [
            {"id": 100, "image_id": 9, "bbox": [4, 5, 16, 13],
             "segmentation": [corners(4, 5, 14, 15), corners(10, 8, 20, 18)]},
            {"id": 101, "image_id": 9, "bbox": [30.5, 2.25, 8, 4.5], "segmentation": [corners(30, 2, 38, 6)]},
            {"id": 102, "image_id": 12, "bbox": [3, 10, 2, 12], "segmentation": {"size": [50, 24], "counts": COUNTS}},
            {"id": 103, "image_id": 12, "bbox": [3, 10, 2, 12], "segmentation": {"size": [50, 24], "counts": compressed}},
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
        return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": sentences,
                "category_id": 1, "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"}    # as REFER: no such file

    def save(self):
        self.refs_file.write_bytes(pickle.dumps(self.refs, 2))
        self.instances_file.write_text(json.dumps({"images": self.images, "annotations": self.annotations}))

    def read(self):
        """What a run does: all records of a split, then every expression of every object."""
        return [load_item(record, i) for record in read_records(self.root, [self.dataset], "train")
                for i in range(len(record["texts"]))]


def test_records_by_hand(tmp_path):
    refer = Refer(tmp_path)
    first, spot, ends = read_refcoco(tmp_path, "refcoco", "train")
    assert first["id"] == "refcoco/1" and first["size"] == (30, 40)
    assert first["texts"] == ["the left one", "left", "one on the left"]       # sent, not raw
    assert first["image"] == str(refer.picture)                                # image_id's picture; file_name is no file
    assert first["box"] == (4, 5, 20, 18)                                      # 4 + 16, 5 + 13
    assert (spot["id"], spot["texts"], spot["size"]) == ("refcoco/3", ["a spot", "the dots"], (50, 24))
    assert spot["box"] == (3, 10, 5, 22) and ends["box"] == (0, 0, 5, 5)
    val, = read_refcoco(tmp_path, "refcoco", "val")
    assert val["box"] == (30.5, 2.25, 38.5, 6.75)
    test, = read_refcoco(tmp_path, "refcoco", "testA")
    assert test["id"] == "refcoco/4"


def test_items_and_masks_by_hand(tmp_path):
    Refer(tmp_path)
    records = read_records(tmp_path, ["refcoco"], "train")
    item = load_item(records[0], 2)
    assert (item["id"], item["text"], item["box"]) == ("refcoco/1/2", "one on the left", (4, 5, 20, 18))
    assert item["image"].size == (40, 30) and item["image"].mode == "RGB"
    expected = np.zeros((30, 40), bool)
    expected[5:15, 4:14] = expected[8:18, 10:20] = True
    assert item["mask"].dtype == bool and (item["mask"] == expected).all()
    assert item["mask"].sum() == 172                                           # 100 + 100, 4 x 7 of them twice
    ends = load_item(records[2], 0)["mask"]                                    # two parts far apart: 2 x 3 and 5 x 10
    assert ends.sum() == 56 and ends[:3, :2].all() and ends[20:, 35:].all()
    assert (load_item(records[1], 0)["mask"] == SPOT.astype(bool)).all()       # uncompressed RLE
    compressed, = read_records(tmp_path, ["refcoco"], "testA")
    assert (load_item(compressed, 0)["mask"] == SPOT.astype(bool)).all()


def test_masks_against_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = np.asfortranarray(rng.random((17, 23)) < 0.3)
        rle = coco.encode(mask.astype(np.uint8))
        runs, bits = [0], [0, *mask.T.ravel().tolist()]                        # column by column; the first run counts zeros
        for before, bit in zip(bits, bits[1:]):
            runs = runs[:-1] + [runs[-1] + 1] if bit == before else runs + [1]
        for counts in (rle["counts"], rle["counts"].decode(), runs):
            assert (decode_mask({"size": [17, 23], "counts": counts}, (17, 23)) == mask).all()


def test_each_data_set_has_its_own_refs_file(tmp_path):
    Refer(tmp_path, "refcocog", "umd")
    (tmp_path / "refer_seg/refcocog/refs(google).p").write_bytes(b"not this one")
    Refer(tmp_path, "refcoco+")
    ids = [record["id"] for record in read_records(tmp_path, ["refcoco+", "refcocog"], "train")]
    assert ids == ["refcoco+/1", "refcoco+/3", "refcoco+/5", "refcocog/1", "refcocog/3", "refcocog/5"]


def resaved(**changes):
    """Change entries of the first object: its ref, its annotation, its picture's entry."""
    def change(refer):
        for name, values in changes.items():
            getattr(refer, name)[0].update(values)
        refer.save()
    return change


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
    "one picture missing": (lambda r: r.picture.unlink(), "picture", "Download COCO's train2014 pictures"),
    "truncated picture": (lambda r: r.picture.write_bytes(r.picture.read_bytes()[:-300]), "picture", "again"),
    "text named jpg": (lambda r: r.picture.write_text("<html>404 Not Found</html>"), "picture", "again"),
    "empty picture": (lambda r: r.picture.write_bytes(b""), "picture", "again"),
    "other size": (lambda r: Image.new("RGB", (30, 40)).save(r.picture), "picture", "(30, 40)", "(40, 30)", "original"),
    "annotation id missing": (resaved(refs={"ann_id": 999}), "refs_file", "instances_file", "ref_id 1", "999", "again"),
    "image id missing": (resaved(refs={"image_id": 999}), "refs_file", "instances_file", "ref_id 1", "999", "again"),
    "empty segmentation": (resaved(annotations={"segmentation": []}), "instances_file", "ref_id 1, ann_id 100", "again"),
    "box to the right": (resaved(annotations={"bbox": [40, 5, 3, 3]}), "instances_file", "ref_id 1, ann_id 100", "again"),
    "box above": (resaved(annotations={"bbox": [4, -6, 3, 6]}), "instances_file", "ref_id 1, ann_id 100", "again"),
    "box without width": (resaved(annotations={"bbox": [4, 5, 0, 3]}), "instances_file", "ref_id 1, ann_id 100", "again"),
    "no expression": (resaved(refs={"sentences": []}), "refs_file", "ref_id 1, ann_id 100", "again"),
    "sentences of another kind": (resaved(refs={"sentences": [7]}), "refs_file", "ref_id 1, ann_id 100", "again"),
    "mask without a pixel": (resaved(annotations={"segmentation": [corners(5, 5, 5, 5)]}), "picture", "refcoco/1", "again"),
    "RLE without a pixel": (resaved(annotations={"segmentation": {"size": [30, 40], "counts": [1200]}}),
                            "picture", "refcoco/1", "again"),
    "instances not JSON": (lambda r: r.instances_file.write_text("<html>"), "instances_file", "Download it again"),
    "instances cut": (lambda r: r.instances_file.write_text(r.instances_file.read_text()[:-9]), "instances_file", "again"),
    "instances a list": (lambda r: r.instances_file.write_text("[]"), "instances_file", "Download it again"),
    "instances not UTF-8": (lambda r: r.instances_file.write_bytes(b'{"\xff": 1}'), "instances_file", "Download it again"),
    "no annotations": (without_annotations, "instances_file", "annotations", "Download it again"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_that_names_the_file_and_the_way_out(name, tmp_path):
    refer = Refer(tmp_path)
    assert len(refer.read()) == 6                                              # whole until it is broken
    breaks, *says = BAD[name]
    breaks(refer)
    refuses(refer.read, *(getattr(refer, word) if word in ("refs_file", "instances_file", "pictures", "picture") else word
                          for word in says))


def test_an_unknown_split_or_data_set_is_named(tmp_path):
    refer = Refer(tmp_path)
    refuses(lambda: read_refcoco(tmp_path, "refcoco", "test"), refer.refs_file, "'test'", "train, val, testA, testB")
    refuses(lambda: read_records(tmp_path, ["refcoco", "refcocog"], "train"), "refcocog", "refs(umd).p", "Download")


def test_a_prompt_above_the_limit_is_refused_and_not_cut(processor, tmp_path):
    items = Refer(tmp_path).read()[:1]
    length = len(Collator(processor, "qwen2_5_vl", SIDE, 10_000)(items)["ids"][0])
    assert len(Collator(processor, "qwen2_5_vl", SIDE, length)(items)["ids"][0]) == length
    refuses(lambda: Collator(processor, "qwen2_5_vl", SIDE, length - 1)(items),
            "refcoco/1/0", f"{length} tokens", f"limit is {length - 1}", "--max-prompt", "--max-pixels")


def test_an_error_in_a_loading_process_is_the_same_one_line(tmp_path):
    refer = Refer(tmp_path)
    refer.picture.write_text("no picture")
    stream = TrainingStream(read_records(tmp_path, ["refcoco"], "train"), seed=0)
    refuses(lambda: list(training_batches(stream, list, 0, 1, 3, 0, 1, workers=1)), refer.picture, "again")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "LA"])
def test_every_kind_of_picture_comes_as_rgb(mode, tmp_path):
    pixels = np.full((6, 9, 3), 255, np.uint8)
    pixels[:, :4] = (255, 0, 0) if mode in ("P", "CMYK", "RGBA") else 0
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.fromarray(pixels).convert(mode).save(path)
    picture = load_picture(path)
    assert picture.mode == "RGB" and picture.size == (9, 6)
    assert np.abs(np.asarray(picture).astype(int) - pixels).max() <= 2


def test_a_picture_is_read_as_stored_whatever_its_exif_says(tmp_path):
    # COCO's annotations refer to the stored pixels, so the camera's "turn me" (tag 274, 6: by 90 degrees) is not obeyed
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (9, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert Image.open(tmp_path / "a.jpg").getexif()[274] == 6 and load_picture(tmp_path / "a.jpg").size == (9, 6)


# --- order and batches ---

@pytest.fixture
def records(tmp_path):
    """Nine objects of one to three expressions each."""
    refer = Refer(tmp_path)
    refer.refs = [refer.ref(n, 100, 9, "train", *(f"object {n}, words {i}" for i in range(1 + n % 3))) for n in range(9)]
    refer.save()
    return read_records(tmp_path, ["refcoco"], "train")


def keys(items):
    return [item["id"] for item in items]


def ref_id(key):
    return int(key.split("/")[1])


def test_an_item_of_the_stream_depends_on_nothing_but_its_place(records):
    stream = TrainingStream(records, seed=3)
    ids = keys(stream[k] for k in range(45))
    places = random.Random(0).sample(range(45), 45)                            # another order, another object
    assert keys(TrainingStream(records, seed=3)[k] for k in places) == [ids[k] for k in places]
    other = keys(TrainingStream(records, seed=4)[k] for k in range(45))
    assert list(map(ref_id, other)) != list(map(ref_id, ids))
    assert sorted(other[:9]) != sorted(ids[:9])                                # the same objects, of other words


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
    monkeypatch.setattr(data, "load_item", lambda record, i: {"id": f"{record['id']}/{i}"})     # many, without pictures
    stream = TrainingStream(records, seed=3)
    drawn = Counter(stream[k]["id"] for k in range(9 * 300))
    for n in range(9):
        shares = [drawn[f"refcoco/{n}/{i}"] for i in range(1 + n % 3)]
        assert sum(shares) == 300 and min(shares) > 0.75 * 300 / len(shares)    # 100 +- 25 is three deviations
    # and for each object by itself: 2, 5 and 8, of three expressions each, agree in a ninth of the epochs, 33 +- 5.4
    epochs = [{ref_id(key): key[-1] for key in keys(stream[9 * e + k] for k in range(9))} for e in range(300)]
    assert 15 < sum(e[2] == e[5] == e[8] for e in epochs) < 55


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_a_step_holds_the_same_items_on_any_number_of_processes(records, world, start):
    def batches(rank, world, start):
        return list(training_batches(TrainingStream(records, seed=3), keys, start, 6, 4, rank, world, workers=0))

    ranks = [batches(rank, world, start) for rank in range(world)]
    stream = TrainingStream(records, seed=3)
    assert all(len(rank) == 6 - start for rank in ranks)
    for step, shares in zip(range(start, 6), zip(*ranks)):                     # 24 items: into the third epoch of 9
        assert all(len(share) == 4 // world for share in shares)
        assert sum(shares, []) == keys(stream[k] for k in range(4 * step, 4 * step + 4))


def test_worker_processes_change_nothing(records):
    alone, helped = (list(training_batches(TrainingStream(records, seed=3), keys, 1, 6, 4, 0, 1, n)) for n in (0, 2))
    assert alone == helped


def test_evaluation_takes_every_expression_once(records):
    rows = EvaluationRows(records)
    assert len(rows) == rows.total == 3 * (1 + 2 + 3)
    assert keys(rows[k] for k in range(18)) == [f"refcoco/{n}/{i}" for n in range(9) for i in range(1 + n % 3)]
    assert rows[4]["text"] == "object 2, words 1"


@pytest.mark.parametrize("limit, kept", [
    (None, range(7)), (0, range(7)), (7, range(7)), (8, range(7)), (1000, range(7)),
    (1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (5, [0, 1, 3, 4, 6]),           # 0, 1.5, 3, 4.5, 6
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

FIG_4 = ('You are a helpful assistant. Find the object that best matches "', '''" and provide its bounding box.

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
EXPRESSIONS = ["the red circle", "{object}", "a {object} in {braces} {0} {", 'the "left" one\\n', "%s %(x)d", "кот 猫 🚗", ""]


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
    assert row == {"bbox_2d": list(written), "label": text} and all(type(v) is int for v in row["bbox_2d"])


def test_frames_by_hand():
    # 640 x 480 pixels are resized to multiples of 28: 23 x 28 = 644 and 17 x 28 = 476, 46 x 34 patches of 14
    grid = torch.tensor([1, 34, 46])
    assert mllm_frame("qwen2_5_vl", grid, 14) == (644, 476)
    assert mllm_frame("qwen2_vl", grid, 14) == mllm_frame("qwen3_vl", grid, 14) == (1000, 1000)
    assert all(type(v) is int for v in mllm_frame("qwen2_5_vl", grid, 14))
    box = (64, 48, 320, 240)
    # 64 x 644 / 640 = 64.4; 48 x 476 / 480 = 47.6; half of 644 and of 476
    assert rescale_box(box, (640, 480), (644, 476)) == pytest.approx((64.4, 47.6, 322, 238), rel=1e-14)
    assert rescale_box(box, (640, 480), (1000, 1000)) == pytest.approx((100, 100, 500, 500), rel=1e-14)
    # and back, from what the model would write: 64 x 640 / 644, 48 x 480 / 476
    back = rescale_box((64, 48, 322, 238), (644, 476), (640, 480))
    assert back == pytest.approx((63.602484, 48.403361, 320, 240), rel=1e-7)
    assert rescale_box((100, 100, 500, 500), (1000, 1000), (640, 480)) == pytest.approx(box, rel=1e-14)
    assert parse_box(answer_text(rescale_box(box, (640, 480), (644, 476)), "car")) == (64, 48, 322, 238)


# --- what the models see ---

def random_picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(90, 61), (301, 200), (128, 128), (40, 400)])
def test_sams_picture_is_sam_2s_own(size):
    from sam2.utils.transforms import SAM2Transforms
    picture = random_picture(*size)
    expected, actual = SAM2Transforms(SIDE, mask_threshold=0.0)(picture), sam_picture(picture, SIDE)
    assert actual.shape == (3, SIDE, SIDE) and actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)             # of values between -2.2 and 2.7


def two_items():
    """100 x 70 pixels, which the processor resizes, and 128 x 128, which is SAM's own size here."""
    rng = np.random.default_rng(5)
    small, square = np.zeros((70, 100), bool), rng.random((SIDE, SIDE)) < 0.4
    small[13:52, 21:80] = True
    return [{"id": "a/1/0", "text": "the red circle", "image": random_picture(100, 70, 1), "mask": small,
             "box": (21, 13, 80, 52)},
            {"id": "b/2/1", "text": "the smallest blue square", "image": random_picture(SIDE, SIDE, 2), "mask": square,
             "box": (0.5, 1, 127, 128)}]


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
    # Patches of 8, merged 2 x 2: sides are rounded to multiples of 16. 100 x 70 -> 96 x 64, 12 x 8 patches; 128 -> 16
    assert batch["grid_thw"].tolist() == [[1, 8, 12], [1, 16, 16]]
    assert batch["frames"] == [(96, 64), (128, 128)]
    assert Collator(processor, "qwen2_vl", SIDE, 2048)(items)["frames"] == [(1000, 1000)] * 2
    assert batch["pixel_values"].shape == (96 + 256, 3 * 2 * 8 * 8)             # colours, frames, a patch
    alone = [processor.image_processor(images=[item["image"]], return_tensors="pt")["pixel_values"] for item in items]
    torch.testing.assert_close(batch["pixel_values"], torch.cat(alone), atol=1e-6, rtol=0)

    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for ids, types, text, pieces in zip(batch["ids"], batch["types"], batch["texts"], (96 // 4, 256 // 4)):
        assert ids.dtype == types.dtype == torch.long and ids.shape == types.shape == (len(ids),)
        assert (types == (ids == pad)).all() and types.sum() == pieces
        where = types.nonzero()[:, 0]
        assert where[-1] - where[0] == pieces - 1                               # in one run
        before, after = (processor.tokenizer.decode(part) for part in (ids[:where[0]], ids[where[-1] + 1:]))
        assert f'best matches "{text}" and provide' in before and before.endswith("<|vision_start|>")
        assert after == f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"

    assert batch["sam_pixels"].shape == (2, 3, SIDE, SIDE)
    assert torch.equal(batch["sam_pixels"][0], sam_picture(items[0]["image"], SIDE))
    assert batch["texts"] == ["the red circle", "the smallest blue square"] and batch["keys"] == ["a/1/0", "b/2/1"]
    assert batch["boxes"] == [(21, 13, 80, 52), (0.5, 1, 127, 128)]
    assert all(m.dtype == torch.bool and (m.numpy() == item["mask"]).all() for m, item in zip(batch["masks"], items))


def test_low_masks_are_area_averages(collate):
    items = two_items()
    low = collate(items)["low_masks"]
    assert low.shape == (2, 32, 32) and low.dtype == torch.float32 and low.min() >= 0 and low.max() <= 1
    blocks = items[1]["mask"].reshape(32, 4, 32, 4).mean((1, 3))                # 128 / 32 = 4: blocks of 4 x 4
    np.testing.assert_allclose(low[1], blocks, atol=1e-7)
    assert 0.3 < low[1].mean() < 0.5 and len(low[1].unique()) > 5               # it is no threshold
    for y in range(32):                                                         # each cell: the pixels that it touches
        for x in range(32):
            rows, columns = (slice(i * n // 32, -(-(i + 1) * n // 32)) for i, n in ((y, 70), (x, 100)))
            assert low[0, y, x].item() == pytest.approx(items[0]["mask"][rows, columns].mean(), abs=1e-6)


@pytest.mark.parametrize("indices", [[0], [1], [0, 1], [1, 0], [1, 1, 0], range(1, 2)])
def test_a_selection_is_the_batch_of_the_selected(collate, indices):
    items = two_items()
    assert_same_batch(select(collate(items), indices), collate([items[i] for i in indices]))


def test_only_what_the_models_read_is_moved(collate):
    batch = collate(two_items())
    moved = to_device(batch, "meta")                                            # a device that every machine has
    on_device = {"pixel_values", "grid_thw", "sam_pixels", "low_masks"}
    assert moved.keys() == batch.keys() and all(moved[name].is_meta for name in on_device)
    assert all(moved[name] is batch[name] for name in batch.keys() - on_device)
    assert not batch["pixel_values"].is_meta
    assert_same_batch(to_device(batch, "cpu"), batch)


# --- the shapes world ---

SPLITS = {"train": 10, "val": 3, "testA": 6, "testB": 6}


def scenes(count, seed=0):
    rng = random.Random(seed)
    return [data.draw_scene(rng) for _ in range(count)]


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, and every scene that was drawn for it: (root, [(picture, things)])."""
    root, drawn, draw = tmp_path_factory.mktemp("world"), [], data.draw_scene
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "draw_scene", lambda rng: drawn.append(draw(rng)) or drawn[-1])
        data.write_shapes_world(root, splits=SPLITS)
    return root, drawn


# An interpreter of the expressions, written from their words: colour, shape, superlative, relation. x, y and r are a
# thing's centre and half its width; `slack` asks that who wins a comparison wins it by so many pixels (r: by 4).

HUES, KINDS = ["red", "green", "blue", "yellow"], ["circle", "square", "triangle", "diamond"]
BEYOND = {"left of": lambda a, b: b["x"] - a["x"], "right of": lambda a, b: a["x"] - b["x"],
          "above": lambda a, b: b["y"] - a["y"], "below": lambda a, b: a["y"] - b["y"]}
MOST = {"leftmost": BEYOND["left of"], "rightmost": BEYOND["right of"], "topmost": BEYOND["above"],
        "bottommost": BEYOND["below"], "smallest": lambda a, b: b["r"] - a["r"], "largest": lambda a, b: a["r"] - b["r"]}


def called(phrase, things):
    """Those that a noun phrase may mean: "shape", "circle", "red shape", "red circle"."""
    *adjectives, noun = phrase.split()
    assert noun in KINDS + ["shape"] and all(word in HUES for word in adjectives) and len(adjectives) < 2, phrase
    return [i for i, thing in enumerate(things)
            if noun in ("shape", thing["shape"]) and adjectives in ([], [thing["color"]])]


def meant(text, things, slack=0):
    """Every thing of which the expression is true."""
    phrase = text.removeprefix("the ")
    assert phrase != text
    relation = re.fullmatch("(.+) (left of|right of|above|below) the (.+)", phrase)
    if relation:
        group, word, anchor = relation.groups()
        anchor, = called(anchor, things)                                        # it must be one
        return [i for i in called(group, things) if i != anchor and BEYOND[word](things[i], things[anchor]) > slack]
    word, _, group = phrase.partition(" ")
    if word in MOST:
        among, slack = called(group, things), slack and (4 if word in ("smallest", "largest") else slack)
        return [i for i in among if all(MOST[word](things[i], things[j]) > slack for j in among if j != i)]
    return called(phrase, things)


def sentences(things):
    """All that can be said about a scene in these words, if its group has two members and its anchor one."""
    names = {f"{thing['color']} {thing['shape']}" for thing in things}
    groups = ["shape", *KINDS, *(f"{hue} shape" for hue in HUES), *names]
    anchors = [name for name in names if len(called(name, things)) == 1]
    yield from (f"the {name}" for name in names)
    for group in groups:
        if len(called(group, things)) > 1:
            yield from (f"the {word} {group}" for word in MOST)
            yield from (f"the {group} {word} the {anchor}" for word in BEYOND for anchor in anchors)


def test_every_expression_means_one_thing_and_no_other():
    seen = Counter()
    for _, things in scenes(300):
        for kind, index, text, _ in data.describe(things):
            assert meant(text, things) == [index], text                         # to the letter, and clearly so
            assert meant(text, things, slack=9.99) == [index], text
            words = set(text.split())
            expected = "size" if words & {"smallest", "largest"} else "position" if words & set(MOST) else (
                "attribute" if len(words) == 3 and "shape" not in words else "relation")
            assert kind == expected, text
            seen.update(words & {*MOST, "left", "right", "above", "below"} or {kind})
    assert len(seen) == len(MOST) + 4 + 1 and min(seen.values()) > 200, seen    # every word was put to the test


def test_nothing_that_could_be_said_is_missing():
    for _, things in scenes(100, seed=1):
        said = [text for _, _, text, _ in data.describe(things)]
        clear = {t for t in sentences(things) if len(meant(t, things)) == 1 and meant(t, things) == meant(t, things, 9.99)}
        borderline = {t for t in sentences(things) if meant(t, things, 10.01) != meant(t, things, 9.99)}
        assert len(said) == len(set(said)) and clear - borderline == set(said) - borderline


def third(thing):
    """Where a thing's box stands, in words."""
    x1, y1, x2, y2 = thing["box"]
    row = next(word for word, end in (("top", 1), ("middle", 2), ("bottom", 3)) if (y1 + y2) / 2 < SIDE * end / 3)
    column = next(word for word, end in (("left", 1), ("center", 2), ("right", 3)) if (x1 + x2) / 2 < SIDE * end / 3)
    return f"{row} {column}"


def near_a_border(thing):
    return any(abs((thing["box"][i] + thing["box"][i + 2]) / 2 - SIDE * n / 3) <= 1 for i in (0, 1) for n in (1, 2))


def test_the_reasoning_tells_the_truth():
    patterns = {"attribute": r"The (?P<own>\w+ \w+) is at the (?P<place>\w+ \w+)\.",
                "position": r"The (?P<said>.+) is the (?P<own>\w+ \w+) at the (?P<place>\w+ \w+)\.",
                "relation": r"The (?P<anchor>\w+ \w+) is at the (?P<there>\w+ \w+)\. "
                            r"The (?P<said>.+) it is the (?P<own>\w+ \w+) at the (?P<place>\w+ \w+)\."}
    patterns["size"] = patterns["position"]
    checked = Counter()
    for _, things in scenes(300, seed=2):
        for kind, index, text, reasoning in data.describe(things):
            said = re.fullmatch(patterns[kind], reasoning).groupdict()
            own, anchor = things[index], None
            assert said["own"] == f"{own['color']} {own['shape']}"
            assert said["place"] == third(own) or near_a_border(own), reasoning
            if kind == "relation":
                anchor, = (things[i] for i in called(said["anchor"], things))
                assert said["there"] == third(anchor) or near_a_border(anchor), reasoning
                assert text == f"the {said['said']} the {said['anchor']}"
            elif kind != "attribute":
                assert text == f"the {said['said']}"
            assert format_reward(answer_text(own["box"], text, reasoning)) == 1.0
            checked[said["place"]] += not near_a_border(own)
    assert len(checked) == 9 and min(checked.values()) > 50, checked


def test_things_have_exact_boxes_and_do_not_overlap():
    for picture, things in scenes(100, seed=3):
        assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8 and 1 < len(things) < 5
        for thing in things:
            mask, (x1, y1, x2, y2) = thing["mask"], thing["box"]
            assert mask.shape == (SIDE, SIDE) and mask.dtype == bool
            assert mask[y1:y2, x1:x2].sum() == mask.sum() and all(type(v) is int for v in thing["box"])
            assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any()
            # what the words are judged by is what the picture shows, to a pixel
            assert abs((x1 + x2) / 2 - thing["x"]) <= 1 and abs((y1 + y2) / 2 - thing["y"]) <= 1
            assert abs((x2 - x1) / 2 - thing["r"]) <= 1 and abs((y2 - y1) / 2 - thing["r"]) <= 1
        for a, b in combinations(things, 2):
            assert not (a["mask"] & b["mask"]).any()
            (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a["box"], b["box"]
            assert ax2 <= bx1 or bx2 <= ax1 or ay2 <= by1 or by2 <= ay1


def looks(mask):
    """The shape that a mask shows: how full its box is (pi / 4, 1, 1 / 2, 1 / 2), and where it is widest."""
    y, x = np.where(mask)
    inside = mask[y.min():y.max() + 1, x.min():x.max() + 1]
    full, widest = inside.mean(), inside.sum(1).argmax() / len(inside)
    return "square" if full > 0.93 else "circle" if full > 0.68 else "triangle" if widest > 0.85 else "diamond"


def hue(pixels):
    """The colour word for (N, 3) pixels: grey is none."""
    red, green, blue = (pixels.astype(float).mean(0) > 128)
    return {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 0): "yellow"}.get((red, green, blue))


def test_a_picture_shows_what_its_things_are_called():
    for picture, things in scenes(100, seed=4):
        for thing in things:
            assert looks(thing["mask"]) == thing["shape"] and hue(picture[thing["mask"]]) == thing["color"]
        background = picture[~np.any([thing["mask"] for thing in things], 0)].astype(int)
        assert (np.ptp(background, axis=1) == 0).all() and hue(background) is None


def test_kinds_of_expression_are_drawn_in_their_shares():
    found = [("attribute", 0, "a", ""), ("size", 0, "s", ""), *(("relation", 0, f"r{i}", "") for i in range(20))]
    rng = random.Random(0)
    drawn = Counter(data.pick_expression(found, rng)[2] for _ in range(7000))
    assert abs(drawn["a"] - 3000) < 150 and abs(drawn["s"] - 2000) < 150        # of 3 + 2 + 2; a deviation is 41
    assert all(abs(drawn[f"r{i}"] - 100) < 45 for i in range(20))


def test_the_same_seed_writes_the_same_bytes(world, tmp_path):
    assert len(files(world[0])) == sum(SPLITS.values()) + 2
    data.write_shapes_world(tmp_path / "again", splits=SPLITS)
    assert files(tmp_path / "again") == files(world[0])
    data.write_shapes_world(tmp_path / "other", seed=8, splits=SPLITS)
    assert files(tmp_path / "other").keys() == files(world[0]).keys()
    assert not files(tmp_path / "other").items() & files(world[0]).items()


def test_two_writers_at_once_leave_one_whole_world(world, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(2)

    def write():
        ready.wait(60)
        data.write_shapes_world(tmp_path, splits=SPLITS)

    writers = [fork.Process(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["refer_seg"] and files(tmp_path) == files(world[0])


def test_the_world_on_disk_is_true(world):
    """Through the loader: each item's words, pixels, mask and box against the scene that was drawn for its picture."""
    root, drawn = world
    pictures, used = np.stack([picture for picture, _ in drawn]).astype(float), set()
    for split, count in SPLITS.items():
        records = read_records(root, ["shapes"], split)
        assert len(records) == count
        for record in records:
            assert 1 <= len(record["texts"]) <= 3 and len(set(record["texts"])) == len(record["texts"])
            items = [load_item(record, i) for i in range(len(record["texts"]))]
            pixels, mask = np.asarray(items[0]["image"]), items[0]["mask"]
            distance = np.abs(pictures - pixels).mean((1, 2, 3))                # JPEG changes little
            scene, runner_up = np.argsort(distance)[:2]
            assert distance[scene] < 4 < distance[runner_up] and scene not in used
            used.add(scene)
            things = drawn[scene][1]
            assert {"testA": len(things) == 2, "testB": len(things) == 4}.get(split, 2 <= len(things) <= 4)
            own, = (i for i, thing in enumerate(things) if (thing["mask"] == mask).all())
            for item in items:
                assert meant(item["text"], things) == [own]
                assert item["box"] == things[own]["box"] and all(type(v) is int for v in item["box"])
            assert looks(mask) == things[own]["shape"] and hue(pixels[mask]) == things[own]["color"]
            y, x = np.where(mask)
            assert items[0]["box"] == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def test_the_annotations_are_coco_and_refer(world):
    folder = world[0] / "refer_seg/shapes"
    instances, refs = json.loads((folder / "instances.json").read_text()), read_refs(folder / "refs(unc).p")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    assert len(refs) == len(instances["annotations"]) == len(instances["images"]) == sum(SPLITS.values())
    assert Counter(ref["split"] for ref in refs) == SPLITS
    for ref, annotation in zip(refs, instances["annotations"]):
        assert (ref["ann_id"], ref["image_id"]) == (annotation["id"], annotation["image_id"])
        assert annotation["area"] == coco.area(annotation["segmentation"])
        assert annotation["bbox"] == coco.toBbox(annotation["segmentation"]).tolist()
        shape = looks(decode_mask(annotation["segmentation"], (SIDE, SIDE)))
        assert names[ref["category_id"]] == names[annotation["category_id"]] == shape
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
    ids = [i for ref in refs for i in ref["sent_ids"]]
    assert ids == list(range(len(ids)))


def test_the_world_is_written_when_it_is_absent_and_only_then(tmp_path, monkeypatch):
    for split, count in SPLITS.items():
        monkeypatch.setitem(data.SHAPES_SPLITS, split, count // 3)
    assert len(read_records(tmp_path / "new", ["shapes"], "testA")) == 2
    monkeypatch.setattr(data, "write_shapes_world", None)                       # a second time would call it
    assert len(read_records(tmp_path / "new", ["shapes"], "train")) == 3


def test_the_world_does_not_take_the_place_of_real_data(tmp_path):
    Refer(tmp_path)
    before = files(tmp_path)
    refuses(lambda: data.write_shapes_world(tmp_path, splits={"train": 1}), tmp_path / "refer_seg", "folder of its own")
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["refer_seg"]
