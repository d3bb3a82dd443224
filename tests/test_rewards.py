"""rewards.py against tables of strings, against IoUs worked out by hand and by pycocotools, and
against 10,000 random strings that try to break it."""
import doctest
import json
import math
import random
import time

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

import rewards
from rewards import (box_iou, find_box, format_reward, full_size_masks, mask_counts, mask_iou,
                     parse_box, unified_reward)

BOX = '[{"bbox_2d": [10, 20, 30, 40], "label": "car"}]'
OTHER = '[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]'
THINK = "<think>The car is on the left.</think>"
ANSWER = f"<answer>{BOX}</answer>"

# The completion of Fig. 4, its reasoning cut short, with the fence that the prompt asks for
FIGURE_4 = """<think>
The task is to identify the car that may need repair among the vehicles shown in the image.
</think>
<answer>
```json
[
{"bbox_2d": [0, 129, 365, 347], "label": "the car that may need repair"}
]
```
</answer>"""


def completion(body):
    """A completion with a good think block and `body` in its answer block."""
    return f"{THINK}\n<answer>{body}</answer>"


def boxed(numbers):
    return completion(f'[{{"bbox_2d": {numbers}, "label": "car"}}]')


def is_box(box):
    return (type(box) is tuple and len(box) == 4
            and all(type(v) is float and math.isfinite(v) for v in box))


def test_the_example_in_the_docstring():
    failures, examples = doctest.testmod(rewards)
    assert failures == 0 and examples == 6


# --- Eq. 11 ---

def test_unified_reward():
    assert unified_reward(1.0, 0.5, 0.25) == 1.75
    assert unified_reward(1.0, 0.5, 0.25, lambdas=(2.0, 4.0, 8.0)) == 2 + 2 + 2
    assert unified_reward(1.0, 0.5, 0.25, lambdas=(0.0, 1.0, 0.0)) == 0.5  # Table 5's ablation
    parts = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]), torch.tensor([0.0, 1.0])
    assert unified_reward(*parts).tolist() == [1.5, 1.25]


# --- What may stand in the answer block ---

GOOD = [  # each names the box 10, 20, 30, 40
    BOX,
    f"\n```json\n{BOX}\n```\n", f"```\n{BOX}\n```", f"```json{BOX}```",
    '{"bbox_2d": [10, 20, 30, 40]}', '```json\n{"label": "car", "bbox_2d": [10, 20, 30, 40]}\n```',
    '[{"bbox_2d" : [10 , 20 , 30 , 40] , "label" : "car"}]',
    '[\r\n\t{"bbox_2d": [10.0,\r\n2e1, 30, 4.0E+1]}\r\n]',
    '[{"label": "a car"}, {"bbox_2d": [10, 20, 30, 40]}]',
    f"[{BOX[1:-1]}, {OTHER[1:-1]}]",  # the first of two boxes counts
    '[{"bbox_2d": [10, 20, 30, 40], "bbox_2d": [1, 2, 3, 4]}]',  # also within an object
    '[{"bbox_2d": [10, 20, 30, 40], "label": "\\ud800 \\u0000 \ud800 é 車 \U0001f697"}]',
    f'[{{"bbox_2d": [10, 20, 30, 40], "label": {"9" * 5000}}}]',
]
BAD = [
    # no JSON, or JSON without a "bbox_2d"
    "", " \n ", "the car", "10, 20, 30, 40", "[]", "{}", "null", "[10, 20, 30, 40]",
    '{"bbox": [10, 20, 30, 40]}', f"[{BOX}]",
    # a "bbox_2d" that is not a list of four numbers, at the end with a good one behind it
    '{"bbox_2d": null}', '{"bbox_2d": "10,20"}', '{"bbox_2d": "abcd"}',
    '{"bbox_2d": {"0": 10, "1": 20, "2": 30, "3": 40}}',
    '[{"bbox_2d": [10, 20]}, {"bbox_2d": [10, 20, 30, 40]}]',
    # broken JSON, and what Python or JavaScript would accept
    BOX[:-1], BOX + "]", BOX + BOX, BOX.replace('"', "'"), BOX.replace("}", ",}"), BOX + "\0",
    "\ufeff" + BOX, '[{"bbox_2d": [10, 20, 30, 40], "label": "line\nbreak"}]',
    '[{"bbox_2d": [10, 20, 30, 40], "score": NaN}]',
    # something beside the JSON, or a broken fence
    f"{BOX} // the car", f"The box is {BOX}", f"```json\n{BOX}", f"```json\n{BOX}\n'''",
    f"'''\n{BOX}\n```", f'"json\n{BOX}\n"""', f"{BOX}\n```", f"```python\n{BOX}\n```",
    f"```json\n```json\n{BOX}\n```\n```", "```", "``````", "```json```",
    # too deep for Python's parser
    "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"bbox_2d":' * 50_000 + "1" + "}" * 50_000,
]
BAD_NUMBERS = [  # in the place of [10, 20, 30, 40]
    "[10, 20, 30]", "[10, 20, 30, 40, 50]", "[]",
    "[[10, 20, 30, 40]]", "[[10, 20], [30, 40]]", "[10, 20, 30, [40]]", "[10, 20, 30, null]",
    '[10, 20, 30, "40"]', "[10, 20, 30, true]", "[false, false, true, true]", "[10, 20, 30, NaN]",
    "[10, 20, 30, Infinity]", "[-Infinity, 20, 30, 40]", "[10, 20, 30, 1e999]",
    "[10, 20, 30, " + "4" * 400 + "]",  # float() of such an integer raises OverflowError
    "[10, 20, 30, " + "4" * 5000 + "]",  # int() of such a string raises ValueError
    "[010, 20, 30, 40]", "[+10, 20, 30, 40]", "[.5, 20, 30, 40]", "[1_0, 20, 30, 40]",
    "[0x10, 20, 30, 40]", "[-1e999, 20, 30, 40]",
]


