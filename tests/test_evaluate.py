"""Metrics by hand and against other implementations; one process and several, any batch size, a
kill in the middle; every dataset at once; tables, one picture, curves; the gallery of what was
kept. evaluate.py runs in this process or in forks of it: an import takes seconds."""
import base64
import contextlib
import functools
import gc
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SAM_SIDE
from PIL import Image
from pycocotools import mask as coco_mask

import align
import data
import evaluate
import gallery
import model
import rewards
import world as shapes_world
from data import LensError

EVIL = """<script>alert(1)</script> the "red" & 'blue' <img src=x onerror=alert(2)> </pre>"""


@contextlib.contextmanager
def command_line(*flags):
    """As if called from the repository with these flags, and on the CPU: a fork cannot use a GPU
    that this process used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["evaluate.py", "--preset", "tiny", *map(str, flags)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def call(*flags):
    """One evaluation in this process -> what it printed."""
    with command_line(*flags), contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main()
    return printed.getvalue()


def fork(n, *flags):
    """n processes of one evaluation, as torchrun starts them -> list of processes, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        gc.freeze()          # an earlier test's process group, collected here, would wait forever
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with command_line(*flags), contextlib.redirect_stdout(io.StringIO()):
            align.run(evaluate.main)

    forks = multiprocessing.get_context("fork")
    started = [forks.Process(target=work, args=(rank,), daemon=True) for rank in range(n)]
    for process in started:
        process.start()
    return started


