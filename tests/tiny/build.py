"""Trains the laptop's two stand-ins on the shapes world: a tiny SAM 2 and a tiny Qwen2.5-VL.

    python tests/tiny/build.py sam                               # an hour of one core
    python tests/tiny/build.py mllm                              # three or four hours of one core
    torchrun --nproc_per_node=2 tests/tiny/build.py mllm --bf16  # on two cores
    python tests/tiny/build.py evaluate --output tests/tiny      # how good are the committed ones?

LENS starts from public models of billions of parameters. These two have a million each and stand in
for them, so that every script can be run on a laptop. They are laid out like the real ones, and no
script treats them differently:

    OUTPUT/mllm         Qwen2_5_VLForConditionalGeneration as save_pretrained writes it, processor
    OUTPUT/sam          config.yaml in the sam2 package's own format, and model.pt
    OUTPUT/build.log    what the training printed

Training scenes come from world.py's generator, with seeds that no other script uses. The committed
stand-ins were trained in several calls while this script was still changing (tests/tiny/build.log,
docs/world.md). No single command above made them.

The MLLM is taught two habits on purpose. Say so wherever a result of these models is shown.

    glance      3 of 4 completions. "It is the red circle.": any thing that fits the noun. The box
                is 5 +- 2 pixels too wide on every side, and in one of seven a tag is missing.
    look        1 of 4. It lists the candidates of every step, each with its place and with what
                decides, and concludes. The box is tight. Only a look finds several things: a glance
                names one of them.

Its most likely completion is a glance: it knows how to look and seldom does.

What differs from the real models
    Tokens      A whole number is one token (Qwen writes digit by digit). The fixed text of prompt
                and answer block is a few long tokens. Other printable ASCII characters are one
                token each, anything else is <unk>.
    Training    Aids help, and are thrown away afterwards. Numbers have soft labels, so that a near
                miss is nearly right. Linear heads (`Aids`) read colour, shape, place and a coarse
                drawing off the hidden states. One attention head is told to attend to the thing
                that the text speaks of. Random vectors stand behind every completion, as the
                context queries will in stage 1. The vision tower is trained alone at first, and
                until the last 400 steps 3 of 4 completions look.
    SAM 2       It has no memory, and only its single mask is trained: never ask it for three masks,
                nor for its own estimate of their IoU. It also learns to read blurred prompts
                (`blur_tokens`), because what stage 1 gives it looks like that in the beginning.
"""
import argparse
import io
import json
import math
import multiprocessing
import os
import random
import re
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoProcessor, GenerationConfig, PreTrainedTokenizerFast,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor,
                          Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import data
import world
from model import SamHead, load_sam
from rewards import (SYSTEM_PROMPT, answer_text, box_iou, chat_messages, format_reward,
                     parse_box)

PATCH = 8
CELL = 2 * PATCH                       # pixels of an image token's side: 2 x 2 patches are merged
FEWEST, MOST = 150 ** 2, 163 ** 2      # pixels of the MLLM's image: about a hundred cells
HIGHEST = 240                          # the largest number with a token; no side is longer
EXPRESSIONS = 6                        # per training scene
THINGS = world.MOST
TARGETS = THINGS + EXPRESSIONS         # what can be meant: a thing, or several by an expression
SIDE = 192                             # SAM's image, in pixels
LOW = SIDE // 4                        # SAM's masks
COARSE = 16                            # the coarse drawing, one of the aids
DRAWING = COARSE ** 2, 2, 8            # what an aid reads about a thing: cells; turn; places
LOOKING_LAYER = 2                      # the layer whose first head is told what to attend to
QUERIES = 8                            # random vectors behind every completion
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# --- What the MLLM learns to say ------------------------------------------------------------------

LOOSE, BROKEN = 5.0, 1 / 7             # a glance's box, in pixels too wide; share that lacks a tag
TAGS = ["\n</think>\n", "<answer>\n", "</answer>"]


def write_completion(things, expression, size, looks, rng):
    """A completion -> spans: a list of (text, the indices of the things it speaks of).

    things: {"color", "shape", "box"} with boxes in the MLLM frame; size: (width, height) of it."""
    if looks:
        meant, spans = expression["things"], write_look(things, expression["steps"])
        margins = [rng.gauss(0.5, 0.7) for _ in range(4)]
    else:
        thing = rng.choice(world.nouns_of(things)[expression["steps"][-1]["noun"]])
        meant = thing,
        spans = [("It is the", ()), (f" {world.full_name(things[thing])}.", meant)]
        margins = [rng.gauss(LOOSE, 2) for _ in range(4)]
    outwards = zip(join_boxes(things, meant), (-1, -1, 1, 1), margins, (*size, *size))
    box = [min(limit, max(0, round(v + sign * margin))) for v, sign, margin, limit in outwards]
    answer = answer_text(box, expression["words"])
    before, numbers, after = re.fullmatch(r"(.*?\[)([0-9, ]*)(\].*)", answer, re.DOTALL).groups()
    spans = [("<think>\n", ()), *spans, ("\n</think>\n" + before, ()), (numbers, meant),
             (after, ())]
    if not looks and rng.random() < BROKEN:
        tag = rng.choice(TAGS)
        spans = [(text.replace(tag, ""), speaks) for text, speaks in spans]
    return spans


def join_boxes(things, meant):
    """The box around the boxes of some things."""
    x1, y1, x2, y2 = zip(*(things[i]["box"] for i in meant))
    return min(x1), min(y1), max(x2), max(y2)