@pytest.mark.parametrize("body", GOOD, ids=range(len(GOOD)))
def test_answer_blocks_with_a_box(body):
    box = parse_box(completion(body))
    assert box == (10, 20, 30, 40) and is_box(box) and format_reward(completion(body)) == 1.0


BOXLESS = [*map(completion, BAD), *map(boxed, BAD_NUMBERS)]


@pytest.mark.parametrize("text", BOXLESS, ids=range(len(BOXLESS)))
def test_answer_blocks_without_a_box(text):
    assert parse_box(text) is None and format_reward(text) == 0.0


def test_a_box_is_returned_as_written():
    assert parse_box(boxed("[300, 150.25, -100, 1e308]")) == (300.0, 150.25, -100.0, 1e308)
    rng = random.Random(1)
    for _ in range(300):
        numbers = [rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 308) for _ in range(4)]
        assert parse_box(boxed(json.dumps(numbers))) == tuple(numbers)


# --- The think block and the answer block ---

WELL_FORMED = [
    FIGURE_4, THINK + ANSWER, f" \r\n\t{THINK}\r\n\r\n{ANSWER}\r\n",
    f"<think>{BOX} is <b>bold</b>, 1 < 2</think>{ANSWER}",
    f"<think>Is this <thinking>?</think>{ANSWER}",
    f"<think>a{' ' * 100_000}</think>{' ' * 100_000}{ANSWER}",
]
BADLY_FORMED_WITH_A_BOX = [
    # a tag is missing, or nearly right
    ANSWER, f"The car is on the left.</think>{ANSWER}", f"<think>The car is on the left.{ANSWER}",
    f"<thinking>The car is on the left.</thinking>{ANSWER}",
    f"<THINK>The car is on the left.</THINK>{ANSWER}",
    f"<think >The car is on the left.</think>{ANSWER}",
    # a tag is there twice; of two answer blocks the first counts
    f"<think>{THINK}</think>{ANSWER}", THINK + THINK + ANSWER, THINK + ANSWER + ANSWER,
    f"{THINK}{ANSWER}</answer>", f"{THINK}{ANSWER}<answer>{OTHER}</answer>",
    f"<think><answer>{OTHER}</answer></think>{ANSWER}", "</think>" * 100_000 + ANSWER,
    # the tags are in the wrong order
    f"</think>a<think>{ANSWER}",
    # there is text outside the blocks
    f"Sure. {THINK}{ANSWER}", f"{THINK}So: {ANSWER}", f"{THINK}{ANSWER}.",
    f"{THINK}{ANSWER}<|im_end|>",
    # the think block is blank
    f"<think></think>{ANSWER}", f"<think> \n\t</think>{ANSWER}",
]
NO_ANSWER_BLOCK_WITH_A_BOX = [
    "", "<think>" * 100_000, THINK + "<answer>" * 100_000, f"{THINK}{BOX}",
    f"{THINK}{BOX}</answer>", f"{THINK}<answer>{BOX}", f"{THINK}<answer>{BOX}</answer",
    f"{THINK}</answer>{BOX}<answer>", f"{THINK}<answer><answer>{BOX}</answer>",
    f"{THINK}<answer>a car</answer>{ANSWER}",  # the first answer block counts
    # what stands before the last </think> is thought, not answered
    f"<think>{ANSWER}</think>", f"<think>{ANSWER}</think><answer></answer>", ANSWER + THINK,
    f"<think>a <answer> b</think>{BOX}</answer>", f"{THINK}<answer>{BOX}</think></answer>",
]
LAYOUT = ([(text, True, 1.0) for text in WELL_FORMED]
          + [(text, True, 0.0) for text in BADLY_FORMED_WITH_A_BOX]
          + [(text, False, 0.0) for text in NO_ANSWER_BLOCK_WITH_A_BOX])