def call_gallery(*given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gallery.py", *map(str, given)])
        gallery.main()


def call_on(n, *flags):
    started = fork(n, *flags)
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    assert [process.exitcode for process in started] == [0] * n


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(path):
    return json.loads(path.read_text())


def decode(prediction):
    return coco_mask.decode(prediction["mask"]).astype(bool)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny models with an untrained context module, as a run's folder. Its prompts are made as
    large as SAM's own, so that there are masks of all kinds."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with command_line("--checkpoint", "x", "--prompt-with", "box"):
        shared = align.SharedArgs(**align.TINY)
        align.start_processes(align.SharedArgs())
        lens, _ = model.build_lens(shared)
        lens.connector.to_sam[2].weight.data *= 10
        align.export(folder, lens, shared)
    return folder


# --- Metrics --------------------------------------------------------------------------------------


def record(intersection, union, box=0.0, form=1.0, key="a/1/0", **more):
    return {"intersection": intersection, "union": union, "box_iou": box, "format": form,
            "key": key, **more}


def test_summary_by_hand():
    """I/U: 30/60, 0/40, 0/0 and 10/10. gIoU: (1/2 + 0 + 1 + 1) / 4 = 0.625; cIoU: 40 / 110. A row
    whose truth is a box alone counts in the last three only."""
    rows = [record(30, 60, 0.5), record(0, 40, 0.51, 0.0), record(0, 0, 0.9), record(10, 10)]
    found = evaluate.summarize(rows)
    assert found["giou"] == pytest.approx(0.625, abs=1e-6) and found["ciou"] == 40 / 110
    # 0.5 itself is not above 0.5
    assert found["box_iou"] == pytest.approx(1.91 / 4) and found["acc50"] == 0.5
    assert found["format"] == 0.75 and found["n"] == 4
    more = evaluate.summarize([*rows, record(None, None, 0.8, 0.0)])
    assert more["giou"] == found["giou"] and more["ciou"] == found["ciou"] and more["n"] == 5
    assert more["box_iou"] == pytest.approx(2.71 / 5) and more["acc50"] == 0.6
    assert more["format"] == 0.6


def test_without_any_mask_there_is_no_mask_metric():
    found = evaluate.summarize([record(None, None, 0.6), record(None, None, 0.2, key="a/2/0")])
    assert found["box_iou"] == pytest.approx(0.4) and found["acc50"] == 0.5 and found["n"] == 2
    assert [found[name] for name in ("giou", "ciou", "giou_95", "ciou_95")] == [None] * 4
    json.dumps(found, allow_nan=False)
    rows = evaluate.tables({"val": found})[0][2]
    assert rows == [["val", "-", "-", "40.0 [20.0, 60.0]", "50.0", "100.0", "2"]]


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


@pytest.mark.parametrize("convention, ignored",
                         [("out", 255), ("background", 0), ("foreground", 1)])
def test_metrics_equal_lisas(convention, ignored):
    """Random masks of many sizes, and all the corners: no truth, no prediction, neither, a
    prediction in ignored pixels alone, everything but the truth ignored."""
    g, cases = np.random.default_rng(5), []
    for n in range(60):
        size = tuple(g.integers(5, 40, 2))
        mask, truth, ignore = g.random((3, *size)) < 0.8 * g.random((3, 1, 1))
        mask, truth, ignore = mask & (n % 5 != 1), truth & (n % 7 > 1), ignore & (n % 3 > 0)
        if n % 10 == 9:
            mask, truth = ignore.copy(), truth & False
        if n == 35:
            truth = np.arange(truth.size).reshape(size) == 7
            ignore = ~truth
        cases.append((mask, truth & ~ignore, ignore))
    assert any(not m.any() and not t.any() for m, t, _ in cases)
    assert any((m & i).any() for m, _, i in cases)
    counts = [evaluate.count(*map(torch.from_numpy, case), convention) for case in cases]
    assert all(type(n) is int for pair in counts for n in pair)
    found = evaluate.summarize([record(*pair) for pair in counts])
    giou, ciou = lisa([m for m, _, _ in cases],
                      [np.where(i, ignored, t.astype(int)) for _, t, i in cases])
    assert found["giou"] == pytest.approx(giou, abs=1e-6)
    assert found["ciou"] == pytest.approx(ciou, abs=1e-6)


@pytest.mark.parametrize("convention", ["out", "background", "foreground"])
def test_a_box_alone_has_no_counts(convention):
    none = torch.zeros(4, 5, dtype=torch.bool)
    assert evaluate.count(~none, none, ~none, convention) is None


def test_intervals_equal_a_naive_bootstrap():
    """Objects of one to five rows that resemble one another, some with a box alone. Resampling rows
    instead of objects would give clearly narrower intervals."""
    g, rows = np.random.default_rng(3), []
    for i in range(40):
        level = g.random()
        for j in range(1 + i % 5):
            size = int(g.integers(10, 1000))
            iou = int(size * np.clip(level + g.normal(0, 0.03), 0, 1))
            box = float(np.clip(level + g.normal(0, 0.1), 0, 1))
            counts = (iou, size) if i % 8 else (None, None)
            rows.append(record(*counts, box, key=f"set/{i}/{j}"))
    order = g.permutation(len(rows))
    found = evaluate.summarize([rows[i] for i in order], draws=20000)

    def naive(groups):
        g, drawn = np.random.default_rng(4), []
        for _ in range(3000):
            chosen = [r for i in g.integers(len(groups), size=len(groups)) for r in groups[i]]
            masks = [(r["intersection"], r["union"]) for r in chosen if r["union"] is not None]
            drawn.append([np.mean([i / (u + 1e-5) for i, u in masks]),
                          sum(i for i, _ in masks) / sum(u for _, u in masks),
                          np.mean([r["box_iou"] for r in chosen])])
        return np.percentile(drawn, [2.5, 97.5], axis=0).T

    objects = [[r for r in rows if r["key"].startswith(f"set/{i}/")] for i in range(40)]
    by_object, by_row = naive(objects), naive([[r] for r in rows])
    names = "giou", "ciou", "box_iou"
    for name, (low, high), (row_low, row_high) in zip(names, by_object, by_row):
        assert found[name + "_95"] == pytest.approx((low, high), abs=0.08 * (high - low)), name
        assert row_high - row_low < 0.75 * (high - low) and low < found[name] < high
    # the same rows, the same interval
    assert found == evaluate.summarize([rows[i] for i in order], draws=20000)


def test_one_object_leaves_nothing_to_draw():
    found = evaluate.summarize([record(30, 60, 0.5), record(10, 40, 0.1, key="a/1/1")])
    for name in "giou", "ciou", "box_iou":
        assert found[name + "_95"] == pytest.approx([found[name]] * 2)


def test_quartiles_by_hand():
    """Ten rows by box IoU 0, 0.1, ... 0.9 in quarters of 3, 3, 2, 2; a box alone and a run without
    checkpoint have none."""
    counts = [{"context": [i, 10], "box_prompt": [1, 2] if i < 9 else [0, 0]} for i in range(10)]
    rows = [record(0, 0, i / 10, counts=counts[i]) for i in range(10)]
    alone = record(None, None, 0.5, counts={"context": None, "box_prompt": None})
    found = evaluate.quartiles([rows[i] for i in (3, 9, 0, 5, 1, 8, 2, 7, 4, 6)] + [alone])
    assert [q["n"] for q in found] == [3, 3, 2, 2]
    assert [q["box_iou"] for q in found] == [[0.0, 0.2], [0.3, 0.5], [0.6, 0.7], [0.8, 0.9]]
    assert [q["context"] for q in found] == pytest.approx([0.1, 0.4, 0.65, 0.85], abs=1e-5)
    # two empty masks: 1
    assert [q["box_prompt"] for q in found] == pytest.approx([0.5, 0.5, 0.5, 0.75], abs=1e-5)
    assert evaluate.quartiles([record(1, 2, counts={"box_prompt": [1, 2]})]) == []
    assert evaluate.quartiles([alone]) == []
    assert len(evaluate.quartiles(rows[:2])) == 2


# --- An evaluation: its numbers, its file, batches, processes -------------------------------------


@pytest.fixture(scope="module")
def whole(world, checkpoint, tmp_path_factory):
    """The split "val" of the shapes world, all of it, in batches of 5."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--data", world, "--checkpoint", checkpoint]
    printed = call(*flags, "--eval-batch", 5, "--json", folder / "a.json", "--markdown",
                   folder / "a.md", "--predictions", folder / "a.jsonl")
    return SimpleNamespace(folder=folder, flags=flags, printed=printed,
                           result=numbers(folder / "a.json"), rows=lines(folder / "a.jsonl"))


def annotations_of(world):
    text = (world / "refer_seg/shapes/instances.json").read_text()
    return {annotation["id"]: annotation for annotation in json.loads(text)["annotations"]}


def recomputed(rows, world):
    """Masks from the predictions file, truth from the annotation file, IoUs by pycocotools. ->
    gIoU, cIoU, IoUs of the boxes"""
    truth = annotations_of(world)
    masks, true, boxes = [decode(p) for p in rows], [], []
    for p in rows:
        annotation = truth[int(p["key"].split("/")[1])]
        true.append(coco_mask.decode(annotation["segmentation"]))
        b = p["box"]
        proper = b and b[2] > b[0] and b[3] > b[1]
        ours = [b[0], b[1], b[2] - b[0], b[3] - b[1]] if proper else [0, 0, 0, 0]
        boxes.append(coco_mask.iou([ours], [annotation["bbox"]], [0])[0, 0])
    return *lisa(masks, true), boxes


def test_numbers_equal_an_independent_computation(whole, world):
    giou, ciou, boxes = recomputed(whole.rows, world)
    result = whole.result["val"]
    assert len(whole.rows) > 12
    assert {"giou", "ciou", "box_iou", "acc50", "format", "n"} <= set(result)
    assert result["n"] == len(whole.rows)
    assert result["giou"] == pytest.approx(giou, abs=1e-6)
    assert result["ciou"] == pytest.approx(ciou, abs=1e-6)
    assert result["box_iou"] == pytest.approx(np.mean(boxes), abs=1e-6)
    assert result["acc50"] == np.mean(np.array(boxes) > 0.5) and 0 < result["ciou"] < 1
    assert 0.2 < result["box_iou"] < 1
    assert "subset" not in result and "subset" not in whole.printed


def test_a_row_per_kind_and_layout(whole, world):
    """Behind the split's own, kinds before layouts, each over its own rows alone."""
    refs = pickle.loads((world / "refer_seg/shapes/refs(unc).p").read_bytes())
    kinds = {f"shapes/{ref['ref_id']}/{i}": sentence["kind"]
             for ref in refs for i, sentence in enumerate(ref["sentences"])}
    truth, groups = annotations_of(world), {}
    for sort, name_of in (("kind", lambda key: kinds[key]),
                          ("layout", lambda key: truth[int(key.split("/")[1])]["layout"])):
        assert [p[sort] for p in whole.rows] == [name_of(p["key"]) for p in whole.rows]
        for name in sorted({name_of(p["key"]) for p in whole.rows}):
            groups[f"val: {name}"] = [p for p in whole.rows if name_of(p["key"]) == name]
    assert list(whole.result) == ["val", *groups] and len(groups) > 5
    objects = {}
    for p in whole.rows:
        objects.setdefault(p["key"].rpartition("/")[0], set()).add(p["kind"])
    assert max(map(len, objects.values())) > 1             # kinds are of the row, not of the object
    for name, rows in groups.items():
        giou, ciou, boxes = recomputed(rows, world)
        found = whole.result[name]
        assert [found["giou"], found["ciou"]] == pytest.approx([giou, ciou], abs=1e-6)
        assert found["box_iou"] == pytest.approx(np.mean(boxes), abs=1e-6)
        assert found["n"] == len(rows) < len(whole.rows)
        assert f"| {name} " in whole.printed and "subset" not in found


def test_groups_by_hand():
    """A class as GroundingSuite's comes first; what has no group counts in the split alone."""
    groups = {"class": None, "kind": None, "layout": None, "counts": {}}
    rows = [record(30, 60, **{**groups, "class": "stuff"}),
            record(10, 40, **{**groups, "kind": "size", "layout": "nests"}),
            record(10, 10, **{**groups, "kind": "chain", "layout": "nests"}),
            record(0, 10, **groups)]
    split = evaluate.Split("val", "mine", "val", data.EvaluationRows(rows=rows))
    found = evaluate.summarize_split(split, rows)
    assert {name: (summary["n"], summary["ciou"]) for name, summary in found.items()} == {
        "val": (4, 50 / 120), "val: stuff": (1, 0.5), "val: chain": (1, 1.0),
        "val: size": (1, 0.25), "val: nests": (2, 0.4)}
    assert list(found) == ["val", "val: stuff", "val: chain", "val: size", "val: nests"]


@functools.cache
def frame_of(size):
    """Of the MLLM for a picture of (width, height), by its own processor."""
    from transformers import AutoProcessor
    images = AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm").image_processor
    _, height, width = images(Image.new("RGB", size))["image_grid_thw"][0].tolist()
    return 8 * width, 8 * height


def test_a_line_per_row(whole, world):
    """In the order of the split; the box is the answer's, moved from the MLLM's frame into the
    picture's."""
    records = data.read_records(world, ["shapes"], ["val"])
    expected = [(f"{r['id']}/{i}", text) for r in records for i, text in enumerate(r["texts"])]
    assert [(p["key"], p["text"]) for p in whole.rows] == expected
    assert [p["place"] for p in whole.rows] == list(range(len(expected)))
    assert {p["set"] for p in whole.rows} == {"val"}
    truth = annotations_of(world)
    for p in whole.rows:
        height, width = truth[int(p["key"].split("/")[1])]["segmentation"]["size"]
        box = rewards.parse_box(p["answer"])
        if box:
            across, down = frame_of((width, height))
            box = [value * side / of for value, side, of in
                   zip(box, (width, height) * 2, (across, down) * 2)]
        assert p["box"] == (box and pytest.approx(box))
        assert p["format"] == rewards.format_reward(p["answer"])
        assert p["counts"]["context"] == [p["intersection"], p["union"]]
        assert p["mask"]["size"] == [height, width]
    assert len({p["mask"]["counts"] for p in whole.rows}) > 5


def test_an_answer_without_a_box_still_counts(whole, tmp_path):
    """Cut after 8 tokens: no box, no format; the context queries still segment, the box prompt does
    not."""
    call(*whole.flags, "--max-completion", 8, "--limit", 5, "--json", tmp_path / "a.json",
         "--predictions", tmp_path / "a.jsonl")
    rows, result = lines(tmp_path / "a.jsonl"), numbers(tmp_path / "a.json")["val"]
    assert [p["box"] for p in rows] == [None] * 5
    assert result["box_iou"] == result["acc50"] == result["format"] == 0
    assert all(p["counts"]["box_prompt"][0] == 0 < p["counts"]["box_prompt"][1] for p in rows)
    assert any(decode(p).any() for p in rows) and result["n"] == 5
    # nothing is segmented: the union is the truth
    truth = [p["counts"]["box_prompt"][1] for p in rows]
    for p, t in zip(rows, truth):
        i, u = p["counts"]["context"]
        assert u - i == t + int(decode(p).sum()) - 2 * i


def test_an_answer_that_was_cut_has_no_format(whole, tmp_path):
    """All of its text is there, but not the end token."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/tiny/mllm")
    place = [p["format"] for p in whole.rows].index(1.0)
    tokens = tokenizer(whole.rows[place]["answer"])["input_ids"]
    call(*whole.flags, "--max-completion", len(tokens), "--predictions", tmp_path / "a.jsonl")
    cut = lines(tmp_path / "a.jsonl")[place]
    assert cut["answer"] == whole.rows[place]["answer"] and cut["box"] == whole.rows[place]["box"]
    assert cut["format"] == 0


def test_the_batch_size_does_not_change_the_numbers(whole, tmp_path):
    """Prompts of different lengths alone, in batches of 5 and all at once: the padding changes no
    answer and no mask."""
    for size in 1, 50:
        call(*whole.flags, "--eval-batch", size, "--json", tmp_path / "b.json", "--predictions",
             tmp_path / f"{size}.jsonl")
        found, rows = numbers(tmp_path / "b.json")["val"], lines(tmp_path / f"{size}.jsonl")
        for name in "giou", "ciou", "box_iou", "acc50", "format":
            assert abs(found[name] - whole.result["val"][name]) < 1e-3, name
        for p, before in zip(rows, whole.rows, strict=True):
            assert all(p[name] == before[name] for name in ("key", "answer", "box"))
            assert (decode(p) ^ decode(before)).mean() <= 2 / 16384           # of its pixels


class Decoded:
    """Which rows were decoded, by which process; after `stop_after` calls of predict, the process
    is interrupted."""

    def __init__(self, log):
        self.log, self.stop_after, self.predict = log, None, evaluate.Predictor.predict
        log.touch()

    def __call__(self, predictor, batch, places):
        if self.stop_after == 0:
            raise KeyboardInterrupt
        self.stop_after = self.stop_after and self.stop_after - 1
        with self.log.open("a") as log:
            log.write("".join(f"{os.getpid()} {key}\n" for key in batch["keys"]))
        return self.predict(predictor, batch, places)

    @property
    def keys(self):
        return [line.split()[1] for line in self.log.read_text().splitlines()]

    @property
    def shares(self):
        lines = self.log.read_text().splitlines()
        return sorted(Counter(line.split()[0] for line in lines).values())


@pytest.fixture
def decoded(monkeypatch, tmp_path_factory):
    counter = Decoded(tmp_path_factory.mktemp("decoded") / "log")
    monkeypatch.setattr(evaluate.Predictor, "predict", lambda *given: counter(*given))
    return counter


@pytest.mark.parametrize("sample", [False, True])
def test_processes_do_not_change_the_numbers(whole, tmp_path, sample, decoded):
    """13 rows on 1, 2 and 3 processes, which do not divide them: the same files, to the byte, no
    row decoded twice. One row at a time, so that no padding differs either; drawn answers too, for
    a draw belongs to its row."""
    for n, shares in (1, [13]), (2, [6, 7]), (3, [4, 4, 5]):
        decoded.log.write_text("")
        (call if n == 1 else lambda *flags: call_on(n, *flags))(
            *whole.flags, "--eval-batch", 1, "--limit", 13, "--json", tmp_path / f"{n}.json",
            "--predictions", tmp_path / f"{n}.jsonl", *["--sample"] * sample)
        assert decoded.shares == shares and len(set(decoded.keys)) == 13
    texts = [[(tmp_path / f"{n}.{kind}").read_text() for kind in ("json", "jsonl")]
             for n in (1, 2, 3)]
    assert texts[0] == texts[1] == texts[2] and len(lines(tmp_path / "3.jsonl")) == 13
    greedy = {p["key"]: p["answer"] for p in whole.rows}
    same = [p["answer"] == greedy[p["key"]] for p in lines(tmp_path / "1.jsonl")]
    assert not all(same) if sample else all(same)
    left = {f"{n}.{kind}" for n in (1, 2, 3) for kind in ("json", "jsonl")}
    assert {path.name for path in tmp_path.iterdir()} == left


# --- The predictions file -------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on(whole, tmp_path, decoded):
    """kill -9 in the middle, a line cut, another process's part, then an interruption of what goes
    on: each row is decoded once, and the result is that of the uninterrupted evaluation."""
    keys, path = [p["key"] for p in whole.rows], tmp_path / "new/rows.jsonl"
    part = path.with_name("rows.jsonl.0")
    flags = [*whole.flags, "--eval-batch", 1, "--predictions", path]
    victim, = fork(1, *flags)
    deadline = time.time() + 60
    while time.time() < deadline and not (part.exists() and len(part.read_text().splitlines()) > 3):
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert not path.exists()
    complete = [line for line in part.read_text().splitlines() if line.endswith("}")]
    assert 3 <= len(complete) < len(keys) - 6
    other = (whole.folder / "a.jsonl").read_text().splitlines()[-1]  # a part that rank 7 left
    path.with_name("rows.jsonl.7").write_text(other)
    # a row cut in the middle
    part.write_text("\n".join([*complete, complete[0].replace(keys[0], keys[-2])[:200]]))
    left = keys[len(complete):-1]
    decoded.log.write_text("")
    decoded.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        call(*flags)
    assert decoded.keys == left[:2]
    decoded.stop_after = None
    call(*flags, "--json", tmp_path / "a.json")
    assert decoded.keys == left
    rows = lines(path)
    for p, before in zip(rows, whole.rows, strict=True):
        assert all(p[name] == before[name] for name in ("key", "answer", "place"))
    found = numbers(tmp_path / "a.json")["val"]
    for name in "giou", "ciou", "box_iou", "acc50", "format", "n":
        assert abs(found[name] - whole.result["val"][name]) < 1e-3, name
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]  # the parts are gone
    printed = call(*flags, "--json", tmp_path / "b.json")  # nothing is left to do
    assert decoded.keys == left
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
    assert lines(path) == rows and "| val " in printed


def test_another_split_is_added(whole, tmp_path, decoded):
    path = tmp_path / "rows.jsonl"
    shutil.copy(whole.folder / "a.jsonl", path)
    call(*whole.flags, "--splits", "val", "testA", "--predictions", path, "--json",
         tmp_path / "a.json")
    rows, found = lines(path), numbers(tmp_path / "a.json")
    assert rows[:len(whole.rows)] == whole.rows
    assert {p["set"] for p in rows[len(whole.rows):]} == {"testA"}
    assert decoded.keys == [p["key"] for p in rows[len(whole.rows):]]
    assert [name for name in found if ":" not in name] == ["val", "testA"]
    assert found["val"] == whole.result["val"] and found["testA"]["n"] == len(decoded.keys)
    # val is not asked for, and stays
    call(*whole.flags, "--splits", "testA", "--predictions", path)
    assert len(lines(path)) == len(rows) and len(decoded.keys) == found["testA"]["n"]


def test_the_weights_that_decide(checkpoint):
    """Those of the run, of the MLLM below --mllm and of the SAM below --sam; a hub id has none."""
    tiny = ROOT / "tests/tiny"
    found = evaluate.weights_in([checkpoint, tiny / "mllm", tiny / "sam/model.pt", "Qwen/Qwen2.5"])
    assert {tiny / "mllm/model.safetensors", tiny / "sam/model.pt"} < set(found)
    assert {path.parent for path in found} == {checkpoint, tiny / "mllm", tiny / "sam"}


def test_an_expression_that_was_edited_is_predicted_again(whole, tmp_path, decoded):
    path, old = tmp_path / "rows.jsonl", [dict(row) for row in lines(whole.folder / "a.jsonl")]
    old[3]["text"] = "as it was before"
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    call(*whole.flags, "--predictions", path)
    assert decoded.keys == [old[3]["key"]] and lines(path)[3]["text"] == whole.rows[3]["text"]


def test_predictions_of_something_else_are_refused(whole, tmp_path, checkpoint):
    """Whatever decides a prediction: settings, the checkpoint, its weights. What does not is free
    to change."""
    path = tmp_path / "rows.jsonl"
    other = shutil.copytree(checkpoint, tmp_path / "other")
    shutil.copy(whole.folder / "a.jsonl", path)
    for change in (["--max-completion", 32], ["--ignore", "background"], ["--sample"],
                   ["--prompt-with", "box"],
                   ["--seed", 1], ["--checkpoint", other]):
        words = "rows.jsonl holds the predictions of another checkpoint or other settings"
        with pytest.raises(LensError, match=words):
            call(*whole.flags, "--predictions", path, *change)
    tiny = ROOT / "tests/tiny"                            # what --mllm and --sam of the preset name
    for weights in (checkpoint / "context.safetensors", tiny / "mllm/model.safetensors",
                    tiny / "sam/model.pt"):
        stat = weights.stat()
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # trained again
        try:
            with pytest.raises(LensError, match="another checkpoint"):
                call(*whole.flags, "--predictions", path)
        finally:
            os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    part = tmp_path / "part.jsonl.3"
    part.write_text(json.dumps({**whole.rows[0], "run": "another"}))
    with pytest.raises(LensError, match="part.jsonl.3 holds"):
        call(*whole.flags, "--predictions", tmp_path / "part.jsonl")
    (tmp_path / "notes.jsonl").write_text('{"my": "notes"}')
    with pytest.raises(LensError, match="notes.jsonl holds"):
        call(*whole.flags, "--predictions", tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == '{"my": "notes"}' and lines(path) == whole.rows
    call(*whole.flags, "--predictions", path, "--eval-batch", 3, "--json", tmp_path / "a.json",
         "--markdown", tmp_path / "a.md")


# --- The two ways of prompting --------------------------------------------------------------------


def test_the_box_as_prompt(whole, world, tmp_path):
    """Without a checkpoint: the answers are the same ones here (stage 1 leaves the MLLM alone), and
    what is counted is what the run with context queries noted beside. Where the box is good, so is
    SAM's mask."""
    call("--data", world, "--prompt-with", "box", "--eval-batch", 5, "--json", tmp_path / "a.json",
         "--predictions", tmp_path / "a.jsonl")
    rows, result = lines(tmp_path / "a.jsonl"), numbers(tmp_path / "a.json")["val"]
    assert [p["answer"] for p in rows] == [p["answer"] for p in whole.rows]
    for p, before in zip(rows, whole.rows, strict=True):
        assert p["counts"] == {"box_prompt": before["counts"]["box_prompt"]}
        assert [p["intersection"], p["union"]] == p["counts"]["box_prompt"]
    assert result["quartiles"] == []
    assert result["box_iou"] == whole.result["val"]["box_iou"]
    ious = np.array([p["intersection"] / (p["union"] + 1e-5) for p in rows])
    assert result["giou"] == pytest.approx(ious.mean())
    assert ious[[p["box_iou"] > 0.6 for p in rows]].mean() > 0.8
    with_checkpoint = call(*whole.flags, "--prompt-with", "box", "--eval-batch", 5, "--json",
                           tmp_path / "b.json")
    again = numbers(tmp_path / "b.json")["val"]
    assert again["giou"] == result["giou"]
    assert again["quartiles"] == whole.result["val"]["quartiles"]
    assert "Mask gIoU by quartile" in with_checkpoint


def test_quartiles_of_a_run(whole):
    """Of what is in the predictions file, sorted here by box IoU."""
    ranked = sorted(whole.rows, key=lambda p: p["box_iou"])
    found = whole.result["val"]["quartiles"]
    assert sum(q["n"] for q in found) == len(ranked) and len(found) == 4
    worst = ranked[:found[0]["n"]]
    for way in "context", "box_prompt":
        ious = [I / (U + 1e-5) if U else 1.0 for I, U in (p["counts"][way] for p in worst)]
        assert found[0][way] == pytest.approx(np.mean(ious))
    assert [q["context"] for q in found] != [q["box_prompt"] for q in found]


# --- Every dataset --------------------------------------------------------------------------------


def rectangle(size, x1, y1, x2, y2):
    """A mask of the pixels x1 ... x2, y1 ... y2, both ends included, and its corners."""
    mask = np.zeros(size, bool)
    mask[y1:y2 + 1, x1:x2 + 1] = True
    return mask, [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def write_everything(root):
    """The shapes world, once more as refcoco, and small ReasonSeg, GroundingSuite and a folder of
    one's own, in their own formats. -> {key: (truth, ignored pixels, box or None where it is the
    mask's extent)} of the last three."""
    shapes_world.write_shapes_world(root, seed=3,
                                    splits={"train": 2, "val": 3, "testA": 2, "testB": 2})
    shutil.copytree(root / "refer_seg/shapes", root / "refer_seg/refcoco")
    rng, truth = shapes_world.random.Random(1), {}

    def scene(path, height=128, width=128):
        picture, things, _ = shapes_world.make_scene(rng)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((width, height)).save(path, quality=95)
        mask = Image.fromarray(things[0]["mask"].astype(np.uint8))
        return np.asarray(mask.resize((width, height), Image.NEAREST)) > 0

    none = np.zeros((128, 128), bool)
    for split, count in ("train", 1), ("val", 3), ("test", 4):
        for n in range(count):
            path = root / f"reason_seg/ReasonSeg/{split}/{n}.jpg"
            scene(path)
            mask, points = rectangle((128, 128), 0, 0, 70 + n, 127)
            hidden, over = rectangle((128, 128), 20, 10, 110, 90 - n)  # half of it on the object
            shapes = [{"label": label, "labels": [label], "shape_type": "polygon", "points": p,
                       "image_name": path.name}
                      for label, p in (("target", points), ("ignore", over))]
            path.with_suffix(".json").write_text(json.dumps({"text": ["the thing", "another"],
                                                             "is_sentence": False,
                                                             "shapes": shapes}))
            truth[f"reasonseg/{split}/{n}/0"] = mask & ~hidden, hidden, None
    rows = []
    for n, group in enumerate([1, 2, 3, 4, 4, 1], 1):
        mask = scene(root / f"COCO/unlabeled2017/{n:012d}.jpg")
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        x, y, w, h = coco_mask.toBbox(rle).tolist()
        rows.append({"idx": n, "image_path": f"unlabeled2017/{n:012d}.jpg",
                     "box": [x - 2, y, x + w + 2, y + h],
                     "class_id": group, "caption": f"thing {n}",
                     "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})
        truth[f"groundingsuite/eval/{n}/0"] = mask, none, rows[-1]["box"]
    (root / "groundingsuite").mkdir()
    (root / "groundingsuite/GroundingSuite-Eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine, size = root / "mine", (100, 120)  # no multiple of a patch
    masks = [scene(mine / f"{name}.jpg", *size) for name in "abc"]
    polygon, corners = rectangle(size, 10, 20, 39, 69)
    Image.fromarray(masks[0]).save(mine / "a.png")
    own = [{"image": "a.jpg", "text": ["the first", EVIL], "mask": "a.png"},
           {"image": "c.jpg", "text": "a box", "box": [9, 8, 70, 60]},
           {"image": "b.jpg", "text": "polygons", "mask": [[10, 20, 40, 20, 40, 70, 10, 70]]}]
    for split in "train", "val":
        (mine / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)))
    nothing = np.zeros(size, bool)
    truth |= {"mine/val/1/0": (masks[0], nothing, None), "mine/val/1/1": (masks[0], nothing, None),
              "mine/val/2/0": (nothing, ~nothing, [9, 8, 70, 60]),
              "mine/val/3/0": (polygon, nothing, None)}
    return truth


@pytest.fixture(scope="module")
def everything(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("everything")
    truth = write_everything(root)
    printed = call("--data", root, "--checkpoint", checkpoint, "--splits", "all", "--eval-batch", 4,
                   "--json", root / "a.json", "--predictions", root / "a.jsonl",
                   "--markdown", root / "a.md")
    return SimpleNamespace(root=root, truth=truth, printed=printed, result=numbers(root / "a.json"),
                           rows=lines(root / "a.jsonl"))


SETS = ["refcoco val", "refcoco testA", "refcoco testB", "reasonseg val", "reasonseg test",
        "groundingsuite eval", "shapes val", "shapes testA", "shapes testB", "mine val"]


def test_all_splits_of_all_datasets(everything):
    """A name for each, GroundingSuite by class as well, the world by kind and layout, and none of
    the training splits."""
    groups = [f"groundingsuite eval: {group}" for group in ("multi", "part", "single", "stuff")]
    names = [name for name in everything.result if not name.startswith(("refcoco", "shapes"))]
    assert names == [*SETS[3:6], *groups, "mine val"]
    assert [name for name in everything.result if ":" not in name] == SETS
    for name in SETS:
        sorts = {sort: [p[sort] for p in everything.rows if p["set"] == name]
                 for sort in ("class", "kind", "layout")}
        sorts = [sorted(set(values) - {None}) for values in sorts.values()]
        assert [other.partition(": ")[2] for other in everything.result
                if other.startswith(f"{name}: ")] == sum(sorts, [])
    n = {name: result["n"] for name, result in everything.result.items()}
    assert [n[name] for name in (*SETS[3:6], *groups, "mine val")] == [3, 4, 6, 1, 1, 2, 2, 4]
    assert {p["set"] for p in everything.rows} == set(SETS)
    assert len(everything.rows) == sum(n[name] for name in SETS)
    for name in "val", "testA", "testB":  # the same pictures under two names
        a, b = (everything.result[f"{dataset} {name}"] for dataset in ("refcoco", "shapes"))
        assert {**a, "title": ""} == {**b, "title": ""}
    json.dumps(everything.result, allow_nan=False)


def expected(everything, rows, ignored=255):
    """Metrics of some rows of the predictions, from the truth that was written. The last is the
    mean box IoU."""
    chosen = [(decode(p), *everything.truth[p["key"]]) for p in rows]
    masks = [(mask, np.where(hidden, ignored, truth.astype(int)))
             for mask, truth, hidden, _ in chosen if not hidden.all()]
    xywh = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]
    ious = []
    for p, (_, truth, _, box) in zip(rows, chosen):
        if box is None:
            box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(truth.astype(np.uint8))))
        else:
            box = xywh(box)
        ious.append(coco_mask.iou([xywh(p["box"])], [box], [0])[0, 0] if p["box"] else 0.0)
    return *lisa(*zip(*masks)), np.mean(ious)


@pytest.mark.parametrize("name", ["reasonseg val", "reasonseg test", "groundingsuite eval",
                                  "groundingsuite eval: stuff",
                                  "groundingsuite eval: single", "mine val"])
def test_each_set_equals_an_independent_computation(everything, name):
    rows = [p for p in everything.rows if p["set"] == name.partition(":")[0]]
    groups = {1: "stuff", 2: "part", 3: "multi", 4: "single"}
    if ":" in name:
        classes = [groups[n] for n in (1, 2, 3, 4, 4, 1)]
        rows = [p for p, group in zip(rows, classes) if group == name.partition(": ")[2]]
        assert len(rows) == 2
    found = everything.result[name]
    three = [found["giou"], found["ciou"], found["box_iou"]]
    assert three == pytest.approx(expected(everything, rows), abs=1e-6)


def test_boxes_are_in_the_pictures_frame(everything):
    """One's own pictures have 120 x 100 pixels, and the MLLM speaks of 128 x 96 of them, or
    whatever its processor says."""
    width, height = frame_of((120, 100))
    rows = [p for p in everything.rows if p["set"] == "mine val" and p["box"]]
    assert rows and (width, height) != (120, 100)
    for p in rows:
        x1, y1, x2, y2 = rewards.parse_box(p["answer"])
        assert p["mask"]["size"] == [100, 120]
        mine = [x1 * 120 / width, y1 * 100 / height, x2 * 120 / width, y2 * 100 / height]
        assert p["box"] == pytest.approx(mine)


@pytest.mark.parametrize("convention, ignored", [("background", 0), ("foreground", 1)])
def test_the_other_conventions_for_ignored_pixels(everything, checkpoint, tmp_path, convention,
                                                  ignored):
    """One dataset, so the split's bare name. The answers stay, the counts do not."""
    call("--data", everything.root, "--checkpoint", checkpoint, "--datasets", "reasonseg",
         "--splits", "val", "test", "--ignore", convention, "--json", tmp_path / "a.json")
    found, usual = numbers(tmp_path / "a.json"), everything.result
    assert list(found) == ["val", "test"]
    for split in found:
        rows = [p for p in everything.rows if p["set"] == f"reasonseg {split}"]
        three = [found[split][name] for name in ("giou", "ciou", "box_iou")]
        assert three == pytest.approx(expected(everything, rows, ignored), abs=1e-3)
        assert found[split]["giou"] != usual[f"reasonseg {split}"]["giou"]


def test_published_numbers_stand_beside_whole_splits_alone(everything, checkpoint, tmp_path):
    text = (everything.root / "a.md").read_text()
    assert text in everything.printed and "subset" not in text
    assert "Table 1" in text and "Table 2 and GroundingSuite" in text and "LENS-3B (paper)" in text
    assert all(f"| {name} " in text for name in everything.result)
    call("--data", everything.root, "--checkpoint", checkpoint, "--splits", "all", "--limit", 2,
         "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md")
    found, text = numbers(tmp_path / "a.json"), (tmp_path / "a.md").read_text()
    assert "paper" not in text and "Table" not in text and "subset, n = 2 of 6" in text
    groups = [name for name in found if name.startswith("groundingsuite eval:")]
    # of a class's rows too
    assert groups and all("(subset, n = 2 of 6)" in found[name]["subset"] for name in groups)
    assert all("subset" in result for result in found.values())
    assert text.count("(subset, n = 2 of ") == len(found)


# --- Tables ---------------------------------------------------------------------------------------


def fake(giou, ciou, title, **more):
    rows = dict(giou=giou, ciou=ciou, box_iou=0.5, acc50=0.25, format=1.0, n=7, title=title)
    return {**rows, **{f"{name}_95": [rows[name] - 0.1, rows[name] + 0.05]
                       for name in ("giou", "ciou", "box_iou")}, **more}


RES = ["refcoco val", "refcoco testA", "refcoco testB", "refcoco+ val", "refcoco+ testA",
       "refcoco+ testB", "refcocog val", "refcocog test"]


def test_table_1_by_hand():
    """cIoU 0.70, 0.71 ... 0.77 in the paper's columns: 73.5 on average. A missing or limited one:
    "-", no average."""
    results = {name: fake(0.1, 0.7 + i / 100, name) for i, name in enumerate(RES)}
    first, (title, header, rows) = evaluate.tables({name: results[name] for name in reversed(RES)})
    assert title == "Table 1: cIoU" and header == ["", *RES, "average"]
    assert rows[0] == ["ours", "70.0", "71.0", "72.0", "73.0", "74.0", "75.0", "76.0", "77.0",
                       "73.5"]
    assert rows[1] == ["LENS-3B (paper)", "84.2", "85.3", "81.0", "79.4", "82.8", "74.3", "81.2",
                       "81.0", "81.2"]
    assert [row[0] for row in rows] == ["ours", "LENS-3B (paper)", "LENS-2B (paper)", "GLaMM",
                                        "LISA", "Seg-Zero-7B"]
    assert rows[-1] == ["Seg-Zero-7B", "-", "80.3", "-", "-", "76.2", "-", "72.6", "-", "-"]
    for row in rows[1:-1]:  # the published averages are those of the columns
        assert float(row[9]) == pytest.approx(np.mean([float(cell) for cell in row[1:9]]),
                                              abs=0.051)
    assert first[2][0] == ["refcocog test", "10.0 [0.0, 15.0]", "77.0 [67.0, 82.0]",
                           "50.0 [40.0, 55.0]", "25.0", "100.0",
                           "7"]
    results["refcoco testB"]["subset"] = " (subset, n = 7 of 9)"
    del results["refcocog val"]
    first, (_, _, rows) = evaluate.tables(results)
    assert rows[0] == ["ours", "70.0", "71.0", "-", "73.0", "74.0", "75.0", "-", "77.0", "-"]
    assert first[2][2][-1] == "7 (subset, n = 7 of 9)"
    assert len(evaluate.tables({"refcoco testB": results["refcoco testB"]})) == 1


def test_table_2_by_hand():
    """Names are those of the rows' titles: one dataset's split goes by its bare name."""
    results = {"val": fake(0.6, 0.65, "reasonseg val"),
               "eval": fake(0.61, 0.62, "groundingsuite eval"),
               "eval: stuff": {**fake(0.3, 0.4, ""), "title": None}}
    _, (title, header, rows) = evaluate.tables(results)
    assert title.startswith("Table 2") and header == ["", "reasonseg val", "groundingsuite eval"]
    assert rows == [["ours", "60.0 / 65.0", "61.0 / 62.0"],
                    ["LENS-3B (paper)", "62.1 / 64.9", "67.0 / 78.3"]]
    results["val"]["subset"] = " (subset, n = 1 of 2)"
    assert evaluate.tables(results)[1][1] == ["", "groundingsuite eval"]


def test_quartile_table_and_markdown():
    quarter = {"n": 3, "box_iou": [0.25, 0.5], "context": 0.125, "box_prompt": 0.75}
    text = evaluate.as_text({"shapes val": fake(0.6, 0.65, "shapes val",
                                              quartiles=[quarter, quarter])})
    results, quartiles = text.split("\n\n**Mask gIoU")
    assert results.splitlines()[2:] == [
        "| split      | gIoU              | cIoU              | box IoU           | Acc@0.5 | format | n |",
        "| ---------- | ----------------- | ----------------- | ----------------- | ------- | ------ | - |",
        "| shapes val | 60.0 [50.0, 65.0] | 65.0 [55.0, 70.0] | 50.0 [40.0, 55.0] | 25.0    | 100.0  | 7 |"]
    assert quartiles.splitlines()[-1] == "| shapes val | 2        | 0.25 - 0.50 | 12.5    | 75.0 | 3 |"
    assert "paper" not in text


# --- The gallery ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements in order: [tag, attributes, the text in it alone]."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_data(self, text):
        if self.found:
            self.found[-1][2] += text

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def check_page(text):
    """The page's own elements and no others, its own script, nothing that is fetched or runs."""
    page, own = Page(text), Page(gallery.PAGE % ("", ""))
    assert [text for _, text in page.all("script")] == [text for _, text in own.all("script")]
    of_figures = {"figure", "div", "img", "b", "br", "small", "pre"}
    assert {tag for tag, _, _ in page.found} == {tag for tag, _, _ in own.found} | of_figures
    attributes = {name for _, found, _ in page.found for name in found}
    assert attributes == {"lang", "charset", "id", "value", "src", "alt", "data-kind", "data-iou",
                          "data-box", "data-text"}
    assert all(found["src"].startswith("data:image/jpeg;base64,") for found, _ in page.all("img"))
    return page


def pictures(page):
    codes = [found["src"].partition(",")[2] for found, _ in page.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(code))) for code in codes]


