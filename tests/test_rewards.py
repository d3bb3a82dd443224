"""rewards.py: tables of strings, IoUs by hand and against pycocotools, 10,000 strings to break
it."""
import json
import math
import random
import time

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from rewards import (box_iou, find_box, format_reward, mask_counts, mask_iou, parse_box,
                     unified_reward)

BOX = '[{"bbox_2d": [10, 20, 30, 40], "label": "car"}]'
OTHER = '[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]'
THINK = "<think>The car is on the left.</think>"

# The assistant's turn of Fig. 4, its fences as the prompt of the same figure asks for them.
FIGURE_4 = """<think>
The task is to identify the car that may need repair among the vehicles shown in the image. \
The key indicators for this include visible damage or wear, open hoods, or any other signs of \
mechanical issues.

Looking at the image:

- The black car on the left has its hood open, which could indicate it needs repair or maintenance.
- The blue car on the right appears to be in good condition with no visible damage or open hoods.

Based on these observations, the black car on the left is the one that may need repair.
</think>
<answer>
```json
[
{"bbox_2d": [0, 129, 365, 347], "label": "the car that may need repair"}
]
```
</answer>"""


def answer(body):
    return f"{THINK}\n<answer>{body}</answer>"


def boxed(numbers):
    return answer(f'[{{"bbox_2d": {numbers}, "label": "car"}}]')


# --- text -> box, R_format ---

GOOD = [  # what may stand in the answer block, each naming the box 10, 20, 30, 40
    BOX,
    f"\n```json\n{BOX}\n```\n",
    f"```\n{BOX}\n```",
    f"```json{BOX}```",
    '{"bbox_2d": [10, 20, 30, 40]}',
    '```json\n{"label": "car", "bbox_2d": [10, 20, 30, 40]}\n```',
    '[{"bbox_2d" : [10 , 20 , 30 , 40] , "label" : "car"}]',
    '[\r\n\t{"bbox_2d": [10.0,\r\n2e1, 30, 4.0E+1]}\r\n]',
    '[{"label": "a car"}, {"bbox_2d": [10, 20, 30, 40]}]',
    f"[{BOX[1:-1]}, {OTHER[1:-1]}]",
    '[{"bbox_2d": [10, 20, 30, 40], "bbox_2d": [1, 2, 3, 4]}]',
    '[{"bbox_2d": [10, 20, 30, 40], "label": "\\ud800 \\u0000 \ud800 é 車 \U0001f697"}]',
    f'[{{"bbox_2d": [10, 20, 30, 40], "label": {"9" * 5000}}}]',
]
NO_BOX = [  # what may not
    "",
    " \n ",
    "the car",
    "10, 20, 30, 40",
    "[]",
    "{}",
    "null",
    "[10, 20, 30, 40]",
    '{"bbox": [10, 20, 30, 40]}',
    '{"bbox_2d": null}',
    '{"bbox_2d": {"0": 10, "1": 20, "2": 30, "3": 40}}',
    '{"bbox_2d": "10,20"}',
    '{"bbox_2d": "abcd"}',
    '[{"bbox_2d": [10, 20]}, {"bbox_2d": [10, 20, 30, 40]}]',  # the first counts, and is malformed
    f"[{BOX}]",
    BOX[:-1],
    BOX + "]",
    BOX + BOX,
    BOX.replace('"', "'"),
    BOX.replace("}", ",}"),
    f"{BOX} // the car",
    f"The box is {BOX}",
    f"```json\n{BOX}",
    f"```json\n{BOX}\n'''",
    f"'''\n{BOX}\n```",
    f'"json\n{BOX}\n"""',
    f"{BOX}\n```",
    f"```python\n{BOX}\n```",
    f"```json\n```json\n{BOX}\n```\n```",
    "```",
    "``````",
    "```json```",
    BOX + "\0",
    "\ufeff" + BOX,
    '[{"bbox_2d": [10, 20, 30, 40], "label": "line\nbreak"}]',
    '[{"bbox_2d": [10, 20, 30, 40], "score": NaN}]',
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"bbox_2d":' * 50_000 + "1" + "}" * 50_000,
]
BAD_NUMBERS = [  # what may not stand for the box
    "[10, 20, 30]",
    "[10, 20, 30, 40, 50]",
    "[]",
    "[[10, 20, 30, 40]]",
    "[[10, 20], [30, 40]]",
    "[10, 20, 30, [40]]",
    "[10, 20, 30, null]",
    '[10, 20, 30, "40"]',
    "[10, 20, 30, true]",
    "[false, false, true, true]",
    "[10, 20, 30, NaN]",
    "[10, 20, 30, Infinity]",
    "[-Infinity, 20, 30, 40]",
    "[10, 20, 30, 1e999]",
    "[-1e999, 20, 30, 40]",
    "[10, 20, 30, " + "4" * 400 + "]",  # float() of such an integer raises OverflowError
    "[10, 20, 30, " + "4" * 5000 + "]",  # int() of such a string raises ValueError
    "[010, 20, 30, 40]",
    "[+10, 20, 30, 40]",
    "[.5, 20, 30, 40]",
    "[1_0, 20, 30, 40]",
    "[0x10, 20, 30, 40]",
]
ANSWER = f"<answer>{BOX}</answer>"
    # the paper's text, not its Fig. 4