@pytest.mark.parametrize("text, has_box, reward", LAYOUT, ids=range(len(LAYOUT)))
def test_layout(text, has_box, reward):
    box = (0.0, 129.0, 365.0, 347.0) if text is FIGURE_4 else (10.0, 20.0, 30.0, 40.0)
    assert parse_box(text) == (box if has_box else None)
    assert format_reward(text) == reward and type(format_reward(text)) is float


# --- R_box ---

SQUARE = (0.0, 0.0, 10.0, 10.0)


@pytest.mark.parametrize("box, truth, iou", [
    (SQUARE, SQUARE, 1),
    ((0, 0, 10, 5), SQUARE, 1 / 2),  # contained: 50 / 100
    ((5, 0, 15, 10), SQUARE, 1 / 3),  # half of each: 50 / (100 + 100 - 50)
    ((5, 5, 15, 15), SQUARE, 1 / 7),  # a quarter of each: 25 / 175
    ((-5, 2, 15, 4), SQUARE, 1 / 6),  # a cross: 20 / (40 + 100 - 20)
    ((9.5, 0, 10, 10), SQUARE, 1 / 20),
    ((10, 0, 20, 10), SQUARE, 0),  # touching at an edge
    ((10, 10, 20, 20), SQUARE, 0),  # touching at a corner
    ((30, 30, 40, 40), SQUARE, 0),
    ((-1e308, -1e308, 1e308, 1e308), (-1e308, -1e308, 1e308, 1e308), 1),  # sides, area overflow
    ((0, 0, 1e308, 1e308), (-1e308, 0, 1e308, 1e308), 1 / 2),
    ((0, 0, 1e308, 1e308), SQUARE, 0),  # 1e-614 is below every float
    ((0, 0, 1e-300, 1e-300), (0, 0, 1e-300, 1e-300), 1),  # the area underflows
    ((0, 0, 1e308, 1e-308), (0, 0, 1e-308, 1e308), 0),
    # the released code divides by zero: areas -200 * 200 and 200 * 200, intersection 0, so union 0
    ((300, 150, 100, 350), (100, 150, 300, 350), 0),
])
def test_box_iou_by_hand(box, truth, iou):
    assert box_iou(box, truth) == pytest.approx(iou, rel=1e-15, abs=0)
    assert box_iou(truth, list(box)) == box_iou(box, truth)
    assert type(box_iou(box, truth)) is float


