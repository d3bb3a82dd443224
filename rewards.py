"""The rewards of LENS (Eq. 11): how good is a completion, the text that the multimodal language
model (MLLM) writes, and how good is the mask that SAM 2 draws for it?

The prompt (Fig. 4, SYSTEM_PROMPT below) asks the MLLM for a completion of this form:

    <think> ... </think>
    <answer> ```json [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}] ``` </answer>

Three rewards grade it, from coarse to fine. R_format asks whether the text has this form, R_box how
well its box overlaps the true box, and R_seg how well the mask overlaps the true mask. Each lies in
[0, 1]. Their weighted sum is the unified reward. grpo.py compares it within a group, the G
completions of one image and one expression (the text that says which object is meant).

    >>> text = '<think>the left one</think><answer>[{"bbox_2d": [0, 0, 10, 10]}]</answer>'
    >>> r_format = format_reward(text)
    >>> r_box = box_iou(parse_box(text), (0, 0, 10, 20))  # 100 / 200
    >>> mask, gt_mask = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 0]]]) > 0  # H = 1, W = 4
    >>> r_seg = mask_iou(mask, gt_mask)  # 3 / 4
    >>> unified_reward(r_format, r_box, r_seg)
    2.25

A box is (x1, y1, x2, y2) in pixels of some frame; the MLLM's frame and the image's own are
explained in data.py. Nothing here uses the model, and nothing needs a gradient. A completion can be
any string, so the functions that read one take linear time and raise nothing.

Departures from the paper
- The tags are <think>, as in Fig. 4. The paper's text says <thinking>.
- The paper does not say whether a badly formatted completion can earn R_box. Here it can, so that
  Table 5's ablation can switch each reward on its own.
- The paper does not define the IoU of two empty masks. Here it is 1, as in the evaluation metrics.

The released code differs (in parentheses the flags of train_rl.py that do the same)
- It squares both IoUs (--iou-power 2) and has no format reward on RefCOCO (--lambda-format 0).
- Its prompts ask for a box only, or for a box after free reasoning (--prompt released,
  released-cot). It takes the first box anywhere in the text, even in the think block. find_box does
  the same for these two prompts.
- It misses a box with a space before a comma, and some inverted boxes make it divide by zero.
  Nothing here copies these two faults.
"""
import json
import math
import re

import torch
import torch.nn.functional as F


def unified_reward(r_format, r_box, r_seg, lambdas=(1.0, 1.0, 1.0)):
    """Eq. 11: R_unified = lambda_1 R_format + lambda_2 R_box + lambda_3 R_seg.

    Takes floats or tensors of one shape and returns the same."""
    return lambdas[0] * r_format + lambdas[1] * r_box + lambdas[2] * r_seg


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def format_reward(text):
    """R_format of a completion: 1.0 if it is a think block followed by an answer block that holds a
    box, else 0.0.

    Each of the four tags must occur exactly once and in this order. Only white space may stand
    before, between and after the two blocks. The think block must not be blank, and parse_box must
    find a box.

    A completion that was cut at the token limit deserves 0 too. Its text does not show that, so
    train_rl.py sets it to 0."""
    pieces = re.split("(</?(?:think|answer)>)", text)  # text, tag, text, tag, ..., text
    if pieces[1::2] != TAGS:
        return 0.0
    before, thinking, between, _, after = pieces[::2]
    if before.strip() or between.strip() or after.strip() or not thinking.strip():
        return 0.0
    return 0.0 if parse_box(text) is None else 1.0


