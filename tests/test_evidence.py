"""The arithmetic of the scripts in tests/evidence, on cases that are worked out here."""
import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import END, SAM_SIDE, call, random_batch, random_sam
from torch.nn.functional import scaled_dot_product_attention

import ablations
import align
import attention
import benchmark
import evaluate
import group_figure
import habit
import misguided
import model
import pages
import proof
import sampled_evaluation
import scale
import tiny_runs
import train_rl
from data import load_item, read_records, select
from rewards import answer_text, box_iou, format_reward

COMPLETION = answer_text((10, 20, 30, 60), "cup", "The cup is left.")


def test_wrong_boxes():
    """Of (10, 20, 30, 60), 20 x 40: moved by half its size in one direction, shrunk to half around
    (20, 40), and replaced."""
    boxes = misguided.wrong_boxes((10, 20, 30, 60), (1, 2, 3, 4), random.Random(0))
    named = dict(zip(misguided.BOXES, boxes, strict=True))
    assert named["own box"] == (10, 20, 30, 60) and named["another object's box"] == (1, 2, 3, 4)
    assert named["shifted by 0.5"] in [(20, 20, 40, 60), (0, 20, 20, 60), (10, 40, 30, 80),
                                       (10, 0, 30, 40)]
    assert named["shrunk to 0.5"] == (15, 30, 25, 50)


def test_another_objects_box_lies_elsewhere():
    """Not the box of the bar that crosses it, nor one that covers most of it (IoU 0.64)."""
    boxes = [(10, 10, 30, 30), (10, 10, 30, 30), (10, 10, 26, 26), (40, 10, 60, 30)]
    things = [{"box": box} for box in boxes]
    assert misguided.boxes_elsewhere(things, (0,)) == [(40, 10, 60, 30)]
    assert misguided.boxes_elsewhere(things, (3,)) == boxes[:3]
    assert misguided.boxes_elsewhere(things[:2], (1,)) == []
    # two things at once have the box (10, 10, 60, 30): each of the others covers 0.4 of it or less
    assert misguided.boxes_elsewhere(things, (0, 3)) == boxes[1:3]


def test_a_changed_box_reaches_sam_in_the_sam_frame(lens):
    """Two images of different shapes, so that every side has a scale of its own."""
    prompted, batch = [], random_batch()
    batch["gt_masks"] = [torch.zeros(50, 100), torch.zeros(80, 40)]
    stock_sam = model.SamHead(random_sam()).eval()
    box_prompts = stock_sam.box_prompts
    stock_sam.box_prompts = lambda boxes: prompted.append(boxes) or box_prompts(boxes)
    completions = [[torch.tensor([5, END])] * 4] * 2
    boxes = [[(10, 10, 60 + i, 40) for i in range(3)], [(4, 8, 20 + i, 72) for i in range(3)]]
    positions = model.prompt_positions(lens.mllm, batch)
    by_queries, by_boxes = misguided.draw_masks(lens, stock_sam, batch, positions, completions,
                                                boxes)
    low = SAM_SIDE // 4
    assert by_queries.shape == (2, 4, low, low) and by_boxes.shape == (2, 3, low, low)
    shares = [[[10 / 100, 10 / 50, (60 + i) / 100, 40 / 50] for i in range(3)],
              [[4 / 40, 8 / 80, (20 + i) / 40, 72 / 80] for i in range(3)]]
    assert torch.allclose(prompted[0] / SAM_SIDE, torch.tensor(shares).flatten(0, 1), atol=1e-6)


def test_only_the_boxs_numbers_are_replaced():
    written = misguided.write_box(COMPLETION, (-5, 20.4, 200, 127.6), (128, 128))
    assert written == COMPLETION.replace("10, 20, 30, 60", "0, 20, 128, 128")
    answer = COMPLETION[COMPLETION.index("<answer>"):]
    assert misguided.without_reasoning(COMPLETION) == answer


def test_the_figure_of_a_group(aligned):
    """Its scores, made again from what is drawn: text, box and mask in the image frame."""
    lens, processor, collate, shared = tiny_runs.open_run(aligned)
    item = load_item(read_records(shared.data, ["shapes"], ["val"])[0], 0)
    completions = group_figure.one_group(lens, processor, collate, item, shared)
    assert len(completions) == group_figure.G
    for text, box, mask, (r_format, r_box, r_mask), _ in completions:
        assert r_format in (0, format_reward(text))
        assert r_box == pytest.approx(box_iou(box, item["gt_box"]), abs=1e-6)
        iou = (mask & item["gt_mask"]).sum() / (mask | item["gt_mask"]).sum()
        assert r_mask == pytest.approx(iou, abs=1e-4)
    best = max(completions, key=lambda completion: sum(completion[3]))
    assert best[4] == max(completion[4] for completion in completions) > 0