LAYOUT = [  # the whole text, whether its box is found, and R_format
    (FIGURE_4, True, 1.0),
    (THINK + ANSWER, True, 1.0),
    (f" \r\n\t{THINK}\r\n\r\n{ANSWER}\r\n", True, 1.0),
    (f"<think>{BOX} is <b>bold</b>, 1 < 2</think>{ANSWER}", True, 1.0),
    (ANSWER, True, 0.0),
    (f"The car is on the left.</think>{ANSWER}", True, 0.0),
    (f"<think>The car is on the left.{ANSWER}", True, 0.0),
    (f"{THINK}{BOX}</answer>", False, 0.0),
    (f"{THINK}<answer>{BOX}", False, 0.0),
    (f"{THINK}{BOX}", False, 0.0),
    (f"<think>{THINK}</think>{ANSWER}", True, 0.0),
    (THINK + THINK + ANSWER, True, 0.0),
    (THINK + ANSWER + ANSWER, True, 0.0),
    (f"{THINK}<answer>{BOX}</answer></answer>", True, 0.0),
    (f"{THINK}<answer><answer>{BOX}</answer>", False, 0.0),
    (f"{THINK}{ANSWER}<answer>{OTHER}</answer>", True, 0.0),
    (f"{THINK}<answer>a car</answer>{ANSWER}", False, 0.0),  # the first block counts
    (f"<think>{ANSWER}</think>", False, 0.0),
    (f"<think>{ANSWER}</think><answer></answer>", False, 0.0),
    (f"<think><answer>{OTHER}</answer></think>{ANSWER}", True, 0.0),
    (f"<think>a <answer> b</think>{BOX}</answer>", False, 0.0),
    (f"{THINK}<answer>{BOX}</think></answer>", False, 0.0),
    (ANSWER + THINK, False, 0.0),
    (f"</think>a<think>{ANSWER}", True, 0.0),
    (f"{THINK}</answer>{BOX}<answer>", False, 0.0),
    (f"Sure. {THINK}{ANSWER}", True, 0.0),
    (f"{THINK}So: {ANSWER}", True, 0.0),
    (f"{THINK}{ANSWER}.", True, 0.0),
    (f"{THINK}{ANSWER}<|im_end|>", True, 0.0),
    (f"<think></think>{ANSWER}", True, 0.0),
    (f"<think> \n\t</think>{ANSWER}", True, 0.0),
    (f"<think>Is this <thinking>?</think>{ANSWER}", True, 1.0),
    (f"<thinking>The car is on the left.</thinking>{ANSWER}", True, 0.0),
    (f"<THINK>The car is on the left.</THINK>{ANSWER}", True, 0.0),
    (f"<think >The car is on the left.</think>{ANSWER}", True, 0.0),
    (f"{THINK}<answer>{BOX}</answer", False, 0.0),
    ("", False, 0.0),
    ("<think>" * 100_000, False, 0.0),
    ("</think>" * 100_000 + ANSWER, True, 0.0),
    (THINK + "<answer>" * 100_000, False, 0.0),
    (f"<think>a{' ' * 100_000}</think>{' ' * 100_000}{ANSWER}", True, 1.0),
]