def box_iou(box, truth):
    """R_box: the IoU of two boxes (x1, y1, x2, y2) that are given in the same frame, as a float in
    [0, 1].

    It is 0.0 if a box is None, inverted, empty or not finite. Without this rule, the inverted box
    [300, 150, 100, 350] would have the area -40000. With [100, 150, 300, 350], of area 40000, its
    intersection is empty, so the IoU would be 0 / 0. Raises nothing."""
    if box is None or truth is None or not all(math.isfinite(v) for v in (*box, *truth)):
        return 0.0
    # Halving all coordinates does not change the IoU, and keeps the differences from overflowing.
    ax1, ay1, ax2, ay2 = (float(v) / 2 for v in box)
    bx1, by1, bx2, by2 = (float(v) / 2 for v in truth)
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if width <= 0 or height <= 0:  # no overlap, or one box is empty or inverted
        return 0.0
    # With areas A and B and intersection I, the IoU is I / (A + B - I) = 1 / (A/I + B/I - 1). An
    # area can overflow or underflow. The quotients are at least 1; if one overflows, the IoU is 0.
    a = (ax2 - ax1) / width * ((ay2 - ay1) / height)  # A/I
    b = (bx2 - bx1) / width * ((by2 - by1) / height)  # B/I
    return 1.0 / (a + b - 1.0)


def mask_iou(mask, truth, ignore=None):
    """R_seg: the IoU of two masks, in [0, 1]. It is 1 if both are empty.

    Takes the masks that mask_counts takes and raises its errors. Two masks (H, W) give a float.
    Masks (..., H, W) give a float32 tensor (...): for example, (G, H, W) against (H, W) gives
    (G,)."""
    intersection, union = mask_counts(mask, truth, ignore)
    iou = torch.where(union > 0, intersection / union, 1.0)
    return iou.item() if iou.dim() == 0 else iou


def mask_counts(mask, truth, ignore=None):
    """The number of pixels in the intersection and in the union of two masks. Pixels where `ignore`
    is True count in neither.

    Takes boolean tensors or NumPy arrays (..., H, W), whose leading dimensions broadcast. Returns
    two integer tensors (...) on the device of the masks. On a GPU the call does not wait for the
    result. Summed over a data set, intersections / unions is the cIoU (cumulative IoU).

    Raises TypeError if a mask is not boolean (threshold logits first), and ValueError if the sizes
    H x W differ."""
    mask, truth = torch.as_tensor(mask), torch.as_tensor(truth)
    ignore = torch.zeros_like(truth) if ignore is None else torch.as_tensor(ignore)
    if not mask.dtype == truth.dtype == ignore.dtype == torch.bool:
        raise TypeError(f"masks must be boolean, but mask is {mask.dtype}, truth {truth.dtype} and "
                        f"ignore {ignore.dtype}")
    # Without this check, a mask of size (1, 1) would broadcast over all pixels.
    if not mask.shape[-2:] == truth.shape[-2:] == ignore.shape[-2:]:
        raise ValueError("H x W of mask, truth and ignore differ: "
                         f"{[tuple(m.shape[-2:]) for m in (mask, truth, ignore)]}")
    intersection = (mask & truth & ~ignore).sum((-2, -1))  # (...)
    union = ((mask | truth) & ~ignore).sum((-2, -1))  # (...)
    return intersection, union


def full_size_masks(logits, size):
    """Mask logits (G, S/4, S/4), where S is the side of SAM's square image, -> masks (G, H, W) bool
    at the image's own size (H, W).

    SAM sees the whole image stretched to a square, so one bilinear resize undoes it. SAM 2's own
    post-processing does the same."""
    resized = F.interpolate(logits[None].float(), tuple(size), mode="bilinear",
                            align_corners=False)[0]
    return resized > 0


# --- Reading the box out of a completion ----------------------------------------------------------

def parse_box(text):
    """The box in the answer block of a completion: four finite floats (x1, y1, x2, y2) as they are
    written there, or None.

    The answer block is the first <answer> ... </answer> after the last </think>, or in the whole
    text if there is no </think>. A block that is not closed does not count. It must hold strict
    JSON, with or without a ``` fence around it: an object or a list of objects. The first object
    that has a "bbox_2d" counts. If that is not a list of four finite numbers, the result is None;
    later objects are not tried. A box may be inverted or lie outside the image; box_iou handles
    both. Raises nothing."""
    after_think = text.rpartition("</think>")[2]
    body, closing_tag, _ = after_think.partition("<answer>")[2].partition("</answer>")
    if not closing_tag:
        return None
    try:
        answer = _read_json(body.strip())
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return None
    objects = answer if isinstance(answer, list) else [answer]
    box = next((obj["bbox_2d"] for obj in objects if isinstance(obj, dict) and "bbox_2d" in obj),
               None)
    if not isinstance(box, list) or len(box) != 4:
        return None
    # _read_json makes every number a float; true and false stay bool and are refused
    return tuple(box) if all(isinstance(v, float) and math.isfinite(v) for v in box) else None