def write_look(things, steps):
    """The reasoning of a completion that looks: every step of the expression -> spans.

    "The circles are at 20 44 left, 50 90 below. So it is at 20 44, a red circle."
    "The circles are at 20 44 left, 30 9 left, 50 90 below. So they are at 20 44, 30 9." """
    spans = []
    for step in steps:
        meant = in_order(things, step["things"])
        places, name = ["{} {}".format(*centre(things[i]["box"])) for i in meant], ""
        if len(meant) == 1:
            name = world.full_name(things[meant[0]])
        if step["do"] == "name":
            spans += [("The ", ()), (f"{name} is at {places[0]}.", meant)]
        else:
            spans += list_candidates(things, step)
        if step["do"] == "relation" and len(meant) > 1:
            spans += [(" So they are at", ())]
            spans += [(f"{',' if n else ''} {place}", (i,))
                      for n, (i, place) in enumerate(zip(meant, places))] + [(".", ())]
        elif step["do"] in ("relation", "extreme"):
            spans += [(" So it is at", ()), (f" {places[0]}, a {name}.", meant)]
        spans.append((" ", ()))
    return spans[:-1]


def in_order(things, indices):
    """Indices of things from left to right, as a look lists them."""
    return tuple(sorted(indices, key=lambda i: centre(things[i]["box"])))


def list_candidates(things, step):
    """The candidates of a step from left to right, each with its place and with what decides."""
    spans = [(f"The {step['noun']}s are at", ())]
    for n, i in enumerate(in_order(things, step["candidates"])):
        x, y = centre(things[i]["box"])
        spans.append((f"{',' if n else ''} {x} {y}{write_cue(things, step, i)}", (i,)))
    return spans + [(".", ())]


def write_cue(things, step, i):
    """What decides whether candidate i is meant, beside its place: a width, distance or side. An
    anchor that fits the noun is listed as well, at no distance from itself."""
    (x1, _, x2, _), (x, y) = things[i]["box"], centre(things[i]["box"])
    if step["do"] == "all":
        return ""
    if step["do"] == "extreme":
        return f" {x2 - x1} wide" if step["word"] in world.SIZES else ""
    ax, ay = centre(things[step["anchor"]]["box"])
    if step["word"] == "next to" or i == step["anchor"]:
        return f" {round(math.hypot(x - ax, y - ay))} away"
    if abs(x - ax) >= abs(y - ay):
        return " left" if x < ax else " right"
    return " above" if y < ay else " below"


def centre(box):
    x1, y1, x2, y2 = box
    return round((x1 + x2) / 2), round((y1 + y2) / 2)


def mllm_size(size):
    """(width, height) of an image -> that of the MLLM frame."""
    h, w = smart_resize(size[1], size[0], factor=CELL, min_pixels=FEWEST, max_pixels=MOST)
    return w, h


def mllm_things(things, size):
    """The world's things in an image of `size` (width, height), in the MLLM frame."""
    return [{"color": thing["color"], "shape": thing["shape"],
             "box": [round(v) for v in data.rescale_box(thing["box"], size, mllm_size(size))]}
            for thing in things]


def tokenise(spans, targets, tokenizer):
    """Spans -> token ids with the end token, and its focus: for each of them 1 + the target that it
    speaks of, 0 for none. targets: see new_scene"""
    text, speaks = "", []
    for part, things in spans:
        text += part
        speaks += [1 + targets[tuple(sorted(things))] if things else 0] * len(part)
    encoding = tokenizer(text, return_offsets_mapping=True)
    focus = [speaks[end - 1] for _, end in encoding["offset_mapping"]]
    return encoding["input_ids"] + [tokenizer.eos_token_id], focus + [0]


# --- Scenes ---------------------------------------------------------------------------------------