@pytest.mark.parametrize("body", GOOD, ids=range(len(GOOD)))
def test_answers_with_a_box(body):
    assert parse_box(answer(body)) == (10.0, 20.0, 30.0, 40.0)
    assert all(type(v) is float for v in parse_box(answer(body)))
    assert format_reward(answer(body)) == 1.0


@pytest.mark.parametrize("body", NO_BOX, ids=range(len(NO_BOX)))
def test_answers_without_a_box(body):
    assert parse_box(answer(body)) is None
    assert format_reward(answer(body)) == 0.0


@pytest.mark.parametrize("numbers", BAD_NUMBERS, ids=range(len(BAD_NUMBERS)))
def test_boxes_that_are_not_four_finite_numbers(numbers):
    assert parse_box(boxed(numbers)) is None
    assert format_reward(boxed(numbers)) == 0.0


@pytest.mark.parametrize("text, found, reward", LAYOUT, ids=range(len(LAYOUT)))
def test_layout(text, found, reward):
    box = (0.0, 129.0, 365.0, 347.0) if text is FIGURE_4 else (10.0, 20.0, 30.0, 40.0)
    assert parse_box(text) == (box if found else None)
    assert format_reward(text) == reward and type(format_reward(text)) is float


def test_a_box_is_passed_on_as_written():
    assert parse_box(boxed("[300, 150.25, -100, 1e308]")) == (300.0, 150.25, -100.0, 1e308)


# --- R_box ---

SQUARE = (0.0, 0.0, 10.0, 10.0)


        # width and area overflow
@pytest.mark.parametrize(
    "box, truth, iou",
    [
        (SQUARE, SQUARE, 1),
        ((0, 0, 10, 5), SQUARE, 1 / 2),  # contained: 50 / 100
        ((5, 0, 15, 10), SQUARE, 1 / 3),  # half of each: 50 / (100 + 100 - 50)
        ((5, 5, 15, 15), SQUARE, 1 / 7),  # a quarter of each: 25 / 175
        ((-5, 2, 15, 4), SQUARE, 1 / 6),  # a cross: 20 / (40 + 100 - 20)
        ((9.5, 0, 10, 10), SQUARE, 1 / 20),
        ((10, 0, 20, 10), SQUARE, 0),  # touching at an edge
        ((10, 10, 20, 20), SQUARE, 0),  # touching at a corner
        ((30, 30, 40, 40), SQUARE, 0),
        ((-1e308, -1e308, 1e308, 1e308), (-1e308, -1e308, 1e308, 1e308), 1),
        ((0, 0, 1e308, 1e308), (-1e308, 0, 1e308, 1e308), 1 / 2),
        ((0, 0, 1e308, 1e308), SQUARE, 0),  # 1e-614 is below every float
        ((0, 0, 1e-300, 1e-300), (0, 0, 1e-300, 1e-300), 1),  # area underflows
        ((0, 0, 1e308, 1e-308), (0, 0, 1e-308, 1e308), 0),
    ],
)
def test_box_iou_by_hand(box, truth, iou):
    assert box_iou(box, truth) == pytest.approx(iou, rel=1e-15, abs=0)
    assert box_iou(truth, list(box)) == box_iou(box, truth)
    assert type(box_iou(box, truth)) is float


@pytest.mark.parametrize(
    "box",
    [
        None,
        (10, 0, 0, 10),  # x inverted
        (0, 10, 10, 0),  # y inverted
        (10, 10, 0, 0),  # both: two negative sides make a positive area
        (0, 0, 0, 10),  # no width
        (0, 0, 10, 0),  # no height
        (5, 5, 5, 5),
        (math.nan, 0, 10, 10),
        (0, 0, 10, math.nan),
        (0, 0, math.inf, 10),
        (-math.inf, -math.inf, math.inf, math.inf),
    ],
)
def test_a_box_that_is_none_scores_zero(box):
    assert box_iou(box, SQUARE) == box_iou(SQUARE, box) == box_iou(box, box) == 0.0


def test_the_box_on_which_the_released_code_divides_by_zero():
    # areas -200 * 200 and 200 * 200, intersection 0: union 0
    assert box_iou([300, 150, 100, 350], [100, 150, 300, 350]) == 0.0