def test_a_gallery_escapes_what_it_shows(tmp_path):
    """A script tag, quotes and ends of elements in every text; the pictures are inside the page,
    box and masks on them."""
    mask, truth = np.zeros((64, 96), bool), np.zeros((64, 96), bool)
    mask[8:24, 8:40] = truth[32:56, 48:88] = True  # shown at five times the size
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    r = {"set": EVIL, "key": EVIL, "text": EVIL, "answer": EVIL + "\n%s", "box": None,
         "true_box": [48, 32, 88, 56],
         "box_iou": 0.25, "intersection": 10, "union": 40, "mask": rle}
    item = {"image": Image.new("RGB", (96, 64), (100, 100, 100)), "mask": truth}
    none = {**r, "intersection": 0, "union": 0, "text": "plain", "box": [8, 8, 40, 24]}
    gallery.write_gallery(tmp_path / "g.html", [("worst", r, item), ("best", none, item)], EVIL)
    text = (tmp_path / "g.html").read_text()
    page = check_page(text)
    assert text.count("<script") == 1 and "<script>alert" not in text
    assert [found for found, _ in page.all("figure")] == [
        {"data-kind": "worst", "data-iou": "0.2500", "data-box": "0.2500", "data-text": EVIL},
        {"data-kind": "best", "data-iou": "1.0000", "data-box": "0.2500", "data-text": "plain"}]
    assert [text for _, text in page.all("b")] == [EVIL, "plain"] and page.all("h1")[0][1] == EVIL
    assert [text.rstrip("\n") for _, text in page.all("pre")] == [EVIL + "\n%s"] * 2
    assert page.all("small")[0][1] == f"({EVIL}, {EVIL})"
    assert page.all("br")[0][1] == "worst: mask IoU 0.250, box IoU 0.250 "
    shown = pictures(page)
    assert len(shown) == 6 and {picture.size for picture in shown} == {(480, 320)}
    plain, true, without_box, _, _, drawn = (np.array(picture).astype(int) for picture in shown)
    inside = np.s_[60:100, 60:180], np.s_[180:260, 260:420]  # of the mask, of the truth
    assert (abs(plain - 100) < 4).all()
    assert (abs(true[inside[1]] - [22, 132, 66]) < 12).all()
    assert (abs(true[inside[0]] - 50) < 12).all()
    assert (abs(without_box[inside[0]] - [162, 22, 132]) < 12).all()
    assert (abs(without_box[inside[1]] - 50) < 12).all()
    yellow = lambda picture: (picture[..., :2].min(-1) - picture[..., 2] > 120).nonzero()
    for picture, (x1, y1, x2, y2) in (true, (48, 32, 88, 56)), (drawn, (8, 8, 40, 24)):
        y, x = yellow(picture)
        seen = np.array([x.min(), y.min(), x.max(), y.max()])
        assert abs(seen - np.array([x1, y1, x2, y2]) * 5).max() <= 4
    assert len(yellow(without_box)[0]) == 0


