"""The unified rewards of LENS (Eq. 11), and the prompt that says what they ask for (Fig. 4):
completion text + predicted mask + truth -> one number per sample.

A sample is a completion and the mask that follows from it. Three cues grade it, from coarse to
fine: is the text laid out as asked (R_format), does the box it names lie on the object (R_box),
does the mask (R_seg)? grpo.py then compares the sums within a group. Nothing here knows the model,
and nothing needs a gradient.

    <think> ... </think>
    <answer> ```json [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}] ``` </answer>

A completion is written by a model that is paid to find loopholes, so whatever reads it is total:
any string gives a result, in linear time and without an exception.

Paper: the tags are those of Fig. 4; its text says <thinking>. R_box does not depend on R_format, so
that Table 5 can switch them one by one. Two empty masks have IoU 1, as in the metric; the paper is
silent. Released code: it squares both IoUs (here the caller may, --iou-power 2), scores no format
on RefCOCO, takes the first box in the whole text, the thinking included (find_box does, for its
prompts alone), loses a box to a space before a comma, and can divide by zero on an inverted box.
Its prompts ask for a box, with reasoning or without (`--prompt released`, `released-cot`).
"""
import json
import math
import re

import torch
import torch.nn.functional as F

# --- The prompt (Fig. 4), and the answer it asks for ----------------------------------------------

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

# What the released checkpoints were trained on, word for word: without reasoning, and with it
RELEASED_PROMPTS = {
    "released": "Output the bounding box of the {question} in the image.",
    "released-cot": 'Locate "{question}", report the bbox coordinates in JSON format.Compare the '
                    "difference between objects and find the most closely matched one.Output the "
                    "thinking process in <think> </think> and final answer in <answer> </answer> "
                    "tags.Output the one bbox inside the interested object in JSON format.i.e., "
                    "<think>thinking process here</think><answer>answer here</answer>"}