def test_box_iou_against_pycocotools():
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 60, (40, 4))  # x, y, w, h: most pairs overlap
    expected = coco.iou(boxes, boxes, [0] * 40)
    assert 0.3 < (expected > 0).mean() < 0.99
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).tolist()
    actual = [[box_iou(a, b) for b in corners] for a in corners]
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


# --- R_seg ---

# 1: the prediction alone, 2: the truth alone, 3: both
DRAWING = torch.tensor([[0, 1, 1, 0], [1, 3, 3, 2], [0, 3, 2, 0]])
MASK, TRUTH = DRAWING % 2 == 1, DRAWING >= 2


def test_masks_by_hand():
    # both 3, either 3 + 3 + 2 = 8
    assert [int(n) for n in mask_counts(MASK, TRUTH)] == [3, 8]
    iou = mask_iou(MASK, TRUTH)
    assert iou == 0.375 and type(iou) is float
    assert mask_iou(MASK, MASK) == 1.0
    assert mask_iou(MASK, ~MASK) == 0.0
    assert mask_iou(MASK.numpy(), TRUTH.numpy()) == 0.375


def test_ignored_pixels_count_in_neither():
    ignore = torch.zeros_like(MASK)
    ignore[0] = True  # two pixels of the prediction alone
    assert [int(n) for n in mask_counts(MASK, TRUTH, ignore)] == [3, 6]
    assert mask_iou(MASK, TRUTH, ignore) == 0.5
    ignore[2] = True  # one of both, one of the truth alone, leaves 2 of 4
    assert [int(n) for n in mask_counts(MASK, TRUTH, ignore)] == [2, 4]
    assert mask_iou(MASK.numpy(), TRUTH.numpy(), ignore.numpy()) == 0.5
    # nothing is left: empty against empty
    assert mask_iou(MASK, TRUTH, torch.ones_like(MASK)) == 1.0


def test_empty_masks():
    empty = torch.zeros(3, 4, dtype=torch.bool)
    assert mask_iou(empty, empty) == 1.0
    assert mask_iou(MASK, empty) == mask_iou(empty, TRUTH) == 0.0
    assert [int(n) for n in mask_counts(empty, empty)] == [0, 0]


def random_masks(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.4


def test_leading_dimensions_broadcast():
    masks, truths = random_masks(2, 3, 7, 5), random_masks(2, 1, 7, 5)
    masks[1, 2] = truths[0] = False
    masks[0, 0] = False  # so that one pair is empty against empty
    ignore = random_masks(7, 5)
    counts, ious = mask_counts(masks, truths, ignore), mask_iou(masks, truths, ignore)
    assert ious.shape == counts[0].shape == counts[1].shape == (2, 3)
    assert ious.dtype == torch.float32 and not counts[0].is_floating_point()
    for i in range(2):
        for j in range(3):
            both = either = 0
            for y in range(7):
                for x in range(5):
                    a, b = bool(masks[i, j, y, x]), bool(truths[i, 0, y, x])
                    both += (a and b) and not ignore[y, x]
                    either += (a or b) and not ignore[y, x]
            assert (counts[0][i, j], counts[1][i, j]) == (both, either)
            assert ious[i, j].item() == pytest.approx(both / either if either else 1.0, rel=1e-7)
    assert ious[0, 0] == 1.0 and ious[1, 2] == 0.0


def test_mask_iou_against_pycocotools():
    masks = torch.stack([random_masks(20, 30) & (random_masks(40, 20, 30)[i]) for i in range(40)])
    rle = [coco.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in masks]
    expected = coco.iou(rle, rle, [0] * 40)
    assert 0.1 < expected.min() < 0.9
    actual = mask_iou(masks[:, None], masks)  # (40, 1, H, W) against (40, H, W) -> (40, 40)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-7)


def test_masks_that_would_give_a_wrong_number_are_refused():
    for bad in (MASK.float(), MASK.to(torch.uint8) * 255):  # logits; a picture's 0 and 255
        with pytest.raises(TypeError, match="boolean"):
            mask_iou(bad, TRUTH)
        with pytest.raises(TypeError, match="boolean"):
            mask_iou(MASK, TRUTH, bad)
    for bad in (MASK[:1, :1], MASK[:, :1], MASK.T):  # the first two would broadcast over pixels
        with pytest.raises(ValueError, match="H x W"):
            mask_iou(bad, TRUTH)
        with pytest.raises(ValueError, match="H x W"):
            mask_iou(MASK, TRUTH, bad)


# --- Eq. 11 ---


def test_unified_reward():
    assert unified_reward(1.0, 0.5, 0.25) == 1.75
    assert unified_reward(1.0, 0.5, 0.25, lambdas=(2.0, 4.0, 8.0)) == 2 + 2 + 2
    assert unified_reward(1.0, 0.5, 0.25, lambdas=(0.0, 1.0, 0.0)) == 0.5  # Table 5's ablation
    parts = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]), torch.tensor([0.0, 1.0])
    assert unified_reward(*parts).tolist() == [1.5, 1.25]


