"""The arithmetic of the scripts that are run by hand, on cases worked out here."""
import json
import random
import sys

import numpy as np
import pytest
import torch
from conftest import END, ROOT, SAM_SIDE, random_batch, random_sam, run
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoProcessor

import ablate
import align
import attention
import benchmark
import build
import drawn
import evaluate
import habit
import misguided
import model
import picture
import proof
import scale
import train_rl
from align import SharedArgs, parse_settings
from data import load_item, read_records
from rewards import box_iou, format_reward

ANSWER = """<think>
The cup is left.
</think>
<answer>
```json
[
  {"bbox_2d": [10, 20, 30, 60], "label": "cup"}
]
```
</answer>"""


def test_corrupted_boxes():
    """Of (10, 20, 30, 60), 20 x 40: moved by half its size in one direction, shrunk to half around
    (20, 40), and replaced."""
    boxes = misguided.corrupted((10, 20, 30, 60), (1, 2, 3, 4), random.Random(0))
    found = dict(zip(misguided.CORRUPTIONS, boxes))
    assert found["own box"] == (10, 20, 30, 60) and found["another object's box"] == (1, 2, 3, 4)
    assert found["shifted by 0.5"] in [(20, 20, 40, 60), (0, 20, 20, 60), (10, 40, 30, 80),
                                       (10, 0, 30, 40)]
    assert found["shrunk to 0.5"] == (15, 30, 25, 50) and len(found) == len(misguided.CORRUPTIONS)
    directions = {misguided.corrupted((0, 0, 2, 2), None, random.Random(seed))[4]
                  for seed in range(50)}
    assert directions == {(2, 0, 4, 2), (-2, 0, 0, 2), (0, 2, 2, 4), (0, -2, 2, 0)}


def test_another_objects_box_lies_elsewhere():
    """Not the box of the bar that crosses it, nor one that covers most of it (IoU 0.64)."""
    boxes = [(10, 10, 30, 30), (10, 10, 30, 30), (10, 10, 26, 26), (40, 10, 60, 30)]
    things = [{"box": box} for box in boxes]
    assert misguided.elsewhere(things, 0) == [(40, 10, 60, 30)]
    assert misguided.elsewhere(things, 3) == boxes[:3] and misguided.elsewhere(things[:2], 1) == []


def test_a_changed_box_reaches_sam_in_its_own_frame(lens):
    """Two pictures of different shapes, so that every side has a scale of its own."""
    prompted, batch = [], random_batch()
    batch["masks"] = [torch.zeros(50, 100), torch.zeros(80, 40)]
    stock = model.SamHead(random_sam()).eval()
    make = stock.box_prompts
    stock.box_prompts = lambda boxes: prompted.append(boxes) or make(boxes)
    n = len(misguided.CORRUPTIONS)
    groups = [[torch.tensor([5, END])] * (n + 1)] * 2
    boxes = [[(10, 10, 60 + i, 40) for i in range(n)], [(4, 8, 20 + i, 72) for i in range(n)]]
    positions = model.prompt_positions(lens.mllm, batch)
    read, drawn = misguided.draw_masks(lens, stock, batch, positions, groups, boxes)
    low = SAM_SIDE // 4
    assert read.shape == (2, n + 1, low, low) and drawn.shape == (2, n, low, low)
    shares = [[[10 / 100, 10 / 50, (60 + i) / 100, 40 / 50] for i in range(n)],
              [[4 / 40, 8 / 80, (20 + i) / 40, 72 / 80] for i in range(n)]]
    assert torch.allclose(prompted[0] / SAM_SIDE, torch.tensor(shares).flatten(0, 1), atol=1e-6)


def test_only_the_boxs_numbers_are_replaced():
    written = misguided.write_box(ANSWER, (-5, 20.4, 200, 127.6), (128, 128))
    assert written == ANSWER.replace("10, 20, 30, 60", "0, 20, 128, 128")
    assert misguided.without_reasoning(ANSWER) == ANSWER[ANSWER.index("<answer>"):]


def test_the_pictures_group(aligned):
    """Its scores, made again from what is drawn: text, box and mask in the picture's own frame."""
    lens, processor, collate, shared = picture.open_run(aligned)
    item = load_item(read_records(shared.data, ["shapes"], ["val"])[0], 0)
    answers = picture.one_group(lens, processor, collate, item, shared)
    assert len(answers) == picture.G
    for text, box, mask, (r_format, r_box, r_mask), _ in answers:
        assert r_format in (0, format_reward(text))
        assert r_box == pytest.approx(box_iou(box, item["box"]), abs=1e-6)
        iou = (mask & item["mask"]).sum() / (mask | item["mask"]).sum()
        assert r_mask == pytest.approx(iou, abs=1e-4)
    totals = torch.tensor([sum(answer[3]) for answer in answers])
    advantages = torch.tensor([answer[4] for answer in answers])
    expected = (totals - totals.mean()) / totals.std(correction=0)
    assert torch.allclose(advantages, expected, atol=1e-2)
    assert advantages.std() > 0.5