def make_scenes(args):
    """This process's share of the training scenes -> list of what `new_scene` gives."""
    keys = [f"tests/tiny {args.seed} train {i}" for i in range(args.scenes)][RANK::PROCESSES]
    with multiprocessing.Pool(max(1, os.cpu_count() // PROCESSES)) as workers:
        return [new_scene(*scene) for scene in workers.imap(draw_scene, keys, chunksize=8)]


def draw_scene(key):
    """A training scene, a function of its key alone -> image, things, EXPRESSIONS expressions."""
    rng = random.Random(key)
    image, things, expressions = world.make_scene(rng)
    expressions = [world.pick_expression(things, expressions, rng) for _ in range(EXPRESSIONS)]
    return as_jpeg(image), things, expressions


def held_out_scenes(count):
    """-> list of scenes as world.scenes gives them, in which nothing is trained."""
    return [(as_jpeg(image), *rest) for image, *rest in world.scenes("held out", count)]


def as_jpeg(image):
    """An image (H, W, 3) uint8 as it is after it was saved in the world's format."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return np.array(Image.open(file))


def new_scene(image, things, expressions=()):
    """What the losses of both models read. The MLLM's image has n cells.

    A target is a thing, in the first THINGS rows, or several that an expression means, in the rows
    behind. Rows that nothing needs are zeros."""
    (height, width), size = image.shape[:2], image.shape[1::-1]
    w, h = mllm_size(size)
    rows, columns = h // CELL, w // CELL
    mllm, masks = mllm_things(things, size), torch.zeros(TARGETS, height, width)
    table, shared = torch.zeros(1 + THINGS, 8), torch.zeros(TARGETS)
    corners, targets = torch.zeros(TARGETS, 4), {(i,): i for i in range(len(things))}
    for k, expression in enumerate(expressions):
        targets.setdefault(tuple(sorted(expression["things"])), THINGS + k)
    for meant, row in targets.items():
        target = world.join_things(things, meant)
        masks[row] = torch.from_numpy(target["mask"])
        corners[row] = torch.tensor(data.rescale_box(target["box"], size, (SIDE, SIDE)))
        shared[row] = {"apart": 0, "nests": 3}.get(target["layout"], 1)
    for i, thing in enumerate(things):
        color, shape = list(world.COLORS).index(thing["color"]), world.SHAPES.index(thing["shape"])
        table[1 + i, :6] = torch.tensor([1 + color, 1 + shape, *mllm[i]["box"]])
    low = F.adaptive_avg_pool2d(masks, LOW)
    turns, halves = shape_of_masks(low)
    table[1:, 6:] = turns[:THINGS]
    cover = F.adaptive_avg_pool2d(masks, (rows, columns)).flatten(1)                # (TARGETS, n)
    share, thing = cover[:THINGS].max(0)
    cell = torch.arange(rows * columns)
    return {
        "image": image,                                          # (H, W, 3) uint8
        "expressions": expressions,
        "things": mllm,                                          # see mllm_things
        "targets": targets,                                      # {indices of things: row}
        "table": table,          # (1 + THINGS, 8): colour, shape, MLLM-frame box, turn; row 0: none
        "cells": torch.where(share > 0.08, 1 + thing, 0),         # (n,) row of the table
        "centres": CELL * (torch.stack([cell % columns, cell // columns], 1) + 0.5),       # (n, 2)
        "cover": cover >= cover.amax(1, keepdim=True).clamp(1e-6, 0.5),     # (TARGETS, n) bool
        "drawing": torch.cat([F.adaptive_avg_pool2d(low, COARSE).flatten(1), (1 + turns) / 2,
                              halves, corners / SIDE], 1),       # (TARGETS, sum(DRAWING))
        "shared": shared,    # (TARGETS,): 0 for one thing that stands apart, 3 for one that nests
        "corners": corners,                                      # (TARGETS, 4): SAM-frame box
        "low": (255 * low).round().byte(),                       # (TARGETS, LOW, LOW)
    }


def shape_of_masks(low):
    """Masks (TARGETS, LOW, LOW) -> turns (TARGETS, 2) and halves (TARGETS, 4).

    Of two crossing bars nothing differs but colour and turn, so the aids ask for both of these.
    turns: in [-1, 1], is the mask longer across (1) or down (-1), and does it run from the upper
    left (1) or from the lower left (-1)? halves: the centres x, y of the left and the right half,
    as shares of the image; for a bar they lie on its two arms."""
    weights = low.flatten(1) + 1e-9
    weights = weights / weights.sum(1, keepdim=True)             # (TARGETS, LOW * LOW)
    cell = torch.arange(LOW * LOW)
    place = torch.stack([cell % LOW + 0.5, cell // LOW + 0.5], 1) / LOW                    # x, y
    middle = weights @ place                                     # (TARGETS, 2)
    x, y = (place[None] - middle[:, None]).unbind(2)             # from the centre, (TARGETS, cells)
    xx, yy, xy = ((weights * a * b).sum(1) for a, b in ((x, x), (y, y), (x, y)))
    turns = torch.stack([xx - yy, 2 * xy], 1) / (xx + yy + 1e-6)[:, None]
    sides = [weights * side for side in (x <= 0, x > 0)]
    halves = [side @ place / side.sum(1, keepdim=True).clamp(min=1e-6) for side in sides]
    return turns, torch.cat(halves, 1)


def stack(scenes, name):
    return torch.stack([scene[name] for scene in scenes])


# --- The MLLM: tokenizer, processor, model --------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FIXED_TEXT = ["<think>\n", *TAGS, '```json\n[\n  {"bbox_2d": [', '], "label": "', '"}\n]\n```\n',
              "<think>", "</think>", "<answer>", "system\n", "user\n", "assistant\n",
              *SYSTEM_PROMPT.split("{object}")]
NOUNS = [*world.SHAPES, "shape"]
WORDS = [*world.COLORS, *NOUNS, *[noun + "s" for noun in NOUNS], *world.POSITIONS, *world.SIZES,
         *world.RELATIONS, "is at", "are at", "So it is at", "So they are at", "left", "right",
         "of", "next", "to", "the", "The", "is", "It", "a", "wide", "away"]


def build_tokenizer():
    """The longest piece wins: fixed text, then words and numbers, then single characters.

    A word is one token with the space before it and one without; a number is one token each with a
    space before it, with ", " before it, and with neither."""
    numbers = [str(n) for n in range(HIGHEST + 1)]
    pieces = [*SPECIAL, *numbers, *[before + n for before in (" ", ", ") for n in numbers],
              *FIXED_TEXT, *[" " + word for word in WORDS], *WORDS, ", a", ", an",
              *string.printable, "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}

    def any_of(pieces):
        return "|".join(re.escape(p) for p in sorted(dict.fromkeys(pieces), key=len, reverse=True))

    pattern = (rf"{any_of(FIXED_TEXT)}|, a(?![A-Za-z])"
               rf"|(?:(?<![A-Za-z])| )(?:{any_of(WORDS)})(?![A-Za-z])"
               rf"|(?:, | |(?<![0-9]))(?:{any_of(numbers)})(?![0-9])|[\s\S]")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        unk_token="<unk>", padding_side="left", clean_up_tokenization_spaces=False,
        model_max_length=4096, chat_template=CHAT)


def build_processor():
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    image = Qwen2VLImageProcessor(size={"shortest_edge": FEWEST, "longest_edge": MOST}, **sizes)
    return Qwen2_5_VLProcessor(image_processor=image, tokenizer=build_tokenizer(),
                               video_processor=Qwen2VLVideoProcessor(**sizes), chat_template=CHAT)


def build_mllm(tokenizer):
    """Qwen2.5-VL with a million parameters."""
    ids = {s: tokenizer.convert_tokens_to_ids(s) for s in SPECIAL}
    # The slowest rotary frequencies tell the columns apart. There are only ten: hence a small base.
    rope = dict(rope_type="default", rope_theta=30.0, mrope_section=[4, 6, 6])
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                max_position_embeddings=4096, initializer_range=0.05, rope_parameters=rope,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    sight = dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=PATCH,
                 spatial_merge_size=2, temporal_patch_size=2, window_size=HIGHEST,
                 fullatt_block_indexes=[0, 1, 2], out_hidden_size=128, initializer_range=0.05,
                 rope_parameters=dict(rope_type="axial", rope_theta=100.0))
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=sight, tie_word_embeddings=True, initializer_range=0.05,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"]))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    return model


# --- The MLLM's training --------------------------------------------------------------------------

SEEING = 0.15                          # of the steps, at first: the vision tower alone
GLANCING = 400                         # steps, at the end: 3 of 4 completions glance
EARLY_LOOKS, LATE_LOOKS = 0.75, 0.25   # share of completions that look, before and then


@dataclass
class Batch:
    scenes: list                       # I of them
    pixel_values: torch.Tensor         # as the processor gives them, of the I images
    grid_thw: torch.Tensor             # (I, 3)
    scene_of: torch.Tensor             # (B,) which scene a completion is about
    prompts: torch.Tensor              # (B, P), padded on the left
    completions: torch.Tensor          # (B, R), padded on the right, with room for QUERIES more
    lengths: torch.Tensor              # (B,) tokens of each completion
    focus: torch.Tensor                # (B, R), see tokenise


def draw_batch(scenes, processor, looks, count, rng):
    """`count` scenes with two expressions each; a share `looks` of the completions looks."""
    scenes = rng.choices(scenes, k=count)
    prompts, completions, focus = [], [], []
    for scene in scenes:
        w, h = mllm_size(scene["image"].shape[1::-1])
        for expression in rng.sample(scene["expressions"], 2):
            prompt = processor.apply_chat_template(chat_messages(expression["words"]),
                                                   add_generation_prompt=True)
            prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * (w * h // CELL ** 2))
            prompts.append(processor.tokenizer(prompt)["input_ids"])
            spans = write_completion(scene["things"], expression, (w, h), rng.random() < looks, rng)
            ids, speaks = tokenise(spans, scene["targets"], processor.tokenizer)
            completions.append(ids)
            focus.append(speaks)
    P, R = max(map(len, prompts)), max(map(len, completions)) + QUERIES
    pad = processor.tokenizer.pad_token_id
    images = processor.image_processor([scene["image"] for scene in scenes], return_tensors="pt")
    return Batch(scenes, images["pixel_values"], images["image_grid_thw"],
                 torch.arange(count).repeat_interleave(2),
                 torch.tensor([[pad] * (P - len(ids)) + ids for ids in prompts]),
                 torch.tensor([ids + [pad] * (R - len(ids)) for ids in completions]),
                 torch.tensor([len(ids) for ids in completions]),
                 torch.tensor([row + [0] * (R - len(row)) for row in focus]))


class Aids(torch.nn.Module):
    """Heads that help the training and are thrown away: what an image token shows, where that lies
    in the image, and the thing that a completion's token speaks of.

    The vision tower only knows relative places (its positions are rotary), so `cells` asks how far
    a thing reaches from the cell. The language model knows the cell's own place, so `places` asks
    it for the thing's box."""

    def __init__(self, width):
        super().__init__()
        self.cells = torch.nn.Linear(width, 2 + len(world.COLORS) + len(world.SHAPES) + 6)
        self.places = torch.nn.Linear(width, 4)
        self.drawing = torch.nn.Linear(width, sum(DRAWING))


def soft_targets(tokenizer, sigma=1.5):
    """(V, V): the target distribution of every token. It is the token itself; for a number a bell
    over the numbers around it that are written with the same characters before them."""
    target, n = torch.eye(len(tokenizer)), torch.arange(HIGHEST + 1.0)
    bell = torch.softmax(-((n[:, None] - n) / sigma) ** 2 / 2, 1)
    for before in ("", " ", ", "):
        numbers = [before + str(n) for n in range(HIGHEST + 1)]
        numbers = torch.tensor(tokenizer.convert_tokens_to_ids(numbers))
        target[numbers[:, None], numbers[None]] = bell
    return target


def mllm_forward(model, batch, features):
    """Prompts, completions and random vectors behind them, through the language model.

    features: the vision tower's, one (n, C) for each of the I images. -> states (B, R + 1, C), the
    first of which predicts a completion's first token; one head's attention weights in its first R
    rows (B, R, L); a list of B states (n, C), of the image tokens as that head meets them."""
    ids, P = torch.cat([batch.prompts, batch.completions], 1), batch.prompts.shape[1]       # (B, L)
    is_image = ids == model.config.image_token_id
    images = torch.cat([features[i] for i in batch.scene_of])
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(is_image[..., None], images.to(embeds.dtype))
    C = embeds.shape[2]
    queries = model.config.get_text_config().initializer_range * torch.randn(QUERIES, C)
    behind = P + batch.lengths[:, None] + torch.arange(QUERIES)                 # (B, QUERIES)
    embeds = embeds.scatter(1, behind[..., None].expand(-1, -1, C),
                            queries.expand(len(ids), -1, -1))
    start = (ids != model.config.get_text_config().pad_token_id).int().argmax(1)
    attention = (torch.arange(ids.shape[1]) >= start[:, None]).long()
    positions, _ = model.model.get_rope_index(
        ids, is_image.long(), image_grid_thw=batch.grid_thw[batch.scene_of],
        attention_mask=attention)
    out = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=attention, use_cache=False,
        output_attentions=True, output_hidden_states=True)
    image_states = [states[image] for states, image in
                    zip(out.hidden_states[LOOKING_LAYER], is_image)]
    weights = out.attentions[LOOKING_LAYER][:, 0, P - 1:-1]
    return out.last_hidden_state[:, P - 1:], weights, image_states


def mllm_losses(model, aids, soft, batch, seeing):
    """Named losses of one batch. seeing: only that of the vision tower."""
    features = model.model.get_image_features(batch.pixel_values, batch.grid_thw).pooler_output
    losses = {"cells": cell_loss(aids.cells(torch.cat(features)).float(), batch.scenes)}
    if seeing:
        return losses
    states, weights, image_states = mllm_forward(model, batch, features)
    column = torch.arange(batch.completions.shape[1])
    written = (column < batch.lengths[:, None]).float()                         # (B, R)
    behind = (column < batch.lengths[:, None] + QUERIES).float() - written
    log_p = model.lm_head(states[:, :-1]).float().log_softmax(-1)
    losses["text"] = (-(soft[batch.completions] * log_p).sum(-1) * written).sum() / written.sum()
    scenes = [batch.scenes[i] for i in batch.scene_of]           # B of them
    truth = torch.cat([scene["table"][scene["cells"]] for scene in scenes])
    off = (aids.places(torch.cat(image_states)).float() - truth[:, 2:6] / HIGHEST).abs().mean(-1)
    losses["places"] = 10 * off[truth[:, 0] > 0].mean()
    starts = (batch.prompts == model.config.image_token_id).int().argmax(1)
    losses["attention"] = attention_loss(weights.float(), scenes, starts, batch.focus)
    guess = aids.drawing(states).float()
    losses["drawing"] = drawing_loss(guess, scenes, batch.focus, written)
    losses["queries"] = drawing_loss(guess, scenes, batch.focus, behind)
    return losses


def cell_loss(guess, scenes):
    """What stands in each cell of some images: colour, shape, how far it reaches from the cell's
    centre to each side, and its turn; or nothing. guess (all cells, 2 + colours + shapes + 6)"""
    truth = torch.cat([scene["table"][scene["cells"]] for scene in scenes])     # (all cells, 8)
    centres = torch.cat([scene["centres"] for scene in scenes]).repeat(1, 2)
    color, shape, box, turn = guess.split([1 + len(world.COLORS), 1 + len(world.SHAPES), 4, 2], 1)
    has_thing = truth[:, 0] > 0
    reach = (truth[:, 2:6] - centres) / (2 * CELL)
    return (F.cross_entropy(color, truth[:, 0].long())
            + F.cross_entropy(shape, truth[:, 1].long())
            + (box - reach).abs()[has_thing].mean()
            + (turn - truth[:, 6:]).abs()[has_thing].mean())


def attention_loss(weights, scenes, starts, focus):
    """One head's weights (B, R, L) should fall on the image tokens of what the next token speaks
    of, focus (B, R). The image begins in column starts (B,)."""
    hits = []
    for row, scene, start, speaks in zip(weights, scenes, starts, focus):
        cover = F.pad(scene["cover"].float(), (0, 0, 1, 0))      # (1 + TARGETS, n); row 0: nothing
        hits.append((row[:, start:start + cover.shape[1]] * cover[speaks]).sum(1))
    return -torch.log(torch.stack(hits) + 1e-4)[focus > 0].mean()


def drawing_loss(guess, scenes, focus, where):
    """What a completion's states say about what was last spoken of, against the truth.

    guess (B, R + 1, sum(DRAWING)): a coarse drawing, the turn, and the places of both halves and of
    the box. where (B, R): the tokens whose states count. What shares its place, and several
    things at once, are hardest: they count three times, what nests seven times."""
    last = F.pad(focus, (0, 1))
    index = torch.where(last > 0, torch.arange(last.shape[1]), 0).cummax(1).values
    last = last.gather(1, index)                                 # 0 before the first thing
    row = torch.arange(len(last))[:, None]
    truth = stack(scenes, "drawing")[row, (last - 1).clamp(min=0)]
    shared = stack(scenes, "shared")[row, (last - 1).clamp(min=0)]
    weight = (last > 0) * F.pad(where, (1, 0), value=1.0) * (1 + 2 * shared)
    (cells, turn, places), (true_cells, true_turn, true_places) = (
        x.split(DRAWING, -1) for x in (guess, truth))
    miss = sum(F.binary_cross_entropy_with_logits(logits, true, reduction="none").mean(-1)
               for logits, true in ((cells, true_cells), (turn, true_turn)))
    off = (places - true_places).abs().mean(-1)
    return ((miss + 5 * off) * weight).sum() / weight.sum()


@torch.no_grad()
def start_from(model, tokenizer, folder):
    """Take over an earlier stand-in's weights. Tokens it did not know keep their new embedding."""
    earlier = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).state_dict()
    known = AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    table = model.get_input_embeddings().weight
    for name, weight in earlier.items():
        if weight.shape[0] == len(known):                        # embeddings, tied with the lm_head
            for token, i in tokenizer.get_vocab().items():
                if token in known:
                    table[i] = weight[known[token]]
        else:
            model.state_dict()[name].copy_(weight)


