"""The laptop's stand-ins: a tiny Qwen2.5-VL and a tiny SAM 2, trained on the shapes world.

    python tests/tiny/build.py all              # both parts: what is committed
    python tests/tiny/build.py mllm             # the language model alone
    python tests/tiny/build.py sam              # the mask model alone

Stage 1 and 2 of the method start from public models of billions of parameters. These two stand in
for them so that every script can be run whole on a laptop. They are laid out as the real ones are,
and no script treats them apart:

    OUTPUT/mllm     a Hugging Face folder: Qwen2_5_VLForConditionalGeneration, tokenizer, processor
    OUTPUT/sam      config.yaml, as the sam2 package writes its own, and model.pt
    OUTPUT/build.log    what both parts printed; appended to

An hour of one core for SAM, two of one core for the MLLM; several processes share its batches:
    torchrun --nproc_per_node=2 tests/tiny/build.py mllm --bf16 --scenes 12000
The committed ones were made in several calls, as the trials went on (build.log, docs/world.md); the
commands above, which do the same in one each, were not run whole.

Nothing learns from the world that world.py writes: scenes come from the same generator with seeds
of their own. The same seed on the same machine gives the same weights.

What is arranged on purpose, and has to be said wherever results of these models are shown. The MLLM
learned two habits of answering, as public models have seen both (see `answer_of`):

    glance      three texts in four. "It is the red circle.": any thing that fits the noun, its box
                drawn 5 +- 2 px too wide on every side, and in one of seven a tag is missing.
    look        one in four. Every step spelled out, each thing with its place; the box is tight.

Greedy, it glances. It has learned to look and seldom does.

What differs from the real models.
    Tokens      whole numbers are one token each (Qwen writes digit by digit), and the fixed text of
                the prompt and of the answer is a few long tokens. Any printable ASCII still goes
                through, character by character at worst; other characters become <unk>.
    Training    aids, none kept: soft labels on numbers (a near miss is nearly right), a head
                that reads colour, shape and box off the picture tokens, one attention head told to
                look at the thing that is spoken of, a head that draws that thing coarsely from the
                last states, also those of random vectors behind the answer, since that is what
                queries are in stage 1; the vision tower learns alone at first; and three in four
                texts look nearly to the end of the training.
    SAM 2       no memory, and only its single-mask output is trained: never ask it for three masks.
                It also learned to read blurred prompts (`blur_tokens`), as stage 1 begins with.
"""
import argparse
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import string
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2.functional as vision
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoProcessor, GenerationConfig, PreTrainedTokenizerFast,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor,
                          Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import data
import world
from model import forbidden_tokens, generate, prompt_positions
from rewards import (SYSTEM_PROMPT, answer_text, box_iou, chat_messages, format_reward,
                     parse_box)

PATCH = 8
CELL = 2 * PATCH                       # pixels of a picture token's side: 2 x 2 patches are merged
FEWEST, MOST = 150 ** 2, 163 ** 2      # pixels of the MLLM's picture: about a hundred tokens
HIGHEST = 240                          # the largest number that is one token; no side is longer
THINGS = world.MOST                    # at most, in a scene
EXPRESSIONS = 6                        # drawn per training scene
SIDE = 192                             # of SAM's square picture
SHARP = 3.0                            # of queries and keys at the start (docs/world.md)
LOW = SIDE // 4                        # of its masks
COARSE = 16                            # of the coarse drawing, an aid of the training
DRAWN = COARSE ** 2, 2, 8              # what that aid tells: cells; turn; halves and box
LOOSE, BROKEN = 5.0, 1 / 7             # of a glance: pixels too wide; share that lacks a tag
LOOKING_LAYER = 2                      # whose first head is told where to look
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUERIES = 8                            # random tokens behind each answer of the training
LATE = 0.35                            # of the training, at its end: the rate falls
GLANCING = 0.04                        # of the training, at its end: three in four glance

# --------------------------------------------------------------------------------------------------
# Tokenizer and processor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TAGS = ["\n</think>\n", "<answer>\n", "</answer>"]               # what a broken answer lacks one of
LAYOUT = ["<think>\n", *TAGS, '```json\n[\n  {"bbox_2d": [', '], "label": "', '"}\n]\n```\n',
          "<think>", "</think>", "<answer>", "system\n", "user\n", "assistant\n",
          *SYSTEM_PROMPT.split("{object}")]
SAYINGS = ["is at", "are at", "So it is at"]


def plural(shape):
    return shape + "s"