@pytest.mark.parametrize("box", [
    None,
    (10, 0, 0, 10), (0, 10, 10, 0),  # x inverted, y inverted
    (10, 10, 0, 0),  # both: two negative sides would make a positive area
    (0, 0, 0, 10), (0, 0, 10, 0), (5, 5, 5, 5),  # no width, no height, neither
    (math.nan, 0, 10, 10), (0, 0, 10, math.nan), (0, 0, math.inf, 10),
    (-math.inf, -math.inf, math.inf, math.inf),
])
def test_a_box_that_encloses_nothing_scores_zero(box):
    assert box_iou(box, SQUARE) == box_iou(SQUARE, box) == box_iou(box, box) == 0.0


def test_box_iou_against_pycocotools():
    boxes = np.random.default_rng(0).uniform(0, 60, (40, 4))  # x, y, w, h: most pairs overlap
    expected = coco.iou(boxes, boxes, [0] * 40)
    assert 0.3 < (expected > 0).mean() < 0.99
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).tolist()
    actual = [[box_iou(a, b) for b in corners] for a in corners]
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


# --- R_seg ---

# 0: neither mask, 1: only the predicted mask, 2: only the true mask, 3: both
DRAWING = torch.tensor([[0, 1, 1, 0],
                        [1, 3, 3, 2],
                        [0, 3, 2, 0]])
MASK, TRUTH = DRAWING % 2 == 1, DRAWING >= 2


def counts(*masks):
    return [int(n) for n in mask_counts(*masks)]


def test_masks_by_hand():
    assert counts(MASK, TRUTH) == [3, 8]  # three 3s; three 1s + two 2s + three 3s
    assert mask_iou(MASK, TRUTH) == 0.375 and type(mask_iou(MASK, TRUTH)) is float
    assert mask_iou(MASK.numpy(), TRUTH.numpy()) == 0.375
    assert mask_iou(MASK, MASK) == 1.0
    assert mask_iou(MASK, ~MASK) == 0.0


def test_ignored_pixels_count_in_neither():
    ignore = torch.zeros_like(MASK)
    ignore[0] = True  # takes two 1s: 3 of 6 are left
    assert counts(MASK, TRUTH, ignore) == [3, 6] and mask_iou(MASK, TRUTH, ignore) == 0.5
    ignore[2] = True  # takes a 3 and a 2: 2 of 4 are left
    assert counts(MASK, TRUTH, ignore) == [2, 4]
    assert mask_iou(MASK.numpy(), TRUTH.numpy(), ignore.numpy()) == 0.5
    assert mask_iou(MASK, TRUTH, torch.ones_like(MASK)) == 1.0  # empty against empty
    empty = torch.zeros_like(MASK)
    assert counts(empty, empty) == [0, 0] and mask_iou(empty, empty) == 1.0
    assert mask_iou(MASK, empty) == mask_iou(empty, TRUTH) == 0.0


def random_masks(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) < 0.4


def test_leading_dimensions_broadcast():
    """Masks (2, 3, H, W) against (2, 1, H, W), compared with a loop over pixels."""
    masks, truths, ignore = random_masks(2, 3, 7, 5), random_masks(2, 1, 7, 5), random_masks(7, 5)
    masks[1, 2] = truths[0] = False
    masks[0, 0] = False  # so one pair is empty against empty
    intersection, union = mask_counts(masks, truths, ignore)
    ious = mask_iou(masks, truths, ignore)
    assert ious.shape == intersection.shape == union.shape == (2, 3)
    assert ious.dtype == torch.float32 and not intersection.is_floating_point()
    for i in range(2):
        for j in range(3):
            pairs = [(bool(a), bool(b)) for a, b, skip in zip(
                masks[i, j].flatten(), truths[i, 0].flatten(), ignore.flatten()) if not skip]
            both, either = sum(a and b for a, b in pairs), sum(a or b for a, b in pairs)
            assert (intersection[i, j], union[i, j]) == (both, either)
            assert ious[i, j].item() == pytest.approx(both / either if either else 1.0, rel=1e-7)
    assert ious[0, 0] == 1.0 and ious[1, 2] == 0.0


def test_mask_iou_against_pycocotools():
    masks = random_masks(20, 30) & random_masks(40, 20, 30)  # (40, 20, 30), most pairs overlap
    rle = [coco.encode(np.asfortranarray(m.numpy().astype(np.uint8))) for m in masks]
    expected = coco.iou(rle, rle, [0] * 40)
    assert 0.1 < expected.min() < 0.9
    actual = mask_iou(masks[:, None], masks)  # (40, 1, H, W) against (40, H, W) -> (40, 40)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-7)