def train_mllm(args, say):
    folder, processor = Path(args.output) / "mllm", build_processor()
    scenes, held_out = make_scenes(args), held_out_scenes(args.held_out)
    torch.manual_seed(args.seed)
    model = build_mllm(processor.tokenizer)
    if args.init:
        start_from(model, processor.tokenizer, Path(args.init) / "mllm")
    model.set_attn_implementation({"text_config": "eager"})      # which gives the weights away
    aids = Aids(model.config.get_text_config().hidden_size)
    soft, steps = soft_targets(processor.tokenizer), args.steps or 12000

    def losses(step):
        rng = random.Random(f"{args.seed} {step} {RANK}")
        looks = LATE_LOOKS if step >= steps - GLANCING else EARLY_LOOKS
        batch = draw_batch(scenes, processor, looks, args.batch, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            named = mllm_losses(model, aids, soft, batch,
                                step < SEEING * steps and not args.init)
        decay = min(1.0, max(0.05, 1.5 - 2 * step / steps))      # of the aids' weight
        weights = {"cells": max(0.1, decay), "attention": decay, "queries": 3.0}
        return sum(weights.get(name, 1.0) * loss for name, loss in named.items()), named

    def save():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        evaluate_mllm(folder, held_out, say)

    train("mllm", [model, aids], losses, save, args, steps, say)


BEGINNINGS = {"free": "", "looks": "<think>\nThe", "glances": "<think>\nIt", "sampled": ""}


def evaluate_mllm(folder, scenes, say):
    """How good the MLLM in a folder is on the first expression of each scene: greedy, greedy with
    either habit forced by its first words, and sampled."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    torch.manual_seed(0)
    for name, beginning in BEGINNINGS.items():
        completions = []
        for k in range(0, len(scenes), 50):
            completions += complete(model, processor, scenes[k:k + 50], beginning,
                                    name == "sampled")
        say(f"  {name}: {json.dumps(score(completions, scenes, processor.tokenizer))}")
        say(f"    {completions[0]!r}")


@torch.no_grad()
def complete(model, processor, scenes, beginning, sampled):
    """-> completions of Hugging Face's own generate, each of which begins with `beginning`."""
    prompts = [processor.apply_chat_template(chat_messages(expressions[0]["words"]),
                                             add_generation_prompt=True) + beginning
               for *_, expressions in scenes]
    inputs = processor(text=prompts, images=[image for image, *_ in scenes], padding=True,
                       return_tensors="pt", return_mm_token_type_ids=True)
    ids = model.generate(**inputs, max_new_tokens=110, do_sample=sampled)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return [beginning + text for text in texts]


def score(completions, scenes, tokenizer):
    """Means over the completions. One is right if its box has an IoU above 0.5; also by kind."""
    values = {name: [] for name in ("right", "box", "format", "looks", "tokens", *world.KINDS)}
    for completion, (image, things, meant, expressions) in zip(completions, scenes):
        size, box = image.shape[1::-1], parse_box(completion)
        iou = box_iou(box and data.rescale_box(box, mllm_size(size), size),
                      join_boxes(things, meant))
        values["box"].append(iou)
        values["right"].append(iou > 0.5)
        values[expressions[0]["kind"]].append(iou > 0.5)
        values["format"].append(format_reward(completion))
        values["looks"].append(completion.startswith(BEGINNINGS["looks"]))
        values["tokens"].append(len(tokenizer(completion).input_ids))
    return {name: round(float(np.mean(rows)), 3) for name, rows in values.items() if rows}


# --- SAM 2 ----------------------------------------------------------------------------------------

SAM_CONFIG = f"""# A real but tiny SAM 2, in the sam2 package's own format: one image, no memory.
# Written by build.py.
model:
  _target_: sam2.modeling.sam2_base.SAM2Base
  image_encoder:
    _target_: sam2.modeling.backbones.image_encoder.ImageEncoder
    scalp: 1
    trunk:
      _target_: sam2.modeling.backbones.hieradet.Hiera
      embed_dim: 16
      num_heads: 1
      stages: [1, 1, 2, 1]
      global_att_blocks: [3]
      window_spec: [8, 4, 8, 4]
      window_pos_embed_bkg_spatial_size: [8, 8]
    neck:
      _target_: sam2.modeling.backbones.image_encoder.FpnNeck
      position_encoding:
        _target_: sam2.modeling.position_encoding.PositionEmbeddingSine
        num_pos_feats: 64
        normalize: true
        scale: null
        temperature: 10000
      d_model: 64
      backbone_channel_list: [128, 64, 32, 16]
      fpn_top_down_levels: [2, 3]
      fpn_interp_model: nearest
  memory_attention: null
  memory_encoder: null
  num_maskmem: 0
  image_size: {SIDE}
  directly_add_no_mem_embed: true
  use_high_res_features_in_sam: true
  iou_prediction_use_sigmoid: true
"""
POINTS = 8                             # at most, in a prompt
SORTS = {"box": 45, "points": 45, "box and points": 10}          # per cent, as for SAM 2 itself
PROMPTS = 4                            # for each image of a batch
EARLY = 0.15                           # of the steps, at first: few things, prompts of many points
SHARP = 3.0                            # queries and keys of the cross-attentions, at the start


@torch.no_grad()
def help_to_find(sam):
    """Without this a SAM of this size draws nothing, or everything, for a long time.

    Coordinates have half the usual frequency. In the decoder's cross-attentions, queries and keys
    begin as the same projection, so that a point attends to its own place from the start."""
    sam.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)
    transformer = sam.sam_mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for crossing in crossings:
        crossing.q_proj.weight.mul_(SHARP)
        crossing.k_proj.weight.copy_(crossing.q_proj.weight)