def _read_json(text):
    """The value of strict JSON, which may stand between ``` or ```json and ```.

    Raises ValueError if it is not JSON and RecursionError if it is nested too deeply."""
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")

    def refuse(name):
        raise ValueError(f"{name} is not JSON")
    return json.loads(
        text,
        parse_int=float,  # an integer of 5,000 digits becomes inf, where int() would raise
        parse_constant=refuse,  # NaN, Infinity, -Infinity
        # of two equal keys the first counts, as of two objects; json alone would keep the last
        object_pairs_hook=lambda pairs: dict(reversed(pairs)),
    )


# At most nine digits before the point, so that every number is finite as a float
NUMBER = r"(-?\d{1,9}(?:\.\d{1,9})?)"
COMMA = r"\s*,\s*"
# "[x1, y1, x2, y2]" or "(x1,y1),(x2,y2)", with white space anywhere
ANY_BOX = re.compile(
    rf"[\[(]\s*{NUMBER}{COMMA}{NUMBER}(?:\s*\))?{COMMA}(?:\(\s*)?{NUMBER}{COMMA}{NUMBER}\s*[\])]")


def find_box(text, prompt="paper"):
    """The box in a completion, as `prompt` asked for it: four floats or None.

    For Fig. 4's prompt this is parse_box. For a released prompt it is the first "[x1, y1, x2, y2]"
    or "(x1,y1),(x2,y2)" anywhere in the text, because the released code does not read the tags.
    Brackets may be mixed."""
    if prompt == "paper":
        return parse_box(text)
    match = ANY_BOX.search(text)
    return match and tuple(map(float, match.groups()))


# --- The prompt (Fig. 4) and the answer block that it asks for ------------------------------------

# Word for word from Fig. 4. The word question after "label": is no placeholder: only {object} is
# replaced.
SYSTEM_PROMPT = '''You are a helpful assistant. Find the object that best matches "{object}" and \
provide its bounding box.

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
</answer>'''


# The prompts of the released checkpoints, word for word: without reasoning and with it.
RELEASED_PROMPTS = {
    "released": "Output the bounding box of the {question} in the image.",
    "released-cot": 'Locate "{question}", report the bbox coordinates in JSON format.Compare the '
                    "difference between objects and find the most closely matched one.Output the "
                    "thinking process in <think> </think> and final answer in <answer> </answer> "
                    "tags.Output the one bbox inside the interested object in JSON format.i.e., "
                    "<think>thinking process here</think><answer>answer here</answer>"}


def chat_messages(expression, prompt="paper"):
    """The messages that ask the MLLM about one expression: with Fig. 4's prompt ("paper") or with
    one of RELEASED_PROMPTS. A processor's apply_chat_template takes them."""
    if prompt == "paper":
        system, user = SYSTEM_PROMPT.replace("{object}", expression), expression  # as in Fig. 4
    else:
        system = "You are a helpful assistant. "  # the space is theirs
        user = RELEASED_PROMPTS[prompt].replace("{question}", expression)
    return [{"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user}]}]


def answer_text(box, label, reasoning=None, prompt="paper"):
    """What a completion should say about `box`, which is given in the MLLM frame (see data.py) and
    is rounded. `label` is the expression.

    Without `reasoning` it is the answer block alone. Stage 1 (align.py) gives that to the MLLM in
    the place of a sampled completion. With `reasoning` a think block stands before it. For a
    released prompt it is what the released code's stage 1 uses, and `reasoning` is ignored."""
    x1, y1, x2, y2 = (round(v) for v in box)
    if prompt != "paper":
        return (f"<|object_ref_start|>{label}.<|object_ref_end|>"
                f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
    label = json.dumps(label, ensure_ascii=False)
    entry = f'{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": {label}}}'
    answer = f"<answer>\n```json\n[\n  {entry}\n]\n```\n</answer>"
    return answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n{answer}"