# --- whatever a model may write ---

SOUP = ["<think>", "</think>", "<answer>", "</answer>", "```json", "```", BOX, OTHER,
        '{"bbox_2d": ']
SOUP += ["[", "]", "}", "[1, 2, 3, 4]", "1e999", "NaN", "-", "9" * 5000, "true", "null", ",", " ",
         "\r\n"]
SOUP += ["\0", "\ud800", "<", "é"]


def mutate(rng, text):
    """Delete, insert, replace, repeat or move a span."""
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    j = min(j, i + rng.choice([1, 3, 10, 1000]))
    k = rng.randrange(len(text) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        return text[:i] + text[j:]
    if kind == 1:
        return text[:i] + rng.choice(SOUP) + text[i:]
    if kind == 2:
        return text[:i] + rng.choice(SOUP) + text[j:]
    if kind == 3:
        return text[:j] + text[i:j] * rng.choice([1, 2, 50]) + text[j:]
    return text[:k] + text[i:j] + text[k:]


def random_numbers(rng):
    """Four numbers of any size, as JSON would have them or nearly so."""
    kinds = [
        lambda: str(rng.randrange(-10, 700)),
        lambda: repr(rng.uniform(-1, 1) * 10.0 ** rng.randrange(-320, 309)),
        lambda: rng.choice(["0", "-0.0", "1e308", "-1e308", "1.8e308", "5e-324", "1e999", "true",
                            "9" * 400]),
    ]
    return "[" + ", ".join(rng.choice(kinds)() for _ in range(rng.choice([4] * 20 + [3, 5]))) + "]"


def hostile_string(rng, n):
    kind = n % 5
    if kind == 0:
        return boxed(random_numbers(rng))
    if kind == 1:
        return "".join(rng.choice(SOUP) for _ in range(rng.randrange(30)))
    if kind == 2:
        last = rng.choice([128, 0x3000, 0x110000])
        return "".join(chr(rng.randrange(last)) for _ in range(rng.randrange(60)))
    if kind == 3 and n % 100 == 3:
        depth = rng.randrange(50_000)
        opening = rng.choice(["[", "{", '{"bbox_2d":', '[{"bbox_2d":['])
        return answer(opening * depth + "]" * rng.randrange(depth + 1))
    text = rng.choice([FIGURE_4, answer(BOX), answer(f"```json\n{BOX}\n```"),
                       boxed(random_numbers(rng))])
    for _ in range(rng.choice([1, 1, 2, 5])):
        text = mutate(rng, text)
    return text


def test_ten_thousand_hostile_strings():
    rng = random.Random(0)
    seen = {"box": 0, "no box": 0, "well formed": 0, "box in bad form": 0, "overlap": 0,
            "no overlap": 0}
    previous = SQUARE
    for n in range(10_000):
        text = hostile_string(rng, n)
        box, reward = parse_box(text), format_reward(text)
        assert box is None or (type(box) is tuple and len(box) == 4)
        assert box is None or all(type(v) is float and math.isfinite(v) for v in box)
        assert reward in (0.0, 1.0) and (reward == 0.0 or box is not None)
        for truth in (SQUARE, (0.0, 129.0, 365.0, 347.0), previous, box):
            iou = box_iou(box, truth)
            assert type(iou) is float and 0.0 <= iou <= 1.0
            seen["overlap" if iou > 0 else "no overlap"] += 1
        previous = box or previous
        seen["no box" if box is None else "box"] += 1
        seen["well formed"] += reward == 1.0
        seen["box in bad form"] += reward == 0.0 and box is not None
    assert min(seen.values()) > 300, seen  # the strings do reach every branch


# --- the box of an answer to a released prompt ---


        # as the released code reads it
@pytest.mark.parametrize(
    "text, box",
    [
        ("(12,34),(56,78)", (12, 34, 56, 78)),  # Qwen2-VL's way, its special tokens taken out
        ("the cup.(12, 34), (56, 78)", (12, 34, 56, 78)),
        ("[12,34,56,78]", (12, 34, 56, 78)),
        ("[ 12, 34,\n56, 78 ]", (12, 34, 56, 78)),
        ("[12 , 34 , 56 ,78]", (12, 34, 56, 78)),
        ("( 12 ,34 ) , ( 56, 78 )", (12, 34, 56, 78)),
        ("(12,34,56,78)", (12, 34, 56, 78)),
        ("[-1.5, 0, 3.25, 4]", (-1.5, 0, 3.25, 4)),
        (BOX, (10, 20, 30, 40)),  # Qwen2.5-VL's JSON
        (f"```json\n{BOX}\n```", (10, 20, 30, 40)),
        (FIGURE_4, (0, 129, 365, 347)),
        (f"not [1, 2, 3], but [4, 5, 6, 7], {BOX}", (4, 5, 6, 7)),  # the first with four numbers
        ("<think>[1,2,3,4]</think><answer>[5,6,7,8]</answer>", (1, 2, 3, 4)),
        ('<answer>[{"bbox_2d": [5,6,7,8]', (5, 6, 7, 8)),  # cut at the limit
        ("(300,150),(100,350)", (300, 150, 100, 350)),  # inverted: box_iou gives it 0
    ],
)
def test_find_box(text, box):
    found = find_box(text, "released")
    assert found == box and type(found) is tuple and all(type(v) is float for v in found)
    assert find_box(text, "released-cot") == box


@pytest.mark.parametrize(
    "text",
    ["", "no box", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "1, 2, 3, 4", "[a, b, c, d]", "[1, 2, nan, 4]",
     "[1e9, 2, 3, 4]"]
    + ["[1 2 3 4]", "(1,2)(3,4)", "[1, 2, 3, 4", "{1, 2, 3, 4}", "[1,, 2, 3, 4]",
       f"[{'9' * 5000}, 2, 3, 4]"]
    + ["[--1, 2, 3, 4]", "[1., 2, 3, 4]"],
)
def test_find_box_finds_none(text):
    assert find_box(text, "released") is None


def test_find_box_leaves_the_papers_answers_to_parse_box():
    rng = random.Random(2)
    texts = [hostile_string(rng, n) for n in range(500)]
    texts += [FIGURE_4, "(12,34),(56,78)", "[1,2,3,4]", answer(BOX)]
    for text in texts:
        assert find_box(text) == find_box(text, "paper") == parse_box(text)
    assert find_box("[1,2,3,4]") is None and find_box(answer(BOX)) == (10, 20, 30, 40)


def test_find_box_on_hostile_strings():
    rng, found = random.Random(3), 0
    for n in range(10_000):
        box = find_box(hostile_string(rng, n), "released")
        assert box is None or (type(box) is tuple and len(box) == 4
                               and all(map(math.isfinite, box)))
        found += box is not None
    assert 300 < found < 9_700


@pytest.mark.parametrize(
    "piece",
    ["[", "(", "[1,", "[ ", "[1, 2, 3, 4", "1" * 10, "[1,2,3,", "[1),(", " ", "(1,2),(3,", "-",
     "[1." + "1" * 10],
)
def test_find_box_takes_linear_time(piece):
    """Twenty times the text in well under eighty times the time: quadratic would be four hundred
    times."""
    def seconds(n):
        text, began = piece * (n // len(piece)), time.process_time()
        find_box(text, "released")
        return time.process_time() - began
    short = min(seconds(20_000) for _ in range(5))
    assert min(seconds(400_000) for _ in range(5)) < 80 * max(short, 2e-4)


def test_numbers_written_by_json_come_back():
    rng = random.Random(1)
    for _ in range(300):
        numbers = [rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 308) for _ in range(4)]
        assert parse_box(boxed(json.dumps(numbers))) == tuple(numbers)