def test_kinds_of_tokens():
    """Every token one word or sign; picture tokens are marked by the batch, the rest by where it
    stands."""
    words = ["<think>", "here", "</think>", "<answer>", '"bbox_2d": ', "[", "10", ", ", "7", "]",
             ', "label"', "</answer>"]

    class Tokenizer:
        def decode(self, ids):
            return words[ids[0]]

    batch = {"types": [torch.tensor([0, 1, 1, 0])]}
    found = attention.kinds_of(batch, 0, range(len(words)), Tokenizer(), 2).tolist()
    assert found == [1, 0, 0, 1] + [2, 2, 3] + [3, 3, 3, 4, 3, 4, 3, 3, 3] + [5, 5]


def test_the_benchmarks_three_ways_are_one():
    """Its straightforward steps are an oracle of their own: another way of packing, of attention,
    of log-probs."""
    found = benchmark.check(benchmark.build_world(256, [5, 9]))
    assert set(found) == {"log_probs", "mask_logits", "gradients"}
    assert 0 < max(found.values()) < 1e-3


def test_the_benchmark_counts_a_known_product():
    """(3, 4) @ (4, 5) is 2 * 3 * 4 * 5 operations; a causal attention half of the full one."""
    with benchmark.Arithmetic() as count:
        torch.randn(3, 4) @ torch.randn(4, 5)
    assert count.total == 120
    totals = []
    for causal in (False, True):
        with benchmark.Arithmetic() as count:
            query, key, value = torch.randn(3, 1, 2, 8, 4)
            scaled_dot_product_attention(query, key, value, is_causal=causal)
        totals.append(count.total)
    assert totals == [2 * 2 * 2 * 8 * 8 * 4, 2 * 2 * 8 * 8 * 4]


def test_differences_between_runs():
    rows = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])
    expected = {"rows": rows, "weights": {"a": torch.tensor([4.0, -8.0]), "b": torch.tensor([1.0])}}
    found = {"rows": rows + torch.tensor([[0.0, 0.5, 0.0], [0.75, 0.0, -2.0]]),
             "weights": {"a": torch.tensor([4.0, -6.0]), "b": torch.tensor([1.125])}}
    assert scale.compare(found, expected) == {"loss": 0.75, "parts": 0.5, "gradient norm": 2.0,
                                              "weights": 0.25}


def test_ablation_table():
    """Mean and range over seeds, in per cent; rows without a result are left out."""
    line = {"table": "table4", "row": "ViT", "steps": {"align.py": 125},
            "tail": {"mask_iou": 0.5}, "greedy": {"ciou": 0.5, "giou": 0.6},
            "sampled": {"ciou": 0.4, "giou": 0.3}}
    other = {**line, "greedy": {"ciou": 0.7, "giou": 0.6}}
    made = ablate.markdown([line, other])
    row = "| ViT | 87.8 | 60.0 (50.0-70.0) | 60.0 (60.0-60.0) | 30.0 (30.0-30.0) |"
    assert row in made
    assert "| MLP |" not in made and "Table 3" not in made and "2 of 3" in made
    assert ablate.cell("completion_length", [38.0, 41.0]) == "39.5 (38.0-41.0)"
    scores = {"val: apart": {"giou": 1.0, "n": 70}, "val: crosses": {"giou": 0.5, "n": 10},
              "val: hides": {"giou": 0.7, "n": 5}, "val: nests": {"giou": 0.3, "n": 5}}
    assert ablate.shared_giou(scores) == pytest.approx((0.5 * 10 + 0.7 * 5 + 0.3 * 5) / 20)


@pytest.mark.parametrize("table", ablate.TABLES)
def test_ablations_name_flags_that_exist(table, monkeypatch):
    """Each row's flags are understood by the scripts they go to."""
    def parse(script, own, flags):
        monkeypatch.setattr(sys, "argv", ["x", "--preset", "tiny", *flags.split()])
        parse_settings([SharedArgs, own], script.PRESETS, "x")

    for row in ablate.TABLES[table][2]:
        parse(align, align.AlignArgs, row.align or "")
        parse(train_rl, train_rl.RLArgs, f"{row.rl or ''} --init none")
        parse(evaluate, evaluate.EvaluateArgs, row.evaluate or "--prompt-with box")