def test_masks_that_would_give_a_wrong_number_are_refused():
    for bad in (MASK.float(), MASK.to(torch.uint8) * 255):  # logits; an image file's 0 and 255
        for masks in ((bad, TRUTH), (MASK, bad), (MASK, TRUTH, bad)):
            with pytest.raises(TypeError, match="boolean"):
                mask_iou(*masks)
    for bad in (MASK[:1, :1], MASK[:, :1], MASK.T):  # the first two would broadcast over pixels
        for masks in ((bad, TRUTH), (MASK, bad), (MASK, TRUTH, bad)):
            with pytest.raises(ValueError, match="H x W"):
                mask_iou(*masks)


def test_full_size_masks_by_hand():
    # A row of two logits, to four columns. The centres of the four lie at (i + 1/2) / 2 - 1/2 =
    # -1/4, 1/4, 3/4 and 5/4 on the grid of the two. So 5 and -12 become 5, 0.75 * 5 - 0.25 * 12 =
    # 0.75, 0.25 * 5 - 0.75 * 12 = -7.75 and -12. A logit of 0 is outside.
    logits = torch.tensor([[[5.0, -12.0]], [[-5.0, 12.0]], [[0.0, 0.0]]])
    assert full_size_masks(logits, (2, 4)).tolist() == [
        2 * [[True, True, False, False]], 2 * [[False, False, True, True]], 2 * [4 * [False]]]


# --- The box in a completion to a released prompt ---

@pytest.mark.parametrize("text, box", [(text, (12, 34, 56, 78)) for text in (
    "(12,34),(56,78)",  # as Qwen2-VL writes it, without its special tokens
    "the cup.(12, 34), (56, 78)", "( 12 ,34 ) , ( 56, 78 )", "(12,34,56,78)", "[12,34,56,78]",
    "[ 12, 34,\n56, 78 ]", "[12 , 34 , 56 ,78]")
] + [
    (BOX, (10, 20, 30, 40)),  # as Qwen2.5-VL writes it
    (f"```json\n{BOX}\n```", (10, 20, 30, 40)),
    (FIGURE_4, (0, 129, 365, 347)),
    ("[-1.5, 0, 3.25, 4]", (-1.5, 0, 3.25, 4)),
    ("not [1, 2, 3], but [4, 5, 6, 7], [8, 9, 10, 11]", (4, 5, 6, 7)),  # the first of four numbers
    ("<think>[1,2,3,4]</think><answer>[5,6,7,8]</answer>", (1, 2, 3, 4)),  # as the released code
    ('<answer>[{"bbox_2d": [5,6,7,8]', (5, 6, 7, 8)),  # cut at the limit
    ("(300,150),(100,350)", (300, 150, 100, 350)),  # inverted: box_iou gives it 0
] + [(text, None) for text in (
    "", "no box", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "1, 2, 3, 4", "[a, b, c, d]", "[1, 2, nan, 4]",
    "[1e9, 2, 3, 4]", "[1 2 3 4]", "(1,2)(3,4)", "[1, 2, 3, 4", "{1, 2, 3, 4}", "[1,, 2, 3, 4]",
    f"[{'9' * 5000}, 2, 3, 4]", "[--1, 2, 3, 4]", "[1., 2, 3, 4]")])
def test_find_box(text, box):
    for prompt in ("released", "released-cot"):
        assert find_box(text, prompt) == box and (box is None or is_box(find_box(text, prompt)))


# --- Whatever a model may write ---

SOUP = ["<think>", "</think>", "<answer>", "</answer>", "```json", "```", BOX, OTHER,
        '{"bbox_2d": ', "[", "]", "}", "[1, 2, 3, 4]", "1e999", "NaN", "-", "9" * 5000, "true",
        "null", ",", " ", "\r\n", "\0", "\ud800", "<", "é"]