def test_the_walk(aligned, tmp_path):
    """On another run: every section is there, the tables agree with each other, links lead to
    lines."""
    call("walk.py", aligned, "--row", 3, "--group-size", 3, "--output", tmp_path, preset="")
    text = (tmp_path / "walk.md").read_text()
    assert re.findall(r"^## (\d+)\.", text, re.M) == [str(n) for n in range(1, 11)]
    assert pages.anchored(text) == text and "#L0" not in text and (tmp_path / "walk.png").exists()
    rewards = re.findall(r"^\| \d \| (?:none|\(.*?\)) \| (.*) \| (.*) \| (.*) \| (.*) \|$", text,
                         re.M)
    assert len(rewards) == 3
    for *parts, reward in rewards:
        assert sum(map(float, parts)) == pytest.approx(float(reward), abs=2e-3)
    by_hand = re.findall(r"\| \((.*) - (.*)\) / \((.*) \+ 0.0001\) \| (\S+) \|", text)
    assert len(by_hand) == 3
    for reward, mean, sigma, advantage in by_hand:
        expected = (float(reward) - float(mean)) / (float(sigma) + 1e-4)
        assert float(advantage) == pytest.approx(expected, abs=0.02)


def test_kinds_of_tokens():
    """Every token is one word or sign. The batch marks image tokens; the rest goes by its place."""
    words = ["<think>", "here", "</think>", "<answer>", '"bbox_2d": ', "[", "10", ", ", "7", "]",
             ', "label"', "</answer>"]
    tokenizer = SimpleNamespace(decode=lambda ids: words[ids[0]])
    kinds = attention.token_kinds(torch.tensor([0, 1, 1, 0]), range(len(words)), tokenizer, 2)
    assert kinds.tolist() == [1, 0, 0, 1] + [2, 2, 3] + [3, 3, 3, 4, 3, 4, 3, 3, 3] + [5, 5]


def test_the_benchmarks_three_ways_are_one():
    """Its straightforward steps are an oracle: another way of attention and of log-probs."""
    differences = benchmark.largest_differences(benchmark.build_world(256, [5, 9]))
    assert set(differences) == {"log_probs", "mask_logits", "gradients"}
    assert 0 < max(differences.values()) < 1e-3


def test_the_benchmark_counts_a_known_product():
    """(3, 4) @ (4, 5) is 2 * 3 * 4 * 5 operations; a causal attention half of the full one."""
    totals = []
    for work in (lambda: torch.randn(3, 4) @ torch.randn(4, 5),
                 lambda: scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 4)),
                 lambda: scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 4), is_causal=True)):
        with benchmark.Arithmetic() as counter:
            work()
        totals.append(counter.total)
    assert totals == [120, 2 * 2 * 2 * 8 * 8 * 4, 2 * 2 * 8 * 8 * 4]


def test_differences_between_runs():
    rows = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])
    expected = {"rows": rows, "weights": {"a": torch.tensor([4.0, -8.0]), "b": torch.tensor([1.0])}}
    result = {"rows": rows + torch.tensor([[0.0, 0.5, 0.0], [0.75, 0.0, -2.0]]),
              "weights": {"a": torch.tensor([4.0, -6.0]), "b": torch.tensor([1.125])}}
    assert scale.compare(result, expected) == {"loss": 0.75, "parts": 0.5, "gradient norm": 2.0,
                                               "weights": 0.25}


def test_the_ablations_page():
    """Mean and range over seeds, in per cent; rows without a line are left out."""
    line = {"table": "table4", "row": "ViT", "steps": {"align.py": 125},
            "tail": {"mask_iou": 0.5}, "greedy": {"ciou": 0.5, "giou": 0.6},
            "sampled": {"ciou": 0.4, "giou": 0.3}, "forced": {"giou": 0.8}}
    text = ablations.page([line, {**line, "greedy": {"ciou": 0.7, "giou": 0.6}}])
    assert "| ViT | 87.8 | 80.0 (80.0-80.0) | 60.0 (50.0-70.0) | 60.0 (60.0-60.0) |" in text
    assert "| MLP |" not in text and "Table 3" not in text and "2 of 3" in text
    assert ablations.cell("completion_length", [38.0, 41.0]) == "39.5 (38.0-41.0)"
    assert ablations.cell("turn", [20, 31]) == "26 (20-31)" and ablations.cell("turn", [None]) == \
        "never" and ablations.cell("turn", [20, None]) == "20/never"
    # ten steps of 20 + 2 n tokens, n = 0 ... 9, have 29 in the mean; the step before, less
    lengths = [{"completion_length": tokens} for tokens in (20, *range(20, 40, 2))]
    assert ablations.turning_step(lengths) == 2 and ablations.turning_step(lengths[:-1]) is None
    scores = {"val: apart": {"giou": 1.0, "n": 70}, "val: crosses": {"giou": 0.5, "n": 10},
              "val: hides": {"giou": 0.7, "n": 5}, "val: nests": {"giou": 0.3, "n": 5}}
    expected = (0.5 * 10 + 0.7 * 5 + 0.3 * 5) / 20
    assert ablations.shared_giou(scores) == pytest.approx(expected)