def test_the_stand_ins_can_be_built_again(tmp_path):
    """Three steps of each, to the end: both are saved, loaded again and answer as before."""
    committed = ROOT / "tests/tiny/mllm/model.safetensors"
    before = committed.stat().st_mtime_ns
    done = run(sys.executable, "tests/tiny/build.py", "all", "--output", tmp_path, "--scenes", 40,
               "--held-out", 20, "--steps", 3, "--batch", 4, "--see-first", 1, "--read-until", 2)
    assert "mllm: reloaded, the same answer" in done.stdout
    assert "sam: reloaded, the same masks" in done.stdout
    assert committed.stat().st_mtime_ns == before
    mllm, processor = model.load_mllm(str(tmp_path / "mllm"), torch.float32)
    tokenizer = AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm").tokenizer
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert mllm.config.model_type == "qwen2_5_vl"
    assert model.load_sam(str(tmp_path / "sam")).image_size == build.SIDE


def test_the_share_that_looks():
    answers = [["<think>\nThe circles are at", "<think>\nIt is the"], ["<think>\nIt", "The"]]
    assert habit.share_of_looks(answers) == 0.25
    assert habit.mean_share([(0.5, 2), (1.0, 6)]) == 0.875 and habit.mean_share([]) is None


def test_the_drawn_pictures(tmp_path):
    """Each has its question's answer under the mask, in one colour, and its box around it."""
    drawn.write_pictures(tmp_path)
    records = read_records(tmp_path, ["drawn"], ["val"])
    assert len(records) == 10
    for record, (size, ground, text, answer, things) in zip(records, drawn.PICTURES):
        item = load_item(record, 0)
        pixels = np.asarray(item["image"])[item["mask"]]
        assert item["text"] == text and item["image"].size == size
        assert (pixels == things[answer][1]).all() and things[answer][1] != ground
        rows, columns = np.where(item["mask"])
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert tuple(item["box"]) == box


def proof_row(key, answer, box, context, box_prompt, kind, layout):
    return json.dumps({"key": key, "answer": answer, "format": 1.0, "box_iou": box, "kind": kind,
                       "layout": layout,
                       "counts": {"context": context, "box_prompt": box_prompt}})


def test_the_proofs_numbers(tmp_path, monkeypatch):
    """Two objects with two and one expressions, one seed. (c) - (b) in mask IoU: the rows gain 0.5,
    0.25 and 0; drawn anew by object, the mean is that of 0.5 and 0.25, of 0, or of all three."""
    monkeypatch.setattr(proof, "RUNS", tmp_path)
    look, glance = "<think>\nThe circles", "<think>\nIt is"
    better = [proof_row("a/1/0", look, 0.8, [3, 4], [1, 4], "chain", "crosses"),
              proof_row("a/1/1", look, 0.6, [1, 2], [1, 2], "size", "crosses"),
              proof_row("a/2/0", glance, 0.2, [0, 0], [1, 1], "size", "apart")]
    worse = [proof_row("a/1/0", glance, 0.4, [1, 4], [1, 2], "chain", "crosses"),
             proof_row("a/1/1", glance, 0.6, [1, 4], [1, 4], "size", "crosses"),
             proof_row("a/2/0", glance, 0.2, [0, 0], [1, 1], "size", "apart")]
    for name in proof.NAMES:
        for mode in proof.MODES:
            rows = better if name == "rl" else worse
            (tmp_path / f"{name}-1.{mode}.jsonl").write_text("\n".join(rows) + "\n")
    found = proof.summarize([1], list(proof.NAMES), 3)
    means = found["means"]["rl-1 greedy"]
    assert means["looks"] == pytest.approx(2 / 3, abs=1e-3)
    assert means["acc50"] == pytest.approx(2 / 3, abs=1e-3)
    assert means["giou"] == pytest.approx((0.75 + 0.5 + 1) / 3, abs=1e-3)
    mean, low, high = found["gains"]["(c) - (b), mask IoU"]["1"]
    assert (mean, low, high) == pytest.approx((0.25, 0.0, 0.375), abs=1e-3)
    chains = found["gains"]["(c) - (e), mask IoU, chains of two"]["1"]
    assert chains[0] == pytest.approx(0.5, abs=1e-3)
    shared = "(c) - its box into SAM, mask IoU, things that share a place"
    assert found["gains"][shared]["1"][0] == pytest.approx(0.25, abs=1e-3)
    # (f) draws with its boxes: 1/2, 1/4, 1; (c) with its queries: 3/4, 1/2, 1
    assert found["means"]["box_only-1 greedy"]["giou"] == pytest.approx(1.75 / 3, abs=1e-3)
    assert found["gains"]["(c) - (f), mask IoU"]["1"][0] == pytest.approx(0.5 / 3, abs=1e-3)
    shared = "(c) - (f), mask IoU, things that share a place"
    assert found["gains"][shared]["1"][0] == pytest.approx(0.25, abs=1e-3)
    assert found["parts"]["crosses"]["n"] == 2 and found["parts"]["crosses"]["rl"]["acc50"] == 1.0
    assert "| (c) after stage 2 | 0.667 | 0.533 | 0.667 | 0.750 |" in proof.summary(found)
    assert "| chain | 1 |" in proof.table(found)