def build_tokenizer():
    """Longest piece first: fixed text, then words and numbers, then single characters.

    A word is a token with the space before it and without; a number with a space, with ", " or with
    neither before it."""
    words = [*world.COLORS, *world.SHAPES, "shape", *map(plural, [*world.SHAPES, "shape"]),
             *world.POSITIONS, *world.SIZES, *world.RELATIONS, *SAYINGS,
             "left", "right", "of", "next", "to", "the", "The", "is", "It", "a", "wide", "away"]
    numbers = [str(n) for n in range(HIGHEST + 1)]
    spaced = [before + n for before in (" ", ", ") for n in numbers]
    pieces = [*SPECIAL, *numbers, *spaced, *LAYOUT, *[" " + w for w in words], *words, ", a",
              ", an", *string.printable, "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}

    def either(pieces):
        return "|".join(re.escape(p) for p in sorted(dict.fromkeys(pieces), key=len, reverse=True))

    pattern = (rf"{either(LAYOUT)}|, a(?![A-Za-z])"
               rf"|(?:(?<![A-Za-z])| )(?:{either(words)})(?![A-Za-z])"
               rf"|(?:, | |(?<![0-9]))(?:{either(numbers)})(?![0-9])|[\s\S]")
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
    video = Qwen2VLVideoProcessor(**sizes)
    return Qwen2_5_VLProcessor(image_processor=image, tokenizer=build_tokenizer(),
                               video_processor=video, chat_template=CHAT)


# --------------------------------------------------------------------------------------------------
# Scenes, made by all cores

def pool(masks, rows, columns):
    """(THINGS, H, W) bool -> (THINGS, rows, columns) float: how much of each cell is covered."""
    return F.adaptive_avg_pool2d(torch.from_numpy(masks)[None].float(), (rows, columns))[0].numpy()


def make_scene(key, full=False):
    """One scene, a function of its key alone -> arrays, and EXPRESSIONS of world.py's.

    h, w: the MLLM's picture, in pixels; rows, columns: its cells. Boxes are in its frame."""
    rng = random.Random(key)
    picked = []
    while len(picked) < EXPRESSIONS:
        picture, things, found = world.make_scene(rng)
        picked = [world.pick_expression(things, found, rng) for _ in range(EXPRESSIONS)]
        picked = [f for f in picked if f]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)      # as the world's pictures are kept
    image = Image.open(file)
    height, width = picture.shape[:2]
    h, w = smart_resize(height, width, factor=CELL, min_pixels=FEWEST, max_pixels=MOST)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    seen = vision.resize(pixels, [h, w], vision.InterpolationMode.BICUBIC, antialias=True)
    square = F.interpolate(pixels[None].float(), (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    masks = np.zeros((THINGS, height, width), bool)
    table = np.zeros((THINGS + 1, 6), np.int16)
    corners, shared = np.zeros((THINGS, 4), np.float32), np.zeros(THINGS, np.float32)
    for i, thing in enumerate(things):
        masks[i] = thing["mask"]
        box = data.rescale_box(thing["box"], (width, height), (w, h))
        color, shape = list(world.COLORS).index(thing["color"]), world.SHAPES.index(thing["shape"])
        table[i + 1] = (1 + color, 1 + shape, *(round(v) for v in box))
        shared[i] = thing["layout"] != "apart"
        corners[i] = data.rescale_box(thing["box"], (width, height), (SIDE, SIDE))
    cover = pool(masks, h // CELL, w // CELL).reshape(THINGS, -1)
    most = np.minimum(0.5, cover.max(1, keepdims=True)).clip(1e-6)
    scene = {"picture": seen.permute(1, 2, 0).numpy(),                    # (h, w, 3) uint8
             "square": square.round().byte().permute(1, 2, 0).numpy(),    # (SIDE, SIDE, 3) uint8
             "table": table,              # (THINGS + 1, 6): colour, shape, box; row 0 is nothing
             "corners": corners,          # (THINGS, 4): boxes in SAM's frame
             "shared": shared,            # (THINGS,): does it share its place with another?
             "cells": np.where(cover.max(0) > 0.08, 1 + cover.argmax(0), 0).astype(np.uint8),
             "cover": cover >= most,      # (THINGS, rows * columns)
             "low": (255 * pool(masks, LOW, LOW)).round().astype(np.uint8)}     # (THINGS, LOW, LOW)
    whole = {"image": image.convert("RGB"), "masks": masks, "things": things}
    return scene, picked, whole if full else None


def make_scenes(count, name, full=False, cache=None):
    """-> a list of `count` (arrays, expressions, the whole scene where asked for). cache: a folder
    that keeps them (our own pickles: never read one that somebody else has written)."""
    file = Path(cache or ".") / f"{name} {count} {SIDE}.pickle"
    if cache and file.exists():
        with file.open("rb") as stream:
            return pickle.load(stream)
    with multiprocessing.Pool() as workers:
        keys = [f"tests/tiny {name} {i}" for i in range(count)]
        scenes = list(workers.imap(functools.partial(make_scene, full=full), keys, chunksize=32))
    if cache:
        Path(cache).mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(scenes))
    return scenes


MLLM_READS = ("picture", "table", "cells", "cover", "low", "shared", "corners")
SAM_READS = ("square", "table", "corners", "shared", "low")


def stack(scenes, names):
    """A list of scenes of one size -> dict of tensors (count, ...)."""
    return {k: torch.from_numpy(np.stack([arrays[k] for arrays, *_ in scenes])) for k in names}


# --------------------------------------------------------------------------------------------------
# What the MLLM learns to say

def place(table, i):
    """Thing i's centre, in the MLLM's frame."""
    _, _, x1, y1, x2, y2 = table[1 + i]
    return round((x1 + x2) / 2), round((y1 + y2) / 2)


def name_of(table, i):
    color, shape = table[1 + i][:2]
    return f"{list(world.COLORS)[color - 1]} {world.SHAPES[shape - 1]}"


def say_place(table, i):
    return "{} {}".format(*place(table, i))


def look_of(table, steps):
    """The reasoning of an answer that looks -> list of (text, thing spoken of, or None)."""
    said = []
    for step in steps:
        if step["do"] == "name":
            i = step["thing"]
            said += [("The ", None), (f"{name_of(table, i)} is at {say_place(table, i)}.", i)]
        else:
            i = step["thing"]
            said += list_candidates(table, step)
            said += [(" So it is at", None), (f" {say_place(table, i)}, a {name_of(table, i)}.", i)]
        said.append((" ", None))
    return said[:-1]


def list_candidates(table, step):
    """"The circles are at 20 44 left, 50 90 below.": from left to right, each with what decides."""
    color, _, shape = step["noun"].rpartition(" ")
    said = [(f"The {color + ' ' if color else ''}{plural(shape)} are at", None)]
    among = sorted(step["among"], key=lambda i: place(table, i))
    for n, i in enumerate(among):
        said.append((f"{',' if n else ''} {say_place(table, i)}{say_cue(table, step, i)}", i))
    return said + [(".", None)]


def say_cue(table, step, i):
    """What decides whether thing i is meant, beside its place."""
    if step["do"] == "extreme":
        return f" {table[1 + i][4] - table[1 + i][2]} wide" if step["word"] in world.SIZES else ""
    (ax, ay), (x, y) = place(table, step["anchor"]), place(table, i)
    if step["word"] == "next to":
        return f" {round(math.hypot(x - ax, y - ay))} away"
    if abs(x - ax) >= abs(y - ay):
        return " left" if x < ax else " right"
    return " above" if y < ay else " below"


def fitting(table, noun):
    """The things that a noun fits: "shape", "circle", "red shape", "red circle"."""
    there = [i for i in range(THINGS) if table[1 + i][0]]
    words = set(noun.split()) - {"shape"}
    return [i for i in there if words <= set(name_of(table, i).split())]


def widen(box, amounts, limits):
    """Every side outwards by its amount of pixels, within the picture of (width, height)."""
    moved = [round(v + sign * a) for v, sign, a in zip(box, (-1, -1, 1, 1), amounts)]
    return [min(limit, max(0, v)) for v, limit in zip(moved, (*limits, *limits))]


def answer_of(table, expression, limits, looks, rng):
    """One answer -> list of (text, thing spoken of, or None). limits: the picture's (w, h)."""
    if looks:
        thing, said = expression["thing"], look_of(table, expression["steps"])
        box = widen(table[1 + thing][2:], [rng.gauss(0.5, 0.7) for _ in range(4)], limits)
    else:
        thing = rng.choice(fitting(table, expression["steps"][-1]["noun"]))
        said = [("It is the", None), (f" {name_of(table, thing)}.", thing)]
        box = widen(table[1 + thing][2:], [rng.gauss(LOOSE, 2) for _ in range(4)], limits)
    answer = answer_text(box, expression["text"])
    before, numbers, after = re.fullmatch(r"(.*?\[)([0-9, ]*)(\].*)", answer, re.DOTALL).groups()
    said = [("<think>\n", None), *said, ("\n</think>\n" + before, None), (numbers, thing),
            (after, None)]
    if not looks and rng.random() < BROKEN:
        tag = rng.choice(TAGS)
        said = [(text.replace(tag, ""), spoken) for text, spoken in said]
    return said


def pad(rows, value, left=False):
    """Lists of ids -> (N, longest) int16."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows)], dtype=torch.int16)


def tokenise(said, tokenizer):
    """(text, thing) pairs -> token ids and, as many, 1 + the thing each speaks of (0: none)."""
    text, spoken = "", []
    for part, thing in said:
        text += part
        spoken += [0 if thing is None else 1 + thing] * len(part)
    encoded = tokenizer(text, return_offsets_mapping=True)
    focus = [spoken[end - 1] for _, end in encoded["offset_mapping"]]
    return encoded["input_ids"] + [tokenizer.eos_token_id], focus + [0]


def make_samples(scenes, processor, name):
    """Scenes of one size -> prompts and answers to each of their expressions, tokenised.

    prompts (count, EXPRESSIONS, P) padded on the left; for "look" and "glance": answers (count,
    EXPRESSIONS, R) padded on the right and what each token speaks of, as large."""
    rng, tokenizer = random.Random(f"tests/tiny answers {name}"), processor.tokenizer
    height, width = scenes[0][0]["picture"].shape[:2]
    image, pieces = "<|image_pad|>", height * width // CELL ** 2
    made = {"prompts": [], "look": [], "look focus": [], "glance": [], "glance focus": []}
    for arrays, picked, _ in scenes:
        table = arrays["table"].tolist()
        for expression in picked:
            prompt = processor.apply_chat_template(chat_messages(expression["text"]),
                                                   add_generation_prompt=True)
            made["prompts"].append(tokenizer(prompt.replace(image, image * pieces))["input_ids"])
            for habit in ("look", "glance"):
                said = answer_of(table, expression, (width, height), habit == "look", rng)
                ids, focus = tokenise(said, tokenizer)
                made[habit].append(ids)
                made[habit + " focus"].append(focus)
    padding = tokenizer.pad_token_id
    for k, rows in made.items():
        padded = pad(rows, 0 if "focus" in k else padding, k == "prompts")
        made[k] = padded.unflatten(0, (-1, EXPRESSIONS))
    return made


# --------------------------------------------------------------------------------------------------
# The MLLM. Hugging Face's own forward takes pictures one by one; here all of a step are alike, so
# it takes them at once. check_forward holds what follows against the original.

def build_mllm(tokenizer):
    """Qwen2.5-VL with one million parameters."""
    ids = {s: tokenizer.convert_tokens_to_ids(s) for s in SPECIAL}
    # the slowest frequencies tell the columns, of which there are ten: so a small base
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


def patchify(pictures, image_processor):
    """(B, h, w, 3) uint8 -> (B, patches, 3 * 2 * PATCH^2), in the processor's order: 2 x 2 patches,
    then on along the row of cells."""
    mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std])
    x = (pictures.float() / 255 - mean) / std
    x = x.unflatten(1, (-1, 2, PATCH)).unflatten(4, (-1, 2, PATCH))
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)            # (B, rows, columns, 2, 2, 3, PATCH, PATCH)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, PATCH, PATCH)
    return x.reshape(len(pictures), -1, 6 * PATCH ** 2)


def see(visual, patches, columns):
    """The vision tower on B pictures of one size: (B, patches, D) -> (B, cells, C)."""
    index = torch.arange(patches.shape[1])
    cell, inner = index // 4, index % 4
    places = torch.stack([cell // columns * 2 + inner // 2, cell % columns * 2 + inner % 2], 1)
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(x, places)
    for block in visual.blocks:
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)       # (B, patches, heads, d)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2).to(v.dtype) for t in (q, k, v)))
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).unflatten(0, (len(patches), -1))


def rope_positions(ids, first, start, rows, columns):
    """3-D M-RoPE positions: texts begin at column `first`, their pictures at column `start`, both
    (B,) -> (3, B, L).

    Text counts on; the picture's tokens share one time and spread over rows and columns; text after
    it goes on from the largest of the three."""
    column, first, start = torch.arange(ids.shape[1])[None], first[:, None], start[:, None]
    k = column - start
    inside = (k >= 0) & (k < rows * columns)
    saved = rows * columns - max(rows, columns)
    text = (column - first - (k >= rows * columns) * saved).clamp(min=0)
    offsets = (torch.zeros_like(k), k // columns, k % columns)
    return torch.stack([torch.where(inside, start - first + offset, text) for offset in offsets])


def forward(model, prompts, answers, features, columns, attentions=False, queries=None):
    """(B, P), (B, R), (B, cells, C) -> the states (B, R + 1, C) from the one that predicts an
    answer's first token to the one at its last; one head's weights in the first R rows, (B, R, L);
    the column where each picture starts (B,); the pictures' states (B, cells, C) as that head
    meets them. With attentions=False two of them are None."""
    ids, P = torch.cat([prompts, answers], 1), prompts.shape[1]                         # (B, L)
    is_picture = ids == model.config.image_token_id
    first = (prompts != model.config.get_text_config().pad_token_id).int().argmax(1)
    start = is_picture.int().argmax(1)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(is_picture[..., None], features.to(embeds.dtype))
    if queries is not None:                                      # (K, C), behind every answer
        behind = P + ended(answers, model)[:, None] + torch.arange(len(queries))       # (B, K)
        embeds = embeds.scatter(1, behind[..., None].expand(-1, -1, embeds.shape[2]),
                                queries.to(embeds.dtype).expand(len(ids), -1, -1))
    column = torch.arange(ids.shape[1])
    allowed = (column >= first[:, None, None]) & (column <= column[:, None])            # (B, L, L)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]
    position = rope_positions(ids, first, start, features.shape[1] // columns, columns)
    out = model.model.language_model(
        inputs_embeds=embeds, position_ids=position, attention_mask=mask, use_cache=False,
        output_attentions=attentions, output_hidden_states=attentions)
    weights, shown = None, None
    if attentions:
        weights = out.attentions[LOOKING_LAYER][:, 0, P - 1:-1]
        shown = out.hidden_states[LOOKING_LAYER][is_picture].view(*features.shape)
    return out.last_hidden_state[:, P - 1:], weights, start, shown


def ended(answers, model):
    """Answers (B, R), padded on the right -> the tokens of each, (B,)."""
    return (answers != model.config.get_text_config().pad_token_id).sum(1)


def soft_targets(tokenizer, sigma=1.5):
    """(V, V): the target distribution for every token. Itself; for a number, a bell over the
    numbers around it that are written as it is."""
    target, n = torch.eye(len(tokenizer)), torch.arange(HIGHEST + 1.0)
    bell = torch.softmax(-((n[:, None] - n) / sigma) ** 2 / 2, 1)
    for before in ("", " ", ", "):
        numbers = [before + str(n) for n in range(HIGHEST + 1)]
        numbers = torch.tensor(tokenizer.convert_tokens_to_ids(numbers))
        target[numbers[:, None], numbers[None]] = bell
    return target


class Aids(torch.nn.Module):
    """Heads that help the training and are thrown away: what a picture token shows, where that
    stands in the picture, and what an answer's state speaks of. The vision tower knows relative
    places alone (its rotary positions), so it says how far a thing reaches from the cell; the
    language model knows the cell's own place, from the text before the picture."""

    def __init__(self, width):
        super().__init__()
        self.cells = torch.nn.Linear(width, 2 + len(world.COLORS) + len(world.SHAPES) + 6)
        self.places = torch.nn.Linear(width, 4)
        self.drawing = torch.nn.Linear(width, sum(DRAWN))


def mllm_losses(model, aids, soft, group, prompts, answers, focus, scene, processor):
    """Named losses of one batch of B answers about pictures of one size; scene (B,) says which."""
    rows, columns = (n // CELL for n in group["picture"].shape[1:3])
    distinct, which = scene.unique(return_inverse=True)
    if "seen" in group:
        seen = group["seen"][distinct]
    else:
        patches = patchify(group["picture"][distinct], processor.image_processor)
        seen = see(model.model.visual, patches, columns)
    answers, focus = F.pad(answers, (0, QUERIES)), F.pad(focus, (0, QUERIES))
    text = model.config.get_text_config()
    queries = text.initializer_range * torch.randn(QUERIES, text.hidden_size)
    states, weights, start, shown = forward(model, prompts, answers, seen[which], columns, True,
                                            queries)
    column, length = torch.arange(answers.shape[1]), ended(answers, model)[:, None]
    counts = (column < length).float()                                                  # (B, R)
    log_p = model.lm_head(states[:, :-1]).float().log_softmax(-1)
    losses = {"text": (-(soft[answers] * log_p).sum(-1) * counts).sum() / counts.sum()}
    if "seen" not in group:
        losses["cells"] = cell_loss(aids.cells(seen).float(), group, distinct)
    truth = of_cells(group, scene)
    miss = (aids.places(shown).float() - truth[..., 2:] / HIGHEST).abs().mean(-1)
    losses["places"] = 10 * miss[truth[..., 0] > 0].mean()
    losses["attention"] = attention_loss(weights.float(), group["cover"][scene], focus, start)
    drawn = F.adaptive_avg_pool2d(group["low"][scene].float() / 255, COARSE).flatten(2)
    drawn = torch.cat([drawn, (1 + group["turn"][scene]) / 2, group["halves"][scene],
                       group["corners"][scene] / SIDE], -1)
    guess, behind = aids.drawing(states).float(), (column < length + QUERIES).float() - counts
    shared = group["shared"][scene]
    losses["drawing"] = drawing_loss(guess, drawn, shared, focus, counts)
    losses["queries"] = drawing_loss(guess, drawn, shared, focus, behind)
    return losses


@torch.no_grad()
def keep_features(model, groups, processor):
    """What the vision tower makes of every picture, for as long as it rests."""
    for group in groups:
        columns = group["picture"].shape[2] // CELL
        seen = [see(model.model.visual, patchify(part, processor.image_processor), columns)
                for part in group["picture"].split(50)]
        group["seen"] = torch.cat(seen).bfloat16()


def seeing_losses(model, aids, groups, processor, bf16, pictures=16):
    """The beginning: the vision tower alone, which needs many more pictures than the texts do."""
    sizes = torch.tensor([len(group["picture"]) for group in groups]).float()
    group = groups[int(torch.multinomial(sizes, 1))]
    some = torch.randint(len(group["picture"]), (pictures,))
    rows, columns = (n // CELL for n in group["picture"].shape[1:3])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        patches = patchify(group["picture"][some], processor.image_processor)
        guess = aids.cells(see(model.model.visual, patches, columns))
        return {"cells": cell_loss(guess.float(), group, some)}


def of_thing(values, focus):
    """Values (B, THINGS, n) and 1 + the thing (B, R) -> that thing's (B, R, n); thing 0's for 0."""
    return values.gather(1, (focus - 1).clamp(min=0)[..., None].expand(-1, -1, values.shape[2]))


def attention_loss(weights, cover, focus, start):
    """One head's weights (B, R, L) should fall on the cells of the thing spoken of, (B, R). The
    picture starts in column `start` (B,); cover (B, THINGS, cells) says which are a thing's."""
    columns = start[:, None] + torch.arange(cover.shape[2])
    columns = columns[:, None].expand(-1, focus.shape[1], -1)               # (B, R, cells)
    hit = (weights.gather(2, columns) * of_thing(cover, focus)).sum(-1)
    spoken = (focus > 0).float()
    return (-torch.log(hit + 1e-4) * spoken).sum() / spoken.sum()


def drawing_loss(guess, drawn, shared, focus, counts):
    """The coarse drawing (B, R + 1, sum(DRAWN)) that an answer's states give of the thing last
    spoken of, the state at the end token included; behind it the thing's turn, where its left and
    its right half lie, and its box. drawn (B, THINGS, as many) is the truth. Things that share
    their place, shared (B, THINGS), count three times: they are hardest."""
    last = torch.cat([focus, focus[:, -1:]], 1)
    carried = torch.where(last > 0, torch.arange(last.shape[1]), 0).cummax(1).values
    last = last.gather(1, carried)
    told = (last > 0).float() * F.pad(counts, (1, 0), value=1.0)
    told = told * (1 + 2 * of_thing(shared[..., None], last)[..., 0])
    (cells, turn, places), truth = guess.split(DRAWN, -1), of_thing(drawn, last).split(DRAWN, -1)
    miss = sum(F.binary_cross_entropy_with_logits(part, true, reduction="none").mean(-1)
               for part, true in ((cells, truth[0]), (turn, truth[1])))
    off = (places - truth[2]).abs().mean(-1)
    return ((miss + 5 * off) * told).sum() / told.sum()


def turns_of(low):
    """Masks (B, THINGS, LOW, LOW) -> which way each is longer, (B, THINGS, 2) in [-1, 1]: across
    (1) or down (-1), and from the upper left (1) or from the lower left (-1). Of two crossing bars
    nothing else differs but the colour."""
    weights = low.flatten(2).float() + 1e-9
    weights = weights / weights.sum(-1, keepdim=True)            # (B, THINGS, LOW * LOW)
    index = torch.arange(LOW * LOW)
    x, y = (index % LOW).float(), (index // LOW).float()
    x, y = (v - (weights @ v)[..., None] for v in (x, y))        # from the mask's centre
    xx, yy, xy = ((weights * a * b).sum(-1) for a, b in ((x, x), (y, y), (x, y)))
    return torch.stack([xx - yy, 2 * xy], -1) / (xx + yy + 1e-6)[..., None]


def halves_of(low):
    """Masks (B, THINGS, LOW, LOW) -> the centres of their left and right halves, x, y, x, y, as a
    share of the picture, (B, THINGS, 4). Of a bar that leans they lie on its two arms."""
    weights = low.flatten(2).float() + 1e-9                      # (B, THINGS, LOW * LOW)
    index = torch.arange(LOW * LOW)
    x, y = (index % LOW + 0.5) / LOW, (index // LOW + 0.5) / LOW
    middle = (weights @ x / weights.sum(-1))[..., None]
    found = []
    for side in (x <= middle, x > middle):
        half = weights * side
        found += [half @ v / half.sum(-1).clamp(min=1e-6) for v in (x, y)]
    return torch.stack(found, -1)


def of_cells(group, scene):
    """What stands in each cell of some scenes -> (B, cells, 6): colour, shape and box; 0 is
    nothing."""
    index = group["cells"][scene].long()[..., None].expand(-1, -1, 6)
    return group["table"][scene].long().gather(1, index)


def cell_loss(guess, group, distinct):
    """What stands in each cell of the picture: colour, shape, how far it reaches from the cell's
    centre to all sides, and its turn; or nothing."""
    truth = of_cells(group, distinct)
    columns = group["picture"].shape[2] // CELL
    cell = torch.arange(truth.shape[1])
    centre = CELL * torch.stack([cell % columns, cell // columns], -1) + CELL / 2     # (cells, 2)
    reach = (truth[..., 2:] - centre.repeat(1, 2)) / (2 * CELL)
    color, shape, box, turn = guess.split([1 + len(world.COLORS), 1 + len(world.SHAPES), 4, 2], -1)
    there = truth[..., 0] > 0
    thing = group["cells"][distinct].long()
    wrong = (turn - of_thing(group["turn"][distinct], thing)).abs().mean(-1)
    return (F.cross_entropy(color.flatten(0, 1), truth[..., 0].flatten())
            + F.cross_entropy(shape.flatten(0, 1), truth[..., 1].flatten())
            + (box - reach).abs().mean(-1)[there].mean() + wrong[there].mean())


def draw_batch(groups, share, pictures, questions):
    """-> a group of scenes of one size, and B = pictures x questions of its prompts and answers, of
    which a `share` looks: prompts (B, P), answers and focus (B, R), scene (B,); little padding."""
    sizes = torch.tensor([len(group["picture"]) for group in groups]).float()
    group = groups[int(torch.multinomial(sizes, 1))]
    scene = torch.randint(len(group["picture"]), (pictures,)).repeat_interleave(questions)
    question = torch.rand(pictures, EXPRESSIONS).argsort(1)[:, :questions].flatten()
    prompts = group["prompts"][scene, question].long()
    looks = torch.rand(len(scene)) < share
    both = [torch.where(looks[:, None], group["look" + name][scene, question],
                        F.pad(group["glance" + name][scene, question], (0, group["longer"]))).long()
            for name in ("", " focus")]
    longest = (both[0] != 0).sum(1).max()
    first = (prompts != 0).int().argmax(1).min()
    return group, prompts[:, first:], both[0][:, :longest], both[1][:, :longest], scene


@torch.no_grad()
def ask(model, processor, items, begun="", sampled=False, limit=110):
    """Items as data.load_item gives them -> the MLLM's answers, each beginning with `begun`."""
    collate = data.Collator(processor, "qwen2_5_vl", SIDE, max_prompt=400)
    forbidden = forbidden_tokens(processor.tokenizer, model.lm_head.out_features)
    more = torch.tensor(processor.tokenizer(begun).input_ids if begun else [], dtype=torch.long)
    texts = []
    for k in range(0, len(items), 50):
        batch = collate(items[k:k + 50])
        batch["ids"] = [torch.cat([ids, more]) for ids in batch["ids"]]
        batch["types"] = [torch.cat([types, torch.zeros_like(more)]) for types in batch["types"]]
        uniforms = torch.rand(len(batch["ids"]), limit).double() if sampled else None
        samples = generate(model, batch, prompt_positions(model, batch), 1, limit,
                           processor.tokenizer.eos_token_id, forbidden, uniforms)
        texts += [begun + processor.tokenizer.decode(group[0], skip_special_tokens=True)
                  for group in samples.completions]
    return texts


def held_out_items(scenes):
    """The first expression of each scene -> items as data.load_item gives them, and its kind."""
    items = []
    for n, (_, (expression, *_), whole) in enumerate(scenes):
        thing = expression["thing"]
        items.append({"id": f"held out/{n}", "text": expression["text"], "image": whole["image"],
                      "mask": whole["masks"][thing], "ignore": np.zeros_like(whole["masks"][thing]),
                      "box": whole["things"][thing]["box"], "kind": expression["kind"]})
    return items


BEGUN = {"free": "", "looks": "<think>\nThe", "glances": "<think>\nIt"}


def evaluate_mllm(model, processor, items):
    """Answers to held-out questions, free and with the habit forced by the first word -> the log's
    rows."""
    model.eval()
    rows = {}
    for name, begun in [*BEGUN.items(), ("sampled", "")]:
        texts = ask(model, processor, items, begun, name == "sampled")
        rows[name] = score(texts, items, processor.tokenizer)
        rows[name + " text"] = texts[:3]
    model.train()
    return rows


def score(texts, items, tokenizer):
    """Means over the answers; right: the box's IoU with the true one is above 0.5, also by kind."""
    found = {name: [] for name in ("right", "box", "format", "looks", "tokens", *world.KINDS)}
    for text, item in zip(texts, items):
        size = item["mask"].shape
        frame = smart_resize(*size, factor=CELL, min_pixels=FEWEST, max_pixels=MOST)
        box = parse_box(text)
        iou = box_iou(box and data.rescale_box(box, frame[::-1], size[::-1]), item["box"])
        found["box"].append(iou)
        found["right"].append(iou > 0.5)
        found[item["kind"]].append(iou > 0.5)
        found["format"].append(format_reward(text))
        found["looks"].append(text.startswith(BEGUN["looks"]))
        found["tokens"].append(len(tokenizer(text).input_ids))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items() if values}


@torch.no_grad()
def check_forward(model, processor, group, scenes):
    """Our positions, patches and forward are Hugging Face's, on four padded prompts."""
    columns, pad_id = group["picture"].shape[2] // CELL, processor.tokenizer.pad_token_id
    prompts, answers = group["prompts"][:4, 0].long(), group["look"][:4, 0].long()
    ours = patchify(group["picture"][:4], processor.image_processor)
    seen = see(model.model.visual, ours, columns)
    states, _, _, _ = forward(model, prompts, answers, seen, columns)
    logits = model.lm_head(states)
    for i in range(4):
        text = processor.apply_chat_template(chat_messages(scenes[i][1][0]["text"]),
                                             add_generation_prompt=True)
        encoded = processor(text=[text], images=[scenes[i][2]["image"]], return_tensors="pt",
                            return_mm_token_type_ids=True)
        kept = prompts[i] != pad_id
        assert torch.equal(prompts[i][kept], encoded["input_ids"][0]), "prompt tokens"
        assert torch.allclose(ours[i], encoded["pixel_values"], atol=0.02), "patches"
        answer = answers[i][answers[i] != pad_id]
        ids = torch.cat([encoded["input_ids"][0], answer])[None]
        types = F.pad(encoded["mm_token_type_ids"], (0, len(answer)))
        theirs, _ = model.model.get_rope_index(ids, types, image_grid_thw=encoded["image_grid_thw"])
        begin = (ids == model.config.image_token_id).int().argmax(1)
        rows = group["picture"].shape[1] // CELL
        mine = rope_positions(ids, torch.zeros_like(begin), begin, rows, columns)
        assert torch.equal(mine, theirs), "positions"
        theirs = model(input_ids=ids, mm_token_type_ids=types, pixel_values=ours[i],
                       image_grid_thw=encoded["image_grid_thw"]).logits[0, -len(answer) - 1:]
        assert torch.allclose(logits[i, :len(answer) + 1], theirs, atol=1e-4, rtol=1e-4), "logits"


def group_scenes(scenes, processor, name):
    """Scenes -> one dict of tensors per size of the MLLM's picture: scenes and samples together."""
    sizes = {}
    for scene in scenes:
        sizes.setdefault(scene[0]["picture"].shape[:2], []).append(scene)
    groups = []
    for size, some in sorted(sizes.items()):
        group = {**stack(some, MLLM_READS), **make_samples(some, processor, f"{name} {size}")}
        for aid, of in (("turn", turns_of), ("halves", halves_of)):
            group[aid] = torch.cat([of(part) for part in group["low"].split(200)])
        group["longer"] = group["look"].shape[-1] - group["glance"].shape[-1]
        if group["longer"] >= 0 and len(some) >= 4:              # a rare size teaches little
            groups.append(group)
    return groups


def build_mllm_part(args, scenes, held_out, say):
    folder, processor = Path(args.output) / "mllm", build_processor()
    tokenizer, began = processor.tokenizer, time.time()
    groups = group_scenes(scenes, processor, f"{args.seed} train")
    scenes.clear()                                               # a gigabyte
    torch.manual_seed(args.seed)
    model = build_mllm(tokenizer)
    aids = Aids(model.config.get_text_config().hidden_size)
    squares = [s for s in held_out if s[0]["picture"].shape[:2] == (160, 160)][:4]
    check_forward(model, processor, group_scenes(squares, processor, "check")[0], squares)
    items = held_out_items(held_out)
    say(f"mllm: {count(model)} parameters, {len(tokenizer)} tokens, {len(groups)} sizes of picture"
        f", tokenised in {time.time() - began:.0f} s")
    for part in ("prompts", "look", "glance"):
        lengths = torch.cat([(group[part] != 0).sum(-1).flatten() for group in groups])
        say(f"  tokens of {part}: {lengths.float().mean():.1f}, at most {lengths.max()}")
    model.set_attn_implementation("eager")               # the one that hands its weights out
    soft, steps = soft_targets(tokenizer), args.steps or 8000

    def losses(step):
        if step < args.see_first:
            named = seeing_losses(model, aids, groups, processor, args.bf16)
            return named["cells"], named
        if step < args.read_until and "seen" not in groups[0]:
            keep_features(model, groups, processor)
        if step >= args.read_until and "seen" in groups[0]:
            for group in groups:
                del group["seen"]
        share = 0.25 if step > (1 - GLANCING) * steps else args.early_looks
        group, *batch = draw_batch(groups, share, args.batch or 12, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            named = mllm_losses(model, aids, soft, group, *batch, processor)
        decay = min(1.0, max(0.05, 1.5 - 2 * step / steps))  # first where told, then where it helps
        weights = {"attention": args.attention_weight * decay, "cells": max(0.1, decay),
                   "queries": 3.0}
        return sum(weights.get(k, 1.0) * v for k, v in named.items()), named

    def report(step):
        if step <= args.see_first:
            return
        last = step == steps
        for name, row in evaluate_mllm(model, processor, items if last else items[:100]).items():
            say(f"  {name}: {json.dumps(row)}")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    train("mllm", [model, aids], losses, report, args, steps, say)
    if RANK == 0:
        check_mllm(model, folder, items[:8], say)


def check_mllm(model, folder, items, say):
    """What was saved loads as any other checkpoint does, and answers as the model that was trained;
    so does Hugging Face's own generate."""
    processor = AutoProcessor.from_pretrained(folder)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    answers = [ask(m.eval(), processor, items) for m in (model, loaded)]
    assert answers[0] == answers[1], answers
    batch = data.Collator(processor, loaded.config.model_type, SIDE, max_prompt=400)(items[:1])
    ids = batch["ids"][0][None]
    out = loaded.generate(input_ids=ids, mm_token_type_ids=batch["types"][0][None],
                          pixel_values=batch["pixel_values"], image_grid_thw=batch["grid_thw"],
                          attention_mask=torch.ones_like(ids), max_new_tokens=110)
    reply = processor.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
    assert isinstance(processor, Qwen2_5_VLProcessor)
    assert reply == answers[0][0], (reply, answers[0][0])
    say(f"mllm: reloaded, the same answer to {items[0]['text']!r}: {reply!r}; {size(folder)}")


# --------------------------------------------------------------------------------------------------
# SAM 2

SAM_CONFIG = f"""# A real but tiny SAM 2, in the sam2 package's own format: one picture, no memory.
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
PROMPTS = 4                            # of a picture, in a step of the training


def build_sam(config):
    return instantiate(OmegaConf.load(config).model, _recursive_=True)


def sam_pixels(pictures):
    """data.sam_picture for (B, SIDE, SIDE, 3) uint8 -> (B, 3, SIDE, SIDE)."""
    pixels = (pictures.float() / 255 - data.SAM_MEAN) / data.SAM_STD
    return pixels.permute(0, 3, 1, 2).contiguous()


def decode(sam, pixels, points, labels, blur=None):
    """K prompts of each of B pictures -> mask logits (B, K, LOW, LOW) and predicted IoUs (B, K).

    points (B, K, n, 2) in SAM's frame and labels (B, K, n): 2 and 3 are a box's corners, 1 a point
    on the thing, 0 a point off it, -1 none. blur: a function of the prompts' tokens.
    """
    K = points.shape[1]
    fine, middle, coarse = sam.forward_image(pixels)["backbone_fpn"]
    features = [coarse + sam.no_mem_embed.view(1, -1, 1, 1), fine, middle]
    coarse, fine, middle = (f[:, None].expand(-1, K, -1, -1, -1).flatten(0, 1) for f in features)
    prompts = points.flatten(0, 1), labels.flatten(0, 1)
    sparse, dense = sam.sam_prompt_encoder(points=prompts, boxes=None, masks=None)
    sparse = blur(sparse) if blur else sparse
    logits, ious, _, _ = sam.sam_mask_decoder(
        image_embeddings=coarse, image_pe=sam.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False,
        repeat_image=False, high_res_features=[fine, middle])
    return logits.unflatten(0, (-1, K))[:, :, 0], ious.unflatten(0, (-1, K))[..., 0]


def take(low, asked):
    """Of the masks (B, THINGS, LOW, LOW) those asked for, (B, K) -> (B, K, LOW, LOW)."""
    return low.gather(1, asked[..., None, None].expand(-1, -1, LOW, LOW))


def draw_points(low, asked, number):
    """Masks (B, THINGS, LOW, LOW), 0 ... 255, and the things asked for, (B, K) -> points (B, K, n,
    2) and labels (B, K, n), n of them. The first lies on the thing; the others too, or in half of
    the prompts some of them on another thing or beside all."""
    B, K = asked.shape
    cells = take(low, asked).flatten(2).float() / 255            # (B, K, LOW * LOW)
    every = low.flatten(2).float().sum(1, keepdim=True) / 255
    own = cells.pow(4) + 1e-9                                    # rather inside than on the rim
    others = (every - cells).clamp(min=0).pow(4) + 0.1 * (1 - every).clamp(min=0) + 1e-9
    places = []
    for chance in (own, others):
        index = torch.multinomial(chance.flatten(0, 1), number, replacement=True).view(B, K, number)
        corner = 4 * torch.stack([index % LOW, index // LOW], -1)
        places.append(corner + 4 * torch.rand(B, K, number, 2))
    off = (torch.rand(B, K, number) < 0.3) & (torch.rand(B, K, 1) < 0.5)
    off[..., 0] = False
    return torch.where(off[..., None], places[1], places[0]), torch.where(off, 0, 1)


def draw_box(corners):
    """Boxes (B, K, 4) as two points (B, K, 2, 2) and their labels. The sides are moved by 8 % of
    the box's size, those of every other box also up to 8 pixels outwards."""
    B, K = corners.shape[:2]
    extent = (corners[..., 2:] - corners[..., :2]).repeat(1, 1, 2)                      # w, h, w, h
    outwards = torch.tensor([-1, -1, 1, 1])
    wide = 8 * torch.rand(B, K, 4) * (torch.rand(B, K, 1) < 0.5) * outwards
    shaken = (corners + wide + 0.08 * extent * torch.randn(corners.shape)).clamp(0, SIDE)
    return shaken.unflatten(-1, (2, 2)), torch.tensor([2, 3]).expand(B, K, 2)


def draw_prompts(corners, low, asked, early):
    """Boxes (B, K, 4) of the things asked for, (B, K), of the masks (B, THINGS, LOW, LOW) -> points
    (B, K, n, 2) and their labels, one sort in a step.

    As SAM 2 was trained: a box (45 %), one to POINTS points (45 %), or a box and points. Early many
    points alone, since from them it finds the thing soonest."""
    sort, number = random.random(), random.randint(1, POINTS)
    if early:
        return draw_points(low, asked, POINTS)
    if sort < 0.45:
        return draw_box(corners)
    points = draw_points(low, asked, number)
    if sort < 0.9:
        return points
    return tuple(torch.cat(pair, 2) for pair in zip(draw_box(corners), points))


def blur_tokens(tokens):
    """Prompt tokens (N, n, D): half of the prompts are left; the tokens of the others become up to
    ten times smaller, and something random is added, to all of a prompt's alike and to each.

    What is learned in stage 1 begins so: small, and mostly the same for all pictures. A SAM that
    never saw such tokens draws everything for them, whatever else they say, and nothing tells the
    queries where to go (docs/world.md)."""
    N, n, D = tokens.shape
    small, strength = 10 ** -torch.rand(N, 1, 1), torch.rand(N, 1, 1)
    blurred = small * tokens + strength * (torch.randn(N, 1, D) + 0.3 * torch.randn(N, n, D))
    return torch.where(torch.rand(N, 1, 1) < 0.5, blurred, tokens)


class CoarseReader(torch.nn.Module):
    """An aid of SAM's training: reads the thing asked for off the decoder's coarse cells."""

    def __init__(self, sam):
        super().__init__()
        self.read = torch.nn.Linear(sam.sam_prompt_encoder.embed_dim, 1)
        self.seen = None
        sam.sam_mask_decoder.transformer.register_forward_hook(self.keep)

    def keep(self, transformer, inputs, outputs):
        self.seen = outputs[1]                                   # (B * K, cells, C)

    def loss(self, truth):
        """truth (B, K, LOW, LOW) in [0, 1]; of what the decoder saw last."""
        side = math.isqrt(self.seen.shape[1])
        coarse = F.adaptive_avg_pool2d(truth, side).flatten(2).flatten(0, 1)        # (B * K, cells)
        return F.binary_cross_entropy_with_logits(self.read(self.seen)[..., 0], coarse)


def sam_losses(sam, reader, scenes, rows, early):
    """Dice and cross entropy of some things at the decoder's resolution, the error of the predicted
    IoU, and the coarse reader's."""
    there = (scenes["table"][rows, 1:, 0] > 0).float()                      # (B, THINGS)
    often = there * (1 + 2 * scenes["shared"][rows])             # what shares its place is hardest
    asked = torch.multinomial(often, PROMPTS, replacement=True)             # (B, PROMPTS)
    low, corners = scenes["low"][rows], scenes["corners"][rows]
    corners = corners.gather(1, asked[..., None].expand(-1, -1, 4))
    prompts = draw_prompts(corners, low, asked, early)
    logits, ious = decode(sam, sam_pixels(scenes["square"][rows]), *prompts,
                          None if early else blur_tokens)
    truth, p = take(low, asked).float() / 255, logits.sigmoid()        # (B, PROMPTS, LOW, LOW)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    hard, solid = logits > 0, truth > 0.5
    real = (hard & solid).sum((2, 3)) / (hard | solid).sum((2, 3)).clamp(min=1)
    return {"bce": bce.mean(), "dice": dice.mean(), "iou": ((ious - real) ** 2).mean(),
            "coarse": reader.loss(truth)}


@torch.no_grad()
def evaluate_sam(sam, scenes, layouts):
    """Mean IoU of held-out things at LOW x LOW, by prompt: the true box, one 5 pixels too wide, 1
    and 8 points; by layout."""
    torch.manual_seed(0)
    sam.eval()
    found = {}
    for name in ("box", "loose box", "1 point", "8 points"):
        ious = []
        for k in range(0, len(scenes["square"]), 100):
            part = slice(k, k + 100)
            truth = scenes["low"][part]
            outwards = torch.tensor([-LOOSE, -LOOSE, LOOSE, LOOSE]) * (name == "loose box")
            points = (scenes["corners"][part] + outwards).clamp(0, SIDE).unflatten(-1, (2, 2))
            labels = torch.tensor([2, 3]).expand(points.shape[:3])
            if "point" in name:
                every = torch.arange(THINGS).expand(len(truth), THINGS)
                points, _ = draw_points(truth, every, int(name[0]))
                labels = label_points(truth, points)
            logits, _ = decode(sam, sam_pixels(scenes["square"][part]), points, labels)
            hard, solid = logits > 0, truth > 127
            ious.append((hard & solid).sum((2, 3)) / (hard | solid).sum((2, 3)).clamp(min=1))
        ious = torch.cat(ious)
        there = scenes["table"][:, 1:, 0] > 0
        by = {layout: round(ious[there & (layouts == n)].mean().item(), 3)
              for n, layout in enumerate(world.LAYOUTS)}
        found[name] = {"all": round(ious[there].mean().item(), 3), **by}
    sam.train()
    return found


def label_points(truth, points):
    """Points (B, K, n, 2), masks (B, K, LOW, LOW) -> labels (B, K, n): 1 on the thing, 0 off it."""
    x, y = (points[..., axis].long().clamp(0, SIDE - 1) // 4 for axis in (0, 1))
    at = truth.flatten(2).gather(2, y * LOW + x)
    return torch.where(at > 60, 1, 0)


@torch.no_grad()
def help_to_find(sam):
    """Two things without which a SAM of this size draws nothing for a long time: coordinates at
    half the usual frequency; and in the decoder's cross-attentions, queries and keys begin as one
    and the same projection, so that a point finds its own place at once."""
    sam.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)
    transformer = sam.sam_mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for crossing in crossings:
        crossing.q_proj.weight.mul_(SHARP)
        crossing.k_proj.weight.copy_(crossing.q_proj.weight)


def build_sam_part(args, scenes, held_out, say):
    folder, steps = Path(args.output) / "sam", args.steps or 4500
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(SAM_CONFIG)
    torch.manual_seed(args.seed)
    sam = build_sam(folder / "config.yaml")
    help_to_find(sam)
    held_out = held_out[:200]
    layouts = torch.tensor([[world.LAYOUTS.index(t["layout"]) for t in whole["things"]]
                            + [0] * (THINGS - len(whole["things"])) for *_, whole in held_out])
    scenes, held_out = stack(scenes, SAM_READS), stack(held_out, SAM_READS)
    few = ((scenes["table"][:, 1:, 0] > 0).sum(1) <= 3).nonzero()[:, 0]         # to begin with
    reader = CoarseReader(sam)
    say(f"sam: {count(sam)} parameters")

    def losses(step):
        random.seed(args.seed * 1000003 + step)
        early = step < 0.15 * steps
        rows = torch.randint(len(few) if early else len(scenes["square"]), (args.batch or 16,))
        named = sam_losses(sam, reader, scenes, few[rows] if early else rows, early)
        return named["bce"] + named["dice"] + named["coarse"] + 0.05 * named["iou"], named

    def report(step):
        for name, row in evaluate_sam(sam, held_out, layouts).items():
            say(f"  {name}: {json.dumps(row)}")
        torch.save({"model": sam.state_dict()}, folder / "model.pt")

    train("sam", [sam, reader], losses, report, args, steps, say)
    loaded = build_sam(folder / "config.yaml")
    loaded.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["model"], strict=True)
    figures = [evaluate_sam(model, held_out, layouts) for model in (sam, loaded)]
    assert figures[0] == figures[1], figures
    say(f"sam: reloaded, the same masks; {size(folder)}")


# --------------------------------------------------------------------------------------------------
# Common to both

def rate(step, steps):
    """Factor of the peak learning rate: warm-up, constant, and a cosine down over the last LATE."""
    warm = min(1, (step + 1) / max(10, steps // 30))
    late = max(0, step / steps - (1 - LATE)) / LATE
    return warm * (0.02 + 0.49 * (1 + math.cos(math.pi * late)))


def average_gradients(parameters):
    """Over the processes, each of which had scenes of its own."""
    if WORLD == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / WORLD).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def train(name, modules, losses, report, args, steps, say):
    """AdamW. losses(step) -> total, named; report(step) now and then; then STATE/NAME.resume.pt is
    written, from which --resume goes on, also with another --steps."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)

    state, start = Path(args.state) / f"{name}.resume.pt", 0
    state.parent.mkdir(parents=True, exist_ok=True)
    if args.resume:
        saved = torch.load(state, weights_only=True)
        start = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        for module, weights in zip(modules, saved["modules"]):
            module.load_state_dict(weights)
    kept, began = [], time.time()
    for step in range(start + 1, steps + 1):
        # whatever an evaluation drew between
        torch.manual_seed((args.seed * 1000003 + step) * WORLD + RANK)
        total, named = losses(step - 1)
        optimizer.zero_grad()
        total.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step - 1, steps)
        optimizer.step()
        if kept and len(kept[0]) != len(named):                  # from seeing alone to all losses
            kept, began = [], time.time()
        kept.append(torch.stack([v.detach() for v in named.values()]))
        if step % args.every == 0 or step == steps or step in (50, 100, 200, 300):
            means = dict(zip(named, torch.stack(kept).mean(0).tolist()))
            pace = (time.time() - began) / len(kept)
            means = {k: round(v, 4) for k, v in means.items()}
            say(f"step {step}/{steps} {1000 * pace:.0f} ms a step", means)
            kept, began = [], time.time()
            if RANK == 0 and (step % args.every == 0 or step == steps):
                report(step)
        if RANK == 0 and (step % 100 == 0 or step == steps):
            torch.save({"step": step, "optimizer": optimizer.state_dict(),
                        "modules": [module.state_dict() for module in modules]}, state)


def count(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def size(folder):
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return f"{size / 1e6:.2f} MB in {folder}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["mllm", "sam", "all"])
    parser.add_argument("--output", default=str(Path(__file__).parent), help="for mllm/ and sam/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=8000, help="to train on, 150 kB each")
    parser.add_argument("--held-out", type=int, default=400, help="scenes to evaluate on")
    parser.add_argument("--steps", type=int, help="default: mllm 8000, sam 4500")
    parser.add_argument("--batch", type=int, help="pictures; default: mllm 12, sam 16")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--see-first", type=int, default=1500, help="mllm's steps of seeing alone")
    parser.add_argument("--read-until", type=int, default=10 ** 9,
                        help="mllm: until this step the vision tower rests, once it has learned "
                             "alone; its features are made once; default: to the end")
    parser.add_argument("--early-looks", type=float, default=0.75, help="share of looks at first")
    parser.add_argument("--attention-weight", type=float, default=1.0, help="0: no aid")
    parser.add_argument("--resume", action="store_true", help="go on from STATE/PART.resume.pt")
    parser.add_argument("--state", default="runs/build", help="folder for what --resume needs")
    parser.add_argument("--cache", help="folder that keeps the scenes for the next call")
    parser.add_argument("--bf16", action="store_true", help="compute the MLLM's training in bf16")
    args = parser.parse_args()

    if WORLD > 1:
        dist.init_process_group("gloo")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with open(Path(args.output) / "build.log", "a", encoding="utf-8") as file:
        def say(*words):
            if RANK > 0:
                return
            print(*words, flush=True)
            print(*words, file=file, flush=True)

        began = time.time()
        scenes = make_scenes(args.scenes, f"{args.seed} train", cache=args.cache)[RANK::WORLD]
        held_out = make_scenes(args.held_out, f"{args.seed} held out", True, args.cache)
        say(f"\n{' '.join(sys.argv)}\ntorch {torch.__version__}, transformers "
            f"{transformers.__version__}; {args.scenes} scenes in {time.time() - began:.0f} s")
        if args.part != "mllm":
            build_sam_part(args, scenes, held_out, say)
        if args.part != "sam":
            build_mllm_part(args, scenes, held_out, say)
        say(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