def chat_messages(text, prompt="paper"):
    """The conversation about one expression: Fig. 4's, or one with a released prompt."""
    if prompt == "paper":
        system, user = SYSTEM_PROMPT.replace("{object}", text), text
    else:
        system = "You are a helpful assistant. "
        user = RELEASED_PROMPTS[prompt].replace("{question}", text)
    return [{"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user}]}]


def answer_text(box, label, reasoning=None, prompt="paper"):
    """The response Fig. 4 asks for, with `box` in the MLLM frame. Without `reasoning`, the answer
    block alone (stage 1's `--context true`); with a released prompt, what their code puts there."""
    x1, y1, x2, y2 = (round(v) for v in box)
    if prompt != "paper":
        return (f"<|object_ref_start|>{label}.<|object_ref_end|>"
                f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
    label = json.dumps(label, ensure_ascii=False)
    found = f'{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": {label}}}'
    answer = f"<answer>\n```json\n[\n  {found}\n]\n```\n</answer>"
    return answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n{answer}"


# --- Text -> box and format -----------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def parse_box(text):
    """The box that a completion names: text -> (x1, y1, x2, y2), four finite floats as written, or
    None.

    Only the answer block is read: the first <answer> ... </answer> after the last </think>, or in
    the whole text if there is no </think>. An unclosed block is no block. It holds strict JSON,
    bare or fenced: one object or a list, in which the first object with a "bbox_2d" counts. Is that
    not a list of four finite numbers, then there is no box, whatever follows. A box may be inverted
    or lie outside the picture; box_iou deals with that. Raises nothing."""
    # rest is empty if there is no <answer>
    _, _, rest = text.rpartition("</think>")[2].partition("<answer>")
    body, closed, _ = rest.partition("</answer>")
    if not closed:
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
    # _read_json makes every number a float, so this leaves out true and false, ints to Python.
    return tuple(box) if all(isinstance(v, float) and math.isfinite(v) for v in box) else None


def _read_json(text):
    """Strict JSON, bare or between ``` or ```json and ```. Raises ValueError, RecursionError if too
    deep."""
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")

    def refuse(name):
        raise ValueError(f"{name} is Python's JSON, not JSON")
    return json.loads(
        text,
        parse_int=float,  # an integer of 5,000 digits is then inf, where int() would raise
        parse_constant=refuse,  # NaN, Infinity, -Infinity
        object_pairs_hook=lambda pairs: dict(reversed(pairs)),  # of a key given twice the first
    )


NUMBER = r"(-?\d{1,9}(?:\.\d{1,9})?)"
COMMA = r"\s*,\s*"
ANY_BOX = re.compile(
    rf"[\[(]\s*{NUMBER}{COMMA}{NUMBER}(?:\s*\))?{COMMA}(?:\(\s*)?{NUMBER}{COMMA}{NUMBER}\s*[\])]")


def find_box(text, prompt="paper"):
    """The box of an answer to Fig. 4's prompt is parse_box's. The released prompts (`--prompt`) ask
    for no answer block: there it is the first one anywhere, "[x1, y1, x2, y2]" or
    "(x1,y1),(x2,y2)". -> four floats or None."""
    if prompt == "paper":
        return parse_box(text)
    found = ANY_BOX.search(text)
    return found and tuple(map(float, found.groups()))


def format_reward(text):
    """R_format: 1.0 if the text is one think block, then one answer block whose JSON holds a box;
    else 0.0.

    Each of the four tags occurs exactly once and in order, only white space stands before, between
    and after the blocks, the thinking is not blank, and parse_box finds a box. Raises nothing.

    The text has no end token, so a completion that was cut at the token limit is the caller's to
    zero: train_rl.py multiplies by whether it finished."""
    pieces = re.split("(</?(?:think|answer)>)", text)  # text, tag, text, tag, ..., text
    if pieces[1::2] != TAGS:
        return 0.0
    before, thinking, between, _, after = pieces[::2]
    if before.strip() or between.strip() or after.strip() or not thinking.strip():
        return 0.0
    return 0.0 if parse_box(text) is None else 1.0


# --- Boxes and masks -> IoU -----------------------------------------------------------------------

def box_iou(box, truth):
    """R_box: IoU of two boxes (x1, y1, x2, y2), both in one and the same frame, as a float in [0,
    1].

    0 if either is None, inverted, empty or not finite. Raises nothing, whatever the eight floats:
    taken at face value, [300, 150, 100, 350] has the area -40000, and its union with [100, 150,
    300, 350] would be 0."""
    if box is None or truth is None or not all(math.isfinite(v) for v in (*box, *truth)):
        return 0.0
    # An IoU does not change with scale, and halves of finite numbers have no difference that
    # overflows.
    ax1, ay1, ax2, ay2 = (float(v) / 2 for v in box)
    bx1, by1, bx2, by2 = (float(v) / 2 for v in truth)
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if width <= 0 or height <= 0:  # apart or touching, or one of them is empty or inverted
        return 0.0
    # I / (A + B - I), written 1 / (A/I + B/I - 1): no ratio is below 1; one that overflows gives 0.
    a = (ax2 - ax1) / width * ((ay2 - ay1) / height)
    b = (bx2 - bx1) / width * ((by2 - by1) / height)
    return 1.0 / (a + b - 1.0)


def full_size_masks(logits, size):
    """Mask logits (G, S/4, S/4) -> (G, H, W) bool at the picture's own size, as SAM 2's
    post-processing does: SAM's square covers the whole picture, so this is one bilinear resize."""
    resized = F.interpolate(logits[None].float(), tuple(size), mode="bilinear",
                            align_corners=False)[0]
    return resized > 0


def mask_counts(mask, truth, ignore=None):
    """Pixels in the intersection and in the union of two masks; pixels to ignore are left out of
    both.

    Boolean tensors or NumPy arrays (..., H, W), the leading dimensions broadcast -> two integer
    tensors (...), on the device of the masks and without waiting for it. Summed over a data set,
    their quotient is cIoU. Raises TypeError for masks that are not boolean (threshold logits first)
    and ValueError if H x W differ."""
    mask, truth = torch.as_tensor(mask), torch.as_tensor(truth)
    ignore = torch.zeros_like(truth) if ignore is None else torch.as_tensor(ignore)
    if not mask.dtype == truth.dtype == ignore.dtype == torch.bool:
        raise TypeError(f"masks must be boolean, not {mask.dtype}, {truth.dtype}, ignore "
                        f"{ignore.dtype}")
    # compared, or a stray (1, 1) would broadcast
    if not mask.shape[-2:] == truth.shape[-2:] == ignore.shape[-2:]:
        raise ValueError("H x W of masks differ: "
                         f"{[tuple(m.shape[-2:]) for m in (mask, truth, ignore)]}")
    intersection = (mask & truth & ~ignore).sum((-2, -1))  # (...)
    union = ((mask | truth) & ~ignore).sum((-2, -1))  # (...)
    return intersection, union


def mask_iou(mask, truth, ignore=None):
    """R_seg: IoU of two masks in [0, 1]; 1 when both are empty. Inputs and errors as in
    mask_counts.

    (H, W) -> a float; (..., H, W) -> a float32 tensor (...), for instance (G, H, W) against (H, W)
    -> (G,)."""
    intersection, union = mask_counts(mask, truth, ignore)
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    return iou.item() if iou.dim() == 0 else iou


def unified_reward(r_format, r_box, r_seg, lambdas=(1.0, 1.0, 1.0)):
    """Eq. 11: R_unified = lambda_1 R_format + lambda_2 R_box + lambda_3 R_seg. Floats or
    tensors."""
    return lambdas[0] * r_format + lambdas[1] * r_box + lambdas[2] * r_seg