@pytest.mark.parametrize("table", ablations.TABLES)
def test_ablations_name_flags_that_exist(table, monkeypatch):
    def parse(script, settings, flags):
        monkeypatch.setattr(sys, "argv", ["x", "--preset", "tiny", *flags.split()])
        align.parse_settings([align.SharedArgs, settings], script.PRESETS, "x")
    for row in ablations.TABLES[table][2]:
        parse(align, align.TrainArgs, row.align or "")
        parse(train_rl, train_rl.RLArgs, f"{row.rl or ''} --init none")
        parse(evaluate, evaluate.EvaluateArgs, row.evaluate or ablations.BOX)


def test_the_share_that_looks():
    """Two groups of two sampled completions, of which one looks; then two greedy ones."""
    looks = {"sampled": [], "greedy": []}
    text_rewards = habit.count_looks(lambda texts, *rest: rest, looks)
    look, glance = "<think>\nThe circles are", "<think>\nIt is"
    assert text_rewards([[look, glance], [glance, "The"]], 1, 2) == (1, 2)
    text_rewards([[look], [glance]])
    assert looks == {"sampled": [True, False, False, False], "greedy": [True, False]}
    assert habit.shares(looks["sampled"], 2) == [0.5, 0.0]


def test_sampled_completions(lens):
    """A row's completion depends on the seed and the row, not on how rows are batched."""
    batch = random_batch()
    positions = model.prompt_positions(lens.mllm, batch)

    def sample(seed, *batches):
        generate = sampled_evaluation.sampling_generate(seed)
        completions = [generate(lens.mllm, select(batch, rows), [positions[b] for b in rows], 1, 6,
                                lens.eos, lens.forbidden).completions for rows in batches]
        return [ids.tolist() for groups in completions for (ids,) in groups]
    assert sample(0, [0, 0, 1]) == sample(0, [0], [0], [1]) != sample(1, [0, 0, 1])
    assert sample(0, [0, 0])[0] != sample(0, [0, 0])[1]


def proof_row(row_id, completion, box_iou, counts, box_counts, *groups):
    names = ("intersection", "union")
    return json.dumps({"id": row_id, "completion": completion, "format": 1.0, "box_iou": box_iou,
                       "groups": groups, **dict(zip(names, counts)),
                       "box_prompt": dict(zip(names, box_counts))})


def test_the_proofs_numbers(tmp_path, monkeypatch):
    """Two objects with two and one expressions, one seed. Stage 2 - stage 1 in mask IoU: the rows
    gain 0.5, 0.25 and 0. Drawn by object, the mean is that of 0.5 and 0.25, of 0, or of all."""
    monkeypatch.setattr(proof, "RUNS", tmp_path)
    look, glance = "<think>\nThe circles", "<think>\nIt is"
    unchanged = proof_row("a/2/0", glance, 0.2, [0, 0], [1, 1], "size", "apart")
    better = [proof_row("a/1/0", look, 0.8, [3, 4], [1, 4], "chain", "crosses"),
              proof_row("a/1/1", look, 0.6, [1, 2], [1, 2], "size", "crosses"), unchanged]
    worse = [proof_row("a/1/0", glance, 0.4, [1, 4], [1, 2], "chain", "crosses"),
             proof_row("a/1/1", glance, 0.6, [1, 4], [1, 4], "size", "crosses"), unchanged]
    for variant in proof.VARIANTS:
        rows = better if variant == "rl" else worse
        (tmp_path / f"{variant}-1.jsonl").write_text("\n".join(rows) + "\n")
    result = proof.summarize(proof.VARIANTS, [1], 3)
    means, gains = result["means"], result["gains"]
    for column, mean in {"looks": 2 / 3, "acc50": 2 / 3, "giou": (0.75 + 0.5 + 1) / 3}.items():
        assert means["rl-1"][column] == pytest.approx(mean, abs=1e-3)
    # "trained without queries" draws with its boxes: 1/2, 1/4, 1; stage 2 with queries: 3/4, 1/2, 1
    assert means["box_only-1"]["giou"] == pytest.approx(1.75 / 3, abs=1e-3)
    expected = {"stage 2 - stage 1, mask IoU": (0.25, 0.0, 0.375),
                "stage 2 - stage 2 without rewards, mask IoU, chains of two": (0.5,),
                "stage 2 - its box into SAM, mask IoU, crosses": (0.25,),
                "stage 2 - trained without queries, mask IoU": (0.5 / 3,),
                "stage 2 - trained without queries, mask IoU, apart": (0.0,),
                "stage 2 - trained without queries, mask IoU, crosses": (0.25,)}
    for title, numbers in expected.items():
        assert gains[title]["1"][:len(numbers)] == pytest.approx(numbers, abs=1e-3), title
    crosses = result["groups"]["crosses"]
    assert crosses["n"] == 2 and crosses["rl"]["acc50"] == 1.0
    assert "| stage 2 | 0.667 | 0.533 | 0.667 | 0.750 |" in proof.short_table(result)
    assert "| chain | 1 |" in proof.page(result)