def test_the_gallery_of_a_run(whole, everything, world, tmp_path):
    """Best, worst and random cases, each row once; expressions and answers as predicted, numbers to
    sort by."""
    path = tmp_path / "new/a.html"
    call_gallery(whole.folder / "a.jsonl", path, "--data", world)
    page = check_page(path.read_text())
    assert page.all("h1")[0][1] == f"{whole.folder / 'a.jsonl'}: val"
    figures = [found for found, _ in page.all("figure")]
    kinds = [found["data-kind"] for found in figures]
    assert kinds == ["best"] * 8 + ["worst"] * 8 + ["random"] * (len(kinds) - 16)
    assert 0 < len(kinds) - 16 <= 8
    by_key = {p["key"]: p for p in whole.rows}
    shown = [by_key[text.partition(", ")[2].partition(")")[0]] for _, text in page.all("small")]
    assert len({p["key"] for p in shown}) == len(figures) == min(24, len(whole.rows))
    iou = lambda p: p["intersection"] / p["union"] if p["union"] else 1.0
    for p, found, (_, answer) in zip(shown, figures, page.all("pre")):
        assert found["data-text"] == p["text"] and answer.strip() == p["answer"].strip()
        assert float(found["data-iou"]) == pytest.approx(iou(p), abs=1e-4)
        assert float(found["data-box"]) == pytest.approx(p["box_iou"], abs=1e-4)
    ranked = sorted(map(iou, whole.rows))
    assert [iou(p) for p in shown[:8]] == ranked[:-9:-1]
    assert [iou(p) for p in shown[8:16]] == ranked[:8]
    call_gallery(everything.root / "a.jsonl", path, "--data", everything.root)
    page = check_page(path.read_text())
    texts = [found["data-text"] for found, _ in page.all("figure")]
    assert EVIL in texts and "a box" not in texts  # without a true mask there is no IoU to rank by
    assert {text[1:].partition(",")[0] for _, text in page.all("small")} == set(SETS)


