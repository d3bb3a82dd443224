"""Metrics against an independent computation, evaluation on one process and several, one picture, curves."""
import json
import sys

import numpy as np
import pytest
from conftest import ROOT, run, script
from PIL import Image
from pycocotools import mask as coco_mask

import evaluate


def record(intersection, union, box=0.0, form=1.0):
    return {"intersection": intersection, "union": union, "box_iou": box, "format": form}


def test_summary_by_hand():
    """I/U: 30/60, 0/40, 0/0 and 10/10. gIoU: (1/2 + 0 + 1 + 1) / 4 = 0.625; cIoU: 40 / 110."""
    found = evaluate.summarize([record(30, 60, 0.5), record(0, 40, 0.51, 0.0), record(0, 0, 0.9), record(10, 10)])
    assert found["giou"] == pytest.approx(0.625, abs=1e-6) and found["ciou"] == pytest.approx(40 / 110)
    assert found["box_iou"] == pytest.approx(1.91 / 4) and found["acc50"] == 0.5                 # 0.5 itself is not above 0.5
    assert found["format"] == 0.75 and found["n"] == 4


@pytest.fixture(scope="module")
def evaluated(world, aligned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    flags = ["--data", world, "--checkpoint", aligned]
    done = script("evaluate.py", *flags, "--json", folder / "one.json", "--predictions", folder / "one.jsonl", "--eval-batch", 5)
    script("evaluate.py", *flags, "--json", folder / "two.json", "--predictions", folder / "two.jsonl", processes=2)
    script("evaluate.py", *flags, "--limit", 7, "--sample", "--json", folder / "few.json")
    return folder, done.stdout


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_equal_an_independent_computation(evaluated, world):
    """Masks from the predictions file, truth from the annotation file, IoUs by pycocotools."""
    folder, _ = evaluated
    predictions = lines(folder / "one.jsonl")
    truth = {a["id"]: a for a in json.loads((world / "refer_seg/shapes/instances.json").read_text())["annotations"]}
    masks = [coco_mask.decode(p["mask"]).astype(bool) for p in predictions]
    true = [coco_mask.decode(truth[int(p["key"].split("/")[1])]["segmentation"]).astype(bool) for p in predictions]
    I, U = [(a & b).sum() for a, b in zip(masks, true)], [(a | b).sum() for a, b in zip(masks, true)]
    result = json.loads((folder / "one.json").read_text())["val"]
    assert set(result) == {"giou", "ciou", "box_iou", "acc50", "format", "n"} and result["n"] == len(predictions) > 12
    assert result["giou"] == pytest.approx(np.mean([i / (u + 1e-5) for i, u in zip(I, U)]), abs=1e-6)
    assert result["ciou"] == pytest.approx(sum(I) / sum(U), abs=1e-6)
    boxes = []
    for p in predictions:
        x, y, w, h = truth[int(p["key"].split("/")[1])]["bbox"]
        b = p["box"]
        ours = [[b[0], b[1], b[2] - b[0], b[3] - b[1]]] if b and b[2] > b[0] and b[3] > b[1] else [[0, 0, 0, 0]]
        boxes.append(coco_mask.iou(ours, [[x, y, w, h]], [0])[0, 0])
    assert result["box_iou"] == pytest.approx(np.mean(boxes), abs=1e-6)


def test_processes_and_batch_sizes_do_not_change_the_numbers(evaluated):
    """21 or so rows, batches of 5 against 50, one process against two: no row counted twice, the same answers."""
    folder, _ = evaluated
    one, two = lines(folder / "one.jsonl"), lines(folder / "two.jsonl")
    assert [r["place"] for r in two] == list(range(len(one)))
    assert [(r["key"], r["text"], r["answer"]) for r in one] == [(r["key"], r["text"], r["answer"]) for r in two]
    a, b = (json.loads((folder / f"{name}.json").read_text())["val"] for name in ("one", "two"))
    assert all(abs(a[k] - b[k]) < 1e-3 for k in a)


def test_a_limited_run_says_so(evaluated, world, aligned):
    folder, printed = evaluated
    assert "subset" not in printed and json.loads((folder / "few.json").read_text())["val"]["n"] == 7
    done = script("evaluate.py", "--data", world, "--checkpoint", aligned, "--limit", 3, "--prompt-with", "box")
    assert "subset, n = 3 of" in done.stdout


def test_one_picture(world, aligned, tmp_path):
    """No preset: the run's folder knows its models. The picture is not the models' size."""
    picture = tmp_path / "wide.png"
    Image.open(ROOT / "docs/shapes.png").resize((300, 200)).save(picture)
    done = run(sys.executable, "evaluate.py", "--checkpoint", aligned, "--image", picture, "--text", "the largest red circle", "--output",
               tmp_path / "overlay.png")
    overlay = np.array(Image.open(tmp_path / "overlay.png"))
    assert overlay.shape == (200, 300, 3) and "box:" in done.stdout and "mask:" in done.stdout


def test_overlay_tints_the_mask_and_draws_the_box():
    mask = np.zeros((64, 64), bool)
    mask[10:20, 30:40] = True
    overlay = np.array(evaluate.draw_overlay(Image.new("RGB", (64, 64)), mask, (4, 4, 60, 60)))
    assert overlay.shape == (512, 512, 3) and tuple(overlay[120, 280]) == (140, 0, 110) and tuple(overlay[4 * 8, 200]) == (255, 230, 0)
    assert tuple(overlay[300, 300]) == (0, 0, 0)
    evaluate.draw_overlay(Image.new("RGB", (64, 64)), mask, (60, 60, 4, 4))             # an inverted box is no reason to stop


def test_curves(aligned, tmp_path):
    pytest.importorskip("matplotlib")
    run(sys.executable, "evaluate.py", "--curves", aligned, "--output", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
