"""The arithmetic of the scripts that are run by hand, on cases worked out here."""
import random

import pytest
import torch

import ablate
import attention
import benchmark
import misguided
import picture
import scale
from data import load_item, read_records
from rewards import box_iou, format_reward

ANSWER = '<think>\nThe cup is left.\n</think>\n<answer>\n```json\n[\n  {"bbox_2d": [10, 20, 30, 60], "label": "cup"}\n]\n```\n</answer>'


def test_corrupted_boxes():
    """Of (10, 20, 30, 60), 20 x 40: moved by half its size in one direction, shrunk to half around (20, 40), and replaced."""
    found = dict(zip(misguided.CORRUPTIONS, misguided.corrupted((10, 20, 30, 60), (1, 2, 3, 4), random.Random(0))))
    assert found["own box"] == (10, 20, 30, 60) and found["another object's box"] == (1, 2, 3, 4)
    assert found["shifted by 0.5"] in [(20, 20, 40, 60), (0, 20, 20, 60), (10, 40, 30, 80), (10, 0, 30, 40)]
    assert found["shrunk to 0.5"] == (15, 30, 25, 50) and len(found) == len(misguided.CORRUPTIONS)
    directions = {misguided.corrupted((0, 0, 2, 2), None, random.Random(seed))[4] for seed in range(50)}
    assert directions == {(2, 0, 4, 2), (-2, 0, 0, 2), (0, 2, 2, 4), (0, -2, 2, 0)}


def test_only_the_boxs_numbers_are_replaced():
    assert misguided.write_box(ANSWER, (-5, 20.4, 200, 127.6), (128, 128)) == ANSWER.replace("10, 20, 30, 60", "0, 20, 128, 128")
    assert misguided.without_reasoning(ANSWER) == ANSWER[ANSWER.index("<answer>"):]


def test_the_pictures_group(aligned):
    """Its scores, made again from what is drawn: text, box and mask in the picture's own frame."""
    lens, processor, collate, shared = picture.open_run(aligned)
    item = load_item(read_records(shared.data, ["shapes"], ["val"])[0], 0)
    answers = picture.one_group(lens, processor, collate, item, shared)
    assert len(answers) == picture.G
    for text, box, mask, (r_format, r_box, r_mask), _ in answers:
        assert r_format in (0, format_reward(text)) and r_box == pytest.approx(box_iou(box, item["box"]), abs=1e-6)
        assert r_mask == pytest.approx((mask & item["mask"]).sum() / (mask | item["mask"]).sum(), abs=1e-4)
    totals, advantages = torch.tensor([sum(a[3]) for a in answers]), torch.tensor([a[4] for a in answers])
    assert torch.allclose(advantages, (totals - totals.mean()) / totals.std(correction=0), atol=1e-2)
    assert advantages.std() > 0.5


def test_kinds_of_tokens():
    """Every token one word or sign; picture tokens are marked by the batch, the rest by where it stands."""
    words = ["<think>", "here", "</think>", "<answer>", '"bbox_2d": ', "[", "10", ", ", "7", "]", ', "label"', "</answer>"]
    class Tokenizer:
        def decode(self, ids):
            return words[ids[0]]
    batch = {"types": [torch.tensor([0, 1, 1, 0])]}
    found = attention.kinds_of(batch, 0, range(len(words)), Tokenizer(), 2).tolist()
    assert found == [1, 0, 0, 1] + [2, 2, 3] + [3, 3, 3, 4, 3, 4, 3, 3, 3] + [5, 5]


def test_the_benchmarks_three_ways_are_one():
    """Its straightforward steps are an oracle of their own: another way of packing, of attention, of log-probs."""
    found = benchmark.check(benchmark.build_world(256, [5, 9]))
    assert set(found) == {"log_probs", "mask_logits", "gradients"} and 0 < max(found.values()) < 1e-3


def test_the_benchmark_counts_a_known_product():
    """(3, 4) @ (4, 5) is 2 * 3 * 4 * 5 operations; a causal attention half of the full one."""
    with benchmark.Arithmetic() as count:
        torch.randn(3, 4) @ torch.randn(4, 5)
    assert count.total == 120
    totals = []
    for causal in (False, True):
        with benchmark.Arithmetic() as count:
            torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 8, 4), is_causal=causal)
        totals.append(count.total)
    assert totals == [2 * 2 * 2 * 8 * 8 * 4, 2 * 2 * 8 * 8 * 4]


def test_differences_between_runs():
    rows = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])
    expected = {"rows": rows, "weights": {"a": torch.tensor([4.0, -8.0]), "b": torch.tensor([1.0])}}
    found = {"rows": rows + torch.tensor([[0.0, 0.5, 0.0], [0.75, 0.0, -2.0]]),
             "weights": {"a": torch.tensor([4.0, -6.0]), "b": torch.tensor([1.125])}}
    assert scale.compare(found, expected) == {"loss": 0.75, "parts": 0.5, "gradient norm": 2.0, "weights": 0.25}


def test_ablation_table():
    """Mean and range over seeds, in per cent; rows without a result stay empty."""
    line = {"table": "table4", "row": "ViT, own answer", "steps": {"align.py": 125}, "tail": {"mask_iou": 0.5},
            "greedy": {"ciou": 0.5, "giou": 0.6}, "sampled": {"ciou": 0.4, "giou": 0.3}}
    other = {**line, "greedy": {"ciou": 0.7, "giou": 0.6}}
    made = ablate.markdown([line, other])
    assert "| ViT, own answer | 87.8 | 60.0 (50.0-70.0) | 60.0 (60.0-60.0) | 40.0 (40.0-40.0) |" in made
    assert "| MLP, own answer | 72.8 |  |" in made and "Table 3" not in made and "2 of 3" in made


@pytest.mark.parametrize("table", ablate.TABLES)
def test_ablations_name_flags_that_exist(table):
    """Each row's flags are understood by the scripts they go to."""
    import sys

    import align
    import evaluate
    import train_rl
    from model import SharedArgs, parse_settings
    for row in ablate.TABLES[table][2]:
        for script, classes, flags in ((align, [SharedArgs, align.AlignArgs], row.align),
                                       (train_rl, [SharedArgs, train_rl.RLArgs], row.rl and row.rl + " --init none"),
                                       (evaluate, [SharedArgs, evaluate.EvaluateArgs], row.evaluate + " --checkpoint runs")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["x", "--preset", "tiny", *(flags or "").split()])
                if script is not evaluate or "box" in row.evaluate:
                    patch.setattr("model.read_run", lambda folder: {})
                    parse_settings(classes, script.PRESETS, "x")