def test_the_gallery_shows_the_true_picture_and_mask(everything, tmp_path, monkeypatch):
    """What is drawn for each row of the file is its own picture, truth and true box."""
    drawn = []
    monkeypatch.setattr(gallery, "draw_figure", lambda *given: drawn.append(given) or "")
    call_gallery(everything.root / "a.jsonl", tmp_path / "a.html", "--data", everything.root)
    by_key = {p["key"]: p for p in everything.rows}
    checked = 0
    for _, p, item in drawn:
        assert p == by_key[p["key"]]
        assert (item["id"], item["text"]) == (p["key"], p["text"])
        assert item["image"].size == tuple(p["mask"]["size"][::-1])
        if p["key"] in everything.truth:
            mask, ignore, _ = everything.truth[p["key"]]
            assert (item["mask"] == mask).all() and list(item["box"]) == p["true_box"]
            checked += 1
    assert checked > 10


def test_a_gallery_of_other_rows_or_other_data_is_refused(whole, everything, world, tmp_path):
    row = whole.rows[0]
    for content, words in (
            ("no json\n", "line 1: not a row as evaluate.py --predictions leaves it"),
            ("[1]\n", "line 1: not a row"),
            (json.dumps(row) + "\n" + json.dumps({"key": "a"}) + "\n", "line 2: not a row"),
            (json.dumps({**row, "text": "another"}), "no row shapes/.*the expression 'another'"),
            (json.dumps({**row, "key": "shapes/99999/0"}), "no row shapes/99999/0"),
            (json.dumps({**row, "key": row["key"][:-1] + "9"}), "no row shapes/.*/9")):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(LensError, match=words):
            call_gallery(tmp_path / "rows.jsonl", tmp_path / "a.html", "--data", world)
    with pytest.raises(LensError, match="none.jsonl: not readable.*evaluate.py --predictions"):
        call_gallery(tmp_path / "none.jsonl", tmp_path / "a.html", "--data", world)
    with pytest.raises(LensError, match="is missing. Download"):
        call_gallery(everything.root / "a.jsonl", tmp_path / "a.html", "--data", world)
    with pytest.raises(LensError, match="Name the folder that was evaluated"):
        call_gallery(whole.folder / "a.jsonl", tmp_path / "a.html", "--data", everything.root)
    assert not (tmp_path / "a.html").exists()