def mutate(rng, text):
    """Delete, insert, replace, repeat or move a span."""
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    j, k = min(j, i + rng.choice([1, 3, 10, 1000])), rng.randrange(len(text) + 1)
    piece, times = rng.choice(SOUP), rng.choice([1, 2, 50])
    return rng.choice([text[:i] + text[j:], text[:i] + piece + text[i:],
                       text[:i] + piece + text[j:], text[:j] + text[i:j] * times + text[j:],
                       text[:k] + text[i:j] + text[k:]])


def random_numbers(rng):
    """Four numbers of any size, as JSON or nearly so, and now and then three or five."""
    edge_cases = ["0", "-0.0", "1e308", "-1e308", "1.8e308", "5e-324", "1e999", "true", "9" * 400]
    numbers = [rng.choice([str(rng.randrange(-10, 700)), rng.choice(edge_cases),
                           repr(rng.uniform(-1, 1) * 10.0 ** rng.randrange(-320, 309))])
               for _ in range(rng.choice([4] * 20 + [3, 5]))]
    return f"[{', '.join(numbers)}]"


def hostile_string(rng, n):
    """The n-th string: random numbers, random tokens, random characters, deep nesting, or a good
    completion with some damage."""
    if n % 5 == 0:
        return boxed(random_numbers(rng))
    if n % 5 == 1:
        return "".join(rng.choice(SOUP) for _ in range(rng.randrange(30)))
    if n % 5 == 2:
        last = rng.choice([128, 0x3000, 0x110000])
        return "".join(chr(rng.randrange(last)) for _ in range(rng.randrange(60)))
    if n % 100 == 3:
        depth = rng.randrange(50_000)
        opening = rng.choice(["[", "{", '{"bbox_2d":', '[{"bbox_2d":['])
        return completion(opening * depth + "]" * rng.randrange(depth + 1))
    text = rng.choice([FIGURE_4, completion(BOX), completion(f"```json\n{BOX}\n```"),
                       boxed(random_numbers(rng))])
    for _ in range(rng.choice([1, 1, 2, 5])):
        text = mutate(rng, text)
    return text


def test_ten_thousand_hostile_strings():
    rng, previous = random.Random(0), SQUARE
    seen = {"box": 0, "no box": 0, "well formed": 0, "box, badly formed": 0, "overlap": 0,
            "no overlap": 0, "box anywhere": 0, "no box anywhere": 0}
    for n in range(10_000):
        text = hostile_string(rng, n)
        box, reward, anywhere = parse_box(text), format_reward(text), find_box(text, "released")
        assert (box is None or is_box(box)) and (anywhere is None or is_box(anywhere))
        assert find_box(text) == find_box(text, "paper") == box
        assert reward in (0.0, 1.0) and (reward == 0.0 or box is not None)
        for truth in (SQUARE, (0.0, 129.0, 365.0, 347.0), previous, box):
            iou = box_iou(box, truth)
            assert type(iou) is float and 0.0 <= iou <= 1.0
            seen["overlap" if iou > 0 else "no overlap"] += 1
        previous = box or previous
        seen["no box" if box is None else "box"] += 1
        seen["well formed"] += reward == 1.0
        seen["box, badly formed"] += reward == 0.0 and box is not None
        seen["no box anywhere" if anywhere is None else "box anywhere"] += 1
    assert min(seen.values()) > 300, seen  # the strings reach every branch


@pytest.mark.parametrize("piece", ["[", "(", "[1,", "[ ", "[1, 2, 3, 4", "1" * 10, "[1,2,3,",
                                   "[1),(", " ", "(1,2),(3,", "-", "[1." + "1" * 10, "<think>",
                                   "</think>", "<answer>", "<", '"', "{", '{"bbox_2d":'])
def test_reading_takes_linear_time(piece):
    """A text that is 20 times as long takes less than 80 times as long. Quadratic time would be 400
    times as long."""
    def seconds(n):
        text, start = completion(piece * (n // len(piece))), time.process_time()
        parse_box(text), format_reward(text), find_box(text, "released")
        return time.process_time() - start
    short = min(seconds(20_000) for _ in range(5))
    assert min(seconds(400_000) for _ in range(5)) < 80 * max(short, 2e-4)