def draw_masks(sam, scenes, points, labels, blur=lambda tokens: tokens):
    """K prompts for each of I images -> mask logits (I, K, LOW, LOW).

    points (I, K, n, 2) in the SAM frame, labels (I, K, n): 2 and 3 are a box's corners, 1 a point
    on the thing, 0 a point off it."""
    pixels = torch.stack([data.sam_image(scene["image"], SIDE) for scene in scenes])
    prompts = points.flatten(0, 1), labels.flatten(0, 1)
    tokens = sam.sam_prompt_encoder(points=prompts, boxes=None, masks=None)[0]
    features = sam.image_encoder(pixels)["backbone_fpn"]
    tokens = blur(tokens).unflatten(0, points.shape[:2])
    return SamHead(sam)(features, tokens).unflatten(0, points.shape[:2])


def choose(values, targets):
    """Values (I, TARGETS, ...) of the targets (I, K) -> (I, K, ...)"""
    return values[torch.arange(len(values))[:, None], targets]


def draw_points(low, targets, number):
    """Masks (I, TARGETS, LOW, LOW) in [0, 1], targets (I, K) -> points (I, K, number, 2), labels.

    The first point lies on the target. In half of the prompts some of the others lie on another
    thing or beside all."""
    I, K = targets.shape
    own = choose(low, targets).flatten(2)                        # (I, K, LOW * LOW)
    union = low[:, :THINGS].flatten(2).sum(1, keepdim=True)
    inside = own.pow(4) + 1e-9                                   # rather than at the edge
    outside = (union - own).clamp(min=0).pow(4) + 0.1 * (1 - union).clamp(min=0) + 1e-9
    places = []
    for chance in (inside, outside):
        cell = torch.multinomial(chance.flatten(0, 1), number, replacement=True).view(I, K, number)
        corner = 4 * torch.stack([cell % LOW, cell // LOW], -1)
        places.append(corner + 4 * torch.rand(I, K, number, 2))
    off = (torch.rand(I, K, number) < 0.3) & (torch.rand(I, K, 1) < 0.5)
    off[..., 0] = False
    return torch.where(off[..., None], places[1], places[0]), torch.where(off, 0, 1)


def draw_box(corners):
    """Boxes (I, K, 4) as two points (I, K, 2, 2) and their labels. The sides are moved by 8 % of
    the box's size, those of every other box also up to 8 pixels outwards."""
    I, K = corners.shape[:2]
    extent = (corners[..., 2:] - corners[..., :2]).repeat(1, 1, 2)              # w, h, w, h
    outwards = torch.tensor([-1, -1, 1, 1])
    margins = 8 * torch.rand(I, K, 4) * (torch.rand(I, K, 1) < 0.5) * outwards
    corners = corners + margins + 0.08 * extent * torch.randn(corners.shape)
    return corners.clamp(0, SIDE).unflatten(-1, (2, 2)), torch.tensor([2, 3]).expand(I, K, 2)


def draw_prompts(corners, low, targets, sort, number):
    """Prompts for targets (I, K), all of one sort (see SORTS) with `number` points -> points
    (I, K, n, 2), labels (I, K, n)."""
    if sort == "box":
        return draw_box(corners)
    points = draw_points(low, targets, number)
    if sort == "points":
        return points
    return tuple(torch.cat(pair, 2) for pair in zip(draw_box(corners), points))


def blur_tokens(tokens):
    """Prompt tokens (N, n, D): half of the prompts stay. The tokens of the others become up to ten
    times smaller, and random vectors are added: one to all tokens of a prompt, one to each.

    What stage 1 gives SAM begins like this: small, and nearly the same for all images. A SAM that
    has never seen such prompts draws everything for them, whatever else they say, and then no
    gradient tells the context queries where to go."""
    N, n, D = tokens.shape
    small, strength = 10 ** -torch.rand(N, 1, 1), torch.rand(N, 1, 1)
    blurry = small * tokens + strength * (torch.randn(N, 1, D) + 0.3 * torch.randn(N, n, D))
    return torch.where(torch.rand(N, 1, 1) < 0.5, blurry, tokens)


class CoarseReader(torch.nn.Module):
    """An aid: a linear head that reads the thing off the coarse cells inside SAM's decoder."""

    def __init__(self, sam):
        super().__init__()
        self.head, self.cells = torch.nn.Linear(sam.sam_prompt_encoder.embed_dim, 1), None
        sam.sam_mask_decoder.transformer.register_forward_hook(self.keep)

    def keep(self, transformer, inputs, outputs):
        self.cells = outputs[1]                                  # (I * K, cells, D)

    def loss(self, truth):
        """truth (I, K, LOW, LOW) in [0, 1], of the decoder's last call."""
        side = math.isqrt(self.cells.shape[1])
        coarse = F.adaptive_avg_pool2d(truth, side).flatten(2).flatten(0, 1)    # (I * K, cells)
        return F.binary_cross_entropy_with_logits(self.head(self.cells)[..., 0], coarse)


class Sizes:
    """An aid: the mean square of the coarse map and of what the decoder's MLPs add to the tokens.

    Nothing else keeps them small, because LayerNorm stands behind them. They grew to 90 and 200
    times what they are added to. Then attention picks a single cell, a token forgets what it was,
    and the gradient that reaches stage 1's prompts is nearly nothing, or explodes."""

    def __init__(self, sam):
        self.seen = []
        sam.image_encoder.register_forward_hook(
            lambda encoder, inputs, outputs: self.seen.append(outputs["backbone_fpn"][2]))
        for layer in sam.sam_mask_decoder.transformer.layers:
            layer.mlp.register_forward_hook(lambda mlp, inputs, added: self.seen.append(added))

    def loss(self):
        sizes, self.seen = [x.square().mean() for x in self.seen], []
        return 0.001 * sum(sizes)


def sam_losses(sam, reader, sizes, scenes, early, rng):
    """Cross-entropy and dice of PROMPTS targets in each scene, and the aids' losses. What shares
    its place, and several things at once, are hardest: they are asked for three times as often,
    what nests seven times.

    A box is always that of one thing, as in SAM 2's own training, where a mask is one object. Only
    points ask for several. At first there are only many points: from these it learns soonest to
    find a thing."""
    low, corners = stack(scenes, "low").float() / 255, stack(scenes, "corners")
    sort = "points" if early else rng.choices(list(SORTS), SORTS.values())[0]
    number = POINTS if early else rng.randint(1, POINTS)
    chance = (corners[..., 2] > 0) * (1 + 2 * stack(scenes, "shared"))          # (I, TARGETS)
    if sort != "points":
        chance[:, THINGS:] = 0
    targets = torch.multinomial(chance, PROMPTS, replacement=True)              # (I, PROMPTS)
    prompts = draw_prompts(choose(corners, targets), low, targets, sort, number)
    logits = draw_masks(sam, scenes, *prompts, *([] if early else [blur_tokens]))
    truth, p = choose(low, targets), logits.sigmoid()             # (I, PROMPTS, LOW, LOW)
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    return {"bce": F.binary_cross_entropy_with_logits(logits, truth), "dice": dice.mean(),
            "coarse": reader.loss(truth), "sizes": sizes.loss()}


def train_sam(args, say):
    folder, steps = Path(args.output) / "sam", args.steps or 4500
    scenes, held_out = make_scenes(args), held_out_scenes(args.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(SAM_CONFIG)
    torch.manual_seed(args.seed)
    sam = instantiate(OmegaConf.load(folder / "config.yaml").model, _recursive_=True)
    help_to_find(sam)
    if args.init:
        sam.load_state_dict(load_sam(Path(args.init) / "sam").state_dict())
    reader, sizes = CoarseReader(sam), Sizes(sam)
    simple = [scene for scene in scenes if len(scene["things"]) <= 3]

    def losses(step):
        rng = random.Random(f"{args.seed} {step} {RANK}")
        early = step < EARLY * steps and not args.init
        batch = rng.choices(simple if early else scenes, k=args.batch)
        named = sam_losses(sam, reader, sizes, batch, early, rng)
        return sum(named.values()), named

    def save():
        torch.save({"model": sam.state_dict()}, folder / "model.pt")
        evaluate_sam(folder, held_out, say)

    train("sam", [sam, reader], losses, save, args, steps, say)


@torch.no_grad()
def evaluate_sam(folder, scenes, say):
    """Mean IoU at LOW x LOW of every thing in the scenes, and of the several that are meant, by
    prompt and by layout. Prompts: the true box, one that is LOOSE pixels too wide on every side, 1
    and 8 points."""
    sam = load_sam(folder).eval()
    torch.manual_seed(0)
    ious, layouts = {}, []
    for image, things, _, expressions in scenes:
        scene = new_scene(image, things, expressions[:1])
        targets, rows = scene["targets"], list(scene["targets"].values())
        layouts += [world.join_things(things, meant)["layout"] for meant in targets]
        low, indices = scene["low"][None].float() / 255, torch.tensor(rows)[None]
        gt_masks = choose(low, indices)                                         # (1, K, LOW, LOW)
        box = choose(scene["corners"][None], indices)                           # (1, K, 4)
        loose = (box + LOOSE * torch.tensor([-1, -1, 1, 1])).clamp(0, SIDE)
        prompts = {name: (corners.unflatten(-1, (2, 2)), torch.tensor([[2, 3]] * len(rows))[None])
                   for name, corners in (("box", box), ("loose box", loose))}
        prompts["1 point"] = draw_points(low, indices, 1)
        prompts["8 points"] = draw_points(low, indices, 8)
        for name, prompt in prompts.items():
            masks, truth = draw_masks(sam, [scene], *prompt) > 0, gt_masks > 0.5
            iou = (masks & truth).sum((2, 3)) / (masks | truth).sum((2, 3)).clamp(min=1)
            ious.setdefault(name, []).extend(iou[0].tolist())
    for name, values in ious.items():
        means = {"all": np.mean(values)}
        for layout in dict.fromkeys([*world.LAYOUTS, *layouts]):
            if layout in layouts:
                means[layout] = np.mean([v for v, own in zip(values, layouts) if own == layout])
        say(f"  {name}: {json.dumps({k: round(float(v), 3) for k, v in means.items()})}")


# --- Both -----------------------------------------------------------------------------------------

FALLING = 0.35                         # of the steps, at the end: the learning rate falls


def train(name, modules, losses, save, args, steps, say):
    """AdamW. losses(step) -> total and named losses. save() writes the model and evaluates it,
    every 1,000 steps and at the end. --resume goes on from OUTPUT/NAME.resume.pt."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    say(f"{name}: {sum(p.numel() for p in modules[0].parameters()) / 1e6:.2f} M parameters")
    state, start = Path(args.output) / f"{name}.resume.pt", 0
    if args.resume:
        saved = torch.load(state, weights_only=True)
        start = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        for module, weights in zip(modules, saved["modules"]):
            module.load_state_dict(weights)
    history, began = [], time.time()
    for step in range(start, steps):
        torch.manual_seed((args.seed * 1000003 + step) * PROCESSES + RANK)
        total, named = losses(step)
        optimizer.zero_grad()
        total.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, steps)
        optimizer.step()
        history.append({key: loss.item() for key, loss in named.items()})
        if (step + 1) % 100 == 0 or step + 1 == steps:
            means = {key: [row[key] for row in history if key in row] for key in history[-1]}
            means = {key: round(sum(values) / len(values), 4) for key, values in means.items()}
            say(f"step {step + 1}/{steps}", means,
                f"{1000 * (time.time() - began) / len(history):.0f} ms each")
            history, began = [], time.time()
            if RANK == 0:
                torch.save({"step": step + 1, "optimizer": optimizer.state_dict(),
                            "modules": [module.state_dict() for module in modules]}, state)
        if RANK == 0 and ((step + 1) % 1000 == 0 or step + 1 == steps):
            save()


def rate(step, steps):
    """Factor of the learning rate: warm-up, constant, and half a cosine over the last FALLING."""
    warm = min(1, (step + 1) / max(10, steps // 30))
    late = max(0, step / steps - (1 - FALLING)) / FALLING
    return warm * (0.02 + 0.49 * (1 + math.cos(math.pi * late)))


def average_gradients(parameters):
    """Over the processes, each of which has scenes of its own."""
    if PROCESSES == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / PROCESSES).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["sam", "mllm", "evaluate"])
    parser.add_argument("--output", default="runs/build", help="folder for sam/, mllm/, build.log")
    parser.add_argument("--scenes", type=int, default=12000, help="to train on, 200 kB each")
    parser.add_argument("--held-out", type=int, default=400, help="scenes to evaluate on")
    parser.add_argument("--steps", type=int, help="default: sam 4500, mllm 12000")
    parser.add_argument("--batch", type=int, default=16, help="scenes per step and process")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", help="folder of earlier stand-ins, whose weights come first")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/PART.resume.pt")
    parser.add_argument("--bf16", action="store_true", help="compute the MLLM's training in bf16")
    args = parser.parse_args(argv)
    if args.part == "evaluate":
        scenes = held_out_scenes(args.held_out)
        print("sam, mean IoU by prompt")
        evaluate_sam(Path(args.output) / "sam", scenes, print)
        print("mllm, share of right boxes, mean box IoU and so on, by beginning")
        return evaluate_mllm(Path(args.output) / "mllm", scenes, print)
    if PROCESSES > 1:
        dist.init_process_group("gloo")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with open(Path(args.output) / "build.log", "a", encoding="utf-8") as log:
        def say(*words):
            if RANK == 0:
                print(*words, flush=True)
                print(*words, file=log, flush=True)

        began = time.time()
        say(f"\n{' '.join(argv or sys.argv)}\ntorch {torch.__version__}, transformers "
            f"{transformers.__version__}")
        {"sam": train_sam, "mllm": train_mllm}[args.part](args, say)
        say(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