def test_cases_to_show():
    """20 rows of IoU 0, 0.05, ...: the best and the worst three, and three of those between, the
    same ones each time."""
    rows = [record(i, 20, key=f"a/{i}/0") for i in range(20)]
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(20)]
    chosen = gallery.pick_cases([*mixed, record(None, None)], number=3)
    assert [kind for kind, _ in chosen] == ["best"] * 3 + ["worst"] * 3 + ["random"] * 3
    places = [r["intersection"] for _, r in chosen]
    assert places[:6] == [19, 18, 17, 0, 1, 2] and len(set(places)) == 9
    others = gallery.pick_cases(rows, number=3, seed=1)
    assert places[6:] != [r["intersection"] for _, r in others][6:]
    few = lambda n: [(kind, r["intersection"]) for kind, r in gallery.pick_cases(rows[:n])]
    # all of a short list
    assert few(3) == [("best", 2), ("worst", 0), ("random", 1)] and few(1) == [("best", 0)]
    assert few(4) == [("best", 3), ("best", 2), ("worst", 0), ("worst", 1)]
    assert gallery.pick_cases([]) == []


# --- Errors, one picture, curves ------------------------------------------------------------------


def test_what_is_not_there_is_said(world, tmp_path, checkpoint):
    flags = ["--checkpoint", checkpoint, "--data"]
    for wrong, words in (
            ([tmp_path, "--splits", "all"],
             "no dataset with an evaluation split here.*python data.py --check"),
            ([world, "--splits", "test"],
             "split 'test' in shapes. It has train, val, testA, testB"),
            ([world, "--splits", "val", "nothing"], "split 'nothing'"),
            ([world, "--datasets", "refcoco"], "refcoco.*is missing. Download"),
            ([world, "--image", tmp_path / "no.png", "--text", "a"],
             "no.png:.*readable picture"),
            ([world, "--curves", tmp_path], "metrics.jsonl is missing")):
        with pytest.raises(LensError, match=words):
            call(*flags, *wrong)


@pytest.mark.parametrize("flags, words", [
    ([], "--checkpoint is missing"),
    (["--checkpoint", "x", "--eval-batch", 0], "no finished run here"),
    (["--prompt-with", "box", "--eval-batch", 0], "--eval-batch must be at least 1, not 0"),
    (["--prompt-with", "box", "--image", "a.png"], "--image and --text go together"),
    (["--prompt-with", "box", "--text", "a"], "--image and --text go together"),
    (["--prompt-with", "box", "--image", "a.png", "--text", ""], "--text is empty"),
    (["--prompt-with", "box", "--image", "a.png", "--text", " "], "--text is empty"),
    (["--prompt-with", "box", "--text", ""], "--text is empty"),
    (["--prompt-with", "box", "--image", "", "--text", "a"], "--image is empty")])
def test_flags_that_cannot_be(flags, words, capsys):
    with pytest.raises(SystemExit):
        call(*flags)
    printed = capsys.readouterr().err
    assert words in printed and printed.count("error:") == 1 and "Traceback" not in printed


def test_names_of_the_sets(everything, world):
    """Bare where one dataset is named, whatever --splits lists; with its dataset's name
    otherwise."""
    def names(root, datasets, splits):
        shared = SimpleNamespace(data=str(root), datasets=datasets, limit=0)
        found = evaluate.find_splits(shared, SimpleNamespace(splits=splits))
        return [split.name for split in found]

    assert names(world, ["shapes"], ["testA", "val"]) == ["testA", "val"]
    assert names(world, ["shapes"], ["all"]) == ["shapes val", "shapes testA", "shapes testB"]
    assert names(everything.root, ["refcoco", "mine"], ["val"]) == ["refcoco val", "mine val"]
    assert names(everything.root, ["mine"], ["train"]) == ["train"]


def test_one_picture(world, checkpoint, tmp_path, monkeypatch):
    """Not the models' size, nor square; drawn at three times the size. What is printed is what is
    drawn. The context queries' mask is another than the box's; that lies in the box, which SAM was
    given in its own square frame."""
    prompted, make = [], evaluate.SamHead.box_prompts
    monkeypatch.setattr(evaluate.SamHead, "box_prompts",
                        lambda head, boxes: prompted.append(boxes) or make(head, boxes))
    record = data.read_records(world, ["shapes"], ["val"])[0]
    picture, out = tmp_path / "wide.png", tmp_path / "overlay.png"
    Image.open(record["image"]).resize((150, 120)).save(picture)
    before = np.array(Image.open(picture).resize((450, 360))).astype(int)
    drawn = {}
    for way in "context", "box":
        printed = call("--checkpoint", checkpoint, "--image", picture, "--text", record["texts"][0],
                       "--output", out, "--prompt-with", way)
        after = np.array(Image.open(out)).astype(int)
        assert after.shape == (360, 450, 3) and "<answer>" in printed
        assert f"overlay: {out}" in printed
        said = 9 * int(printed.partition("mask: ")[2].partition(" ")[0])
        box = 3 * np.array(json.loads(printed.partition("box: ")[2].partition(";")[0]))
        tinted = (abs(after - (0.45 * before + 0.55 * np.array([255, 0, 200]))) < 2).all(-1)
        line = (after == [255, 230, 0]).all(-1)
        assert said > 0 and said - line.sum() <= tinted.sum() <= said  # the line hides some of it
        y, x = line.nonzero()
        assert abs(np.array([x.min(), y.min(), x.max(), y.max()]) - box).max() <= 3
        in_sam_frame = box / 3 * np.array([SAM_SIDE / 150, SAM_SIDE / 120] * 2)
        assert prompted[-1].tolist() == [pytest.approx(in_sam_frame, abs=0.1)]
        drawn[way] = tinted
        x1, y1, x2, y2 = box.astype(int)
        assert way == "context" or tinted[y1:y2, x1:x2].sum() > 0.9 * tinted.sum()
    both, either = (drawn["context"] & drawn["box"]).sum(), (drawn["context"] | drawn["box"]).sum()
    assert both < 0.9 * either  # two masks, not one mask twice


def test_overlay_tints_the_mask_and_draws_the_box():
    mask = np.zeros((64, 64), bool)
    mask[10:20, 30:40] = True
    overlay = np.array(evaluate.draw_overlay(Image.new("RGB", (64, 64)), mask, (4, 4, 60, 60)))
    assert overlay.shape == (512, 512, 3) and tuple(overlay[120, 280]) == (140, 0, 110)
    assert tuple(overlay[4 * 8, 200]) == (255, 230, 0) and tuple(overlay[300, 300]) == (0, 0, 0)
    # an inverted box is no reason to stop
    evaluate.draw_overlay(Image.new("RGB", (64, 64)), mask, (60, 60, 4, 4))
    started = time.time()
    far = np.array(evaluate.draw_overlay(Image.new("RGB", (64, 64)), mask,
                                         (20.0, -1e300, float("inf"), 1e12)))
    assert time.time() - started < 2 and (far[:, 160] == [255, 230, 0]).all()
    assert (far[:, 200] < 150).all()
    wide = evaluate.draw_overlay(Image.new("RGB", (640, 8)), np.zeros((8, 640), bool), None)
    assert wide.size == (640, 8)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new/folder/a.json"
    evaluate.write_whole(path, "one")
    monkeypatch.setattr(Path, "write_text",
                        lambda self, text: (self.open("w").write("half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        evaluate.write_whole(path, "two")
    assert path.read_text() == "one"


def test_curves(tmp_path):
    """A panel for each column that the run has, with its name; a mean over a twentieth of the steps
    beside."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [{"step": i, "reward": i / 10, "kl": 1.0, "mask_iou": 0.5} for i in range(40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn, make = [], pyplot.subplots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "subplots", lambda *a, **k: drawn.append(make(*a, **k)) or drawn[-1])
        call("--curves", tmp_path, "--output", tmp_path / "curves.png")
    panels = [axis for axis in drawn[0][1].flat if axis.axison]
    assert [axis.get_title() for axis in panels] == ["reward", "kl", "mask iou"]
    every, mean = panels[0].lines
    assert every.get_xydata().tolist() == [[i + 1, i / 10] for i in range(40)]
    means = np.array([[i + 2, (i + 0.5) / 10] for i in range(39)])
    assert mean.get_xydata() == pytest.approx(means)
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
