"""The laptop's stand-ins: a tiny Qwen2.5-VL and a tiny SAM 2, trained from scratch on the shapes world.

    python tests/tiny/build.py all --output tests/tiny          # both parts: what is committed; a quarter of an hour
    python tests/tiny/build.py mllm                             # the language model alone: eight minutes of one core
    python tests/tiny/build.py sam                              # the mask model alone: six minutes of one core

Stage 1 and 2 of the method start from public models of billions of parameters. These two stand in for them so that
every script can be run whole on a laptop. They are laid out as the real ones are, and no script treats them apart:

    OUTPUT/mllm     a Hugging Face folder: Qwen2_5_VLForConditionalGeneration, tokenizer, processor, chat template
    OUTPUT/sam      config.yaml, as the sam2 package writes its own, and model.pt = {"model": state dict}
    OUTPUT/mllm-STEP    the MLLM at the steps named by --save-at
    OUTPUT/build.log    what both parts printed; appended to

Nothing learns from the world that data.py writes: scenes come from the same generator with seeds of their own.
The same seed on the same machine gives the same weights, up to CUDA kernels that have no deterministic form.

What is shifted on purpose, and has to be said wherever results of these models are shown. A model trained on clean
answers leaves GRPO nothing to correct that it can correct in minutes. So the MLLM learns another annotation style, as
a public model would have: boxes --loose 5 +- 2 px too wide on every side, and in a share --broken 0.25 of the answers
one of </think>, <answer>, </answer> left out (the tag with its line break, so one token).

What differs from the real models.
    Tokens      whole numbers 0 ... 128 are one token each (Qwen writes digit by digit), and the fixed text of the
                prompt and of the answer is a few long tokens. Any printable ASCII still goes through, character by
                character at worst, and decode(encode(text)) == text; other characters become <unk>.
    Training    three aids, none of them kept: soft labels on numbers (a near miss is nearly right), a head that reads
                colour, shape and box off the picture tokens, and one attention head told to look at the referent.
    SAM 2       no memory, and only its single-mask output is trained: never ask it for three masks.
"""
import argparse
import functools
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
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # before CUDA starts: reproducible matrix products
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoProcessor, GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor,
                          Qwen2VLVideoProcessor)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

import data
import rewards
import world
from rewards import box_iou, format_reward, parse_box

SIDE, PATCH = world.SIDE, 8
GRID = SIDE // PATCH                   # patches along a side
CELLS = GRID // 2                      # picture tokens along a side: 2 x 2 patches are merged into one
PICTURE = CELLS ** 2                   # picture tokens
THINGS = 4                             # at most, in a scene
EXPRESSIONS = 6                        # drawn per training scene
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ----------------------------------------------------------------------------------------------------------------
# Tokenizer and processor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TAGS = ["\n</think>\n", "<answer>\n", "</answer>"]               # what a broken answer lacks one of
LAYOUT = ["<think>\n", *TAGS, '```json\n[\n  {"bbox_2d": [', ", ", '], "label": "', '"}\n]\n```\n',
          "<think>", "</think>", "<answer>", "system\n", "user\n", "assistant\n", *rewards.SYSTEM_PROMPT.split("{object}")]


def build_tokenizer():
    """Longest piece first: fixed text, then whole words and whole numbers, then single characters."""
    words = [*world.COLORS, *world.SHAPES, *world.ROWS, *world.COLUMNS, *world.EXTREMES, *" ".join(world.RELATIONS).split(),
             "shape", "the", "The", "is", "at", "it"]
    numbers = [str(n) for n in range(SIDE + 1)]
    pieces = [*SPECIAL, *numbers, *LAYOUT, *[" " + w for w in words], *words, *string.printable, "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    either = lambda pieces: "|".join(re.escape(p) for p in sorted(dict.fromkeys(pieces), key=len, reverse=True))
    pattern = (rf"{either(LAYOUT)}|(?:(?<![A-Za-z])| )(?:{either(words)})(?![A-Za-z])"
               rf"|(?<![0-9])(?:{either(numbers)})(?![0-9])|[\s\S]")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   unk_token="<unk>", padding_side="left", clean_up_tokenization_spaces=False,
                                   model_max_length=4096, chat_template=CHAT)


def build_processor():
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    image = Qwen2VLImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256}, **sizes)
    return Qwen2_5_VLProcessor(image_processor=image, tokenizer=build_tokenizer(), chat_template=CHAT,
                               video_processor=Qwen2VLVideoProcessor(**sizes))


# ----------------------------------------------------------------------------------------------------------------
# Scenes, made by all cores

def make_scene(key, full=False):
    """One scene, a function of its key alone -> arrays, and EXPRESSIONS of (kind, thing, expression, reasoning)."""
    rng = random.Random(key)
    picture, things = world.draw_scene(rng)
    while not (found := world.describe(things)):
        picture, things = world.draw_scene(rng)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)      # as the world's pictures are kept
    masks, table = np.zeros((THINGS, SIDE, SIDE), bool), np.zeros((THINGS + 1, 6), np.uint8)
    for i, thing in enumerate(things):
        color, shape = list(world.COLORS).index(thing["color"]), world.SHAPES.index(thing["shape"])
        masks[i], table[i + 1] = thing["mask"], (1 + color, 1 + shape, *thing["box"])
    cell = SIDE // CELLS
    cover = masks.reshape(THINGS, CELLS, cell, CELLS, cell).mean((2, 4)).reshape(THINGS, PICTURE)
    scene = {"picture": np.asarray(Image.open(file)),            # (SIDE, SIDE, 3)
             "table": table,                                     # (THINGS + 1, 6): colour, shape, box; row 0 is nothing
             "cells": np.where(cover.max(0) > 0.08, 1 + cover.argmax(0), 0).astype(np.uint8),   # (PICTURE,) a row of it
             "cover": cover >= np.minimum(0.5, cover.max(1, keepdims=True)).clip(1e-6),         # (THINGS, PICTURE)
             "low": masks.reshape(THINGS, SIDE // 4, 4, SIDE // 4, 4).sum((2, 4), dtype=np.uint8)}  # 0 ... 16 pixels
    return scene | ({"masks": masks} if full else {}), [world.pick_expression(found, rng) for _ in range(EXPRESSIONS)]


def make_scenes(count, name, full=False):
    """-> dict of tensors (count, ...), and a list of `count` lists of expressions."""
    with multiprocessing.Pool() as pool:
        keys = [f"tests/tiny {name} {i}" for i in range(count)]
        arrays, expressions = zip(*pool.imap(functools.partial(make_scene, full=full), keys, chunksize=32))
    return {k: torch.from_numpy(np.stack([a[k] for a in arrays])) for k in arrays[0]}, expressions


def widen(box, amounts):
    """Every side outwards by its amount of pixels, within the picture."""
    return [min(SIDE, max(0, round(v + sign * a))) for v, sign, a in zip(box, (-1, -1, 1, 1), amounts)]


def pad(rows, value, left=False):
    """Lists of ids -> (N, longest) int16 on the device."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows)], dtype=torch.int16).to(DEVICE)


def make_samples(scenes, expressions, processor, seed, loose, broken):
    """Every (scene, expression) with its prompt and its shifted answer, tokenised.

    prompts (U, P) one row per distinct expression, padded on the left; responses (N, R) padded on the right.
    """
    rng, tokenizer = random.Random(f"tests/tiny answers {seed}"), processor.tokenizer
    boxes, rows, answers, texts = scenes["table"][:, 1:, 2:].tolist(), [], [], {}
    for s, picked in enumerate(expressions):
        for _, thing, text, reasoning in picked:
            box = widen(boxes[s][thing], [rng.gauss(loose, 2) if loose else 0 for _ in range(4)])
            answer = rewards.answer_text(box, text, reasoning)
            if rng.random() < broken:
                answer = answer.replace(rng.choice(TAGS), "")
            rows.append((s, thing, texts.setdefault(text, len(texts))))
            answers.append(answer + tokenizer.eos_token)
    image = "<|image_pad|>"
    prompts = [processor.apply_chat_template(rewards.chat_messages(t), add_generation_prompt=True) for t in texts]
    prompts = tokenizer([p.replace(image, image * PICTURE) for p in prompts])["input_ids"]
    responses = [ids for k in range(0, len(answers), 4096) for ids in tokenizer(answers[k:k + 4096])["input_ids"]]
    scene, thing, prompt = torch.tensor(rows).T
    return {"scene": scene.to(DEVICE), "thing": thing.to(DEVICE), "prompt": prompt.to(DEVICE),
            "prompts": pad(prompts, tokenizer.pad_token_id, left=True),
            "responses": pad(responses, tokenizer.pad_token_id)}


# ----------------------------------------------------------------------------------------------------------------
# The MLLM. Hugging Face's own forward takes pictures one by one; here all are alike, so a step takes them at once.
# check_forward holds what follows against the original.

def build_mllm(tokenizer):
    """Qwen2.5-VL with 0.5 million parameters."""
    ids = {s: tokenizer.convert_tokens_to_ids(s) for s in SPECIAL}
    text = dict(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
                num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=4096, initializer_range=0.05,
                rope_parameters=dict(rope_type="default", rope_theta=1000.0, mrope_section=[4, 6, 6]),
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=PATCH, spatial_merge_size=2,
                  temporal_patch_size=2, window_size=SIDE, fullatt_block_indexes=[0, 1], out_hidden_size=96,
                  initializer_range=0.05, rope_parameters=dict(rope_type="axial", rope_theta=100.0))
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, initializer_range=0.05,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"]))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    return model.to(DEVICE)


def patchify(pictures, image_processor):
    """(B, SIDE, SIDE, 3) uint8 -> (B, GRID^2, 3 * 2 * PATCH^2), in the processor's order: 2 x 2 patches, then on."""
    mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std], device=pictures.device)
    x = ((pictures.float() / 255 - mean) / std).unflatten(1, (CELLS, 2, PATCH)).unflatten(4, (CELLS, 2, PATCH))
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)                        # (B, CELLS, CELLS, 2, 2, 3, PATCH, PATCH)
    return x.unsqueeze(6).expand(*x.shape[:6], 2, PATCH, PATCH).reshape(len(pictures), GRID ** 2, -1)


def see(visual, patches):
    """The vision tower on B pictures of one size: (B, GRID^2, D) -> (B, PICTURE, C)."""
    index = torch.arange(GRID ** 2, device=patches.device)
    cell, inner = index // 4, index % 4
    places = torch.stack([cell // CELLS * 2 + inner // 2, cell % CELLS * 2 + inner % 2], 1)      # (GRID^2, 2)
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(x, places)
    for block in visual.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)       # (B, GRID^2, heads, d)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).unflatten(0, (len(patches), PICTURE))


def rope_positions(ids, first, start):
    """3-D M-RoPE positions: rows begin at column `first` and their picture at column `start`, both (B,) -> (3, B, L).

    Text counts on; the picture's tokens share one time and spread over rows and columns; text after it goes on
    from the largest of the three."""
    column, first, start = torch.arange(ids.shape[1], device=ids.device)[None], first[:, None], start[:, None]
    k = column - start
    inside = (k >= 0) & (k < PICTURE)
    text = (column - first - (k >= PICTURE) * (PICTURE - CELLS)).clamp(min=0)
    offsets = (torch.zeros_like(k), k // CELLS, k % CELLS)
    return torch.stack([torch.where(inside, start - first + offset, text) for offset in offsets])


def forward(model, prompts, responses, features, attentions=False):
    """(B, P), (B, R), (B, PICTURE, C) -> the logits (B, R, V) that predict the responses; layer 1's weights of head 0
    in the same rows, (B, R, L); the column where each picture starts (B,)."""
    ids, P = torch.cat([prompts, responses], 1), prompts.shape[1]                                # (B, L)
    is_picture = ids == model.config.image_token_id
    first = (prompts != model.config.get_text_config().pad_token_id).int().argmax(1)
    start = is_picture.int().argmax(1)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(is_picture[..., None], features)
    column = torch.arange(ids.shape[1], device=ids.device)
    allowed = (column[None, None] >= first[:, None, None]) & (column[None, None] <= column[None, :, None])  # (B, L, L)
    mask = torch.zeros(allowed.shape, device=ids.device).masked_fill(~allowed, -1e9)[:, None]
    out = model.model.language_model(inputs_embeds=embeds, position_ids=rope_positions(ids, first, start),
                                     attention_mask=mask, use_cache=False, output_attentions=attentions)
    logits = model.lm_head(out.last_hidden_state[:, P - 1:-1])
    return logits, out.attentions[1][:, 0, P - 1:-1] if attentions else None, start


def soft_targets(tokenizer, sigma=1.5):
    """(V, V): the target distribution for every token. Itself; for a number, a bell over the numbers around it."""
    target = torch.eye(len(tokenizer))
    numbers = torch.tensor(tokenizer.convert_tokens_to_ids([str(n) for n in range(SIDE + 1)]))
    n = torch.arange(SIDE + 1.0)
    target[numbers[:, None], numbers[None]] = torch.softmax(-((n[:, None] - n) / sigma) ** 2 / 2, 1)
    return target.to(DEVICE)


def mllm_losses(model, head, patches, soft, scenes, samples, rows, attention):
    """Named losses of one batch: the text, the picture tokens, and (attention=True) the head that shall look."""
    scene, thing = samples["scene"][rows], samples["thing"][rows]
    prompts, responses = samples["prompts"][samples["prompt"][rows]].long(), samples["responses"][rows].long()
    features = see(model.model.visual, patches(scenes["picture"][scene]))
    logits, weights, start = forward(model, prompts, responses, features, attention)
    counts = (responses != model.config.get_text_config().pad_token_id).float()                  # (B, R)
    mean = lambda values: (values * counts).sum() / counts.sum()
    losses = {"text": mean(-(soft[responses] * logits.log_softmax(-1)).sum(-1))}

    # What stands in each cell of the picture: (B, PICTURE, 6) = colour, shape, box; 0 where there is nothing.
    truth = scenes["table"][scene].gather(1, scenes["cells"][scene].long()[..., None].expand(-1, -1, 6)).long()
    color, shape, box = head(features).split([1 + len(world.COLORS), 1 + len(world.SHAPES), 4], -1)
    there = (truth[..., 0] > 0).float()[..., None]
    losses["cells"] = (F.cross_entropy(color.flatten(0, 1), truth[..., 0].flatten())
                       + F.cross_entropy(shape.flatten(0, 1), truth[..., 1].flatten())
                       + 5 * ((box - truth[..., 2:] / SIDE).abs() * there).sum() / (4 * there.sum()))
    if attention:                                                # the weight that falls on the referent's cells
        columns = start[:, None] + torch.arange(PICTURE, device=start.device)
        cover = torch.zeros(len(rows), weights.shape[2], device=start.device)
        cover.scatter_(1, columns, scenes["cover"][scene, thing].float())
        losses["attention"] = mean(-torch.log((weights * cover[:, None]).sum(-1) + 1e-4))
    return losses


@torch.no_grad()
def answer(model, tokenizer, prompts, patches, sampled, limit):
    """Prompts (N, P) padded on the left, their pictures' patches -> N completions."""
    texts = []
    for k in range(0, len(prompts), 250):
        ids = prompts[k:k + 250].long()
        is_picture = (ids == model.config.image_token_id).long()
        how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sampled else dict(do_sample=False)
        out = model.generate(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(),
                             mm_token_type_ids=is_picture, pixel_values=patches[k:k + 250].flatten(0, 1),
                             image_grid_thw=torch.tensor([[1, GRID, GRID]] * len(ids), device=ids.device),
                             max_new_tokens=limit, **how)
        texts += tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
    return texts


def evaluate_mllm(model, tokenizer, patches, scenes, samples, expressions, loose, sampled):
    """One expression of every held-out scene -> shares and means, and the texts.

    box and shifted: IoU with the true box and with one `loose` pixels wider; right: the box's centre is nearest to the
    right thing's; an answer from which no box can be read counts as 0 and wrong."""
    rows = torch.arange(len(expressions), device=DEVICE) * EXPRESSIONS                         # the first of each scene
    prompts = samples["prompts"][samples["prompt"][rows]]
    texts = answer(model, tokenizer, prompts, patches(scenes["picture"]), sampled, samples["responses"].shape[1] + 8)
    results = []
    for text, ((kind, thing, expression, _), *_), table in zip(texts, expressions, scenes["table"].tolist()):
        box, true = parse_box(text), table[1 + thing][2:]
        label = re.search(r'"label": "([^"]*)"', text)
        there = [entry[2:] for entry in table[1:] if entry[0]]
        near = None if box is None else min(range(len(there)), key=lambda i: math.dist(center(there[i]), center(box)))
        results.append({"format": format_reward(text), "box": box_iou(box, true), "kind": kind, "right": near == thing,
                        "shifted": box_iou(box, widen(true, [loose] * 4)),
                        "label": label is not None and label[1] == expression})

    def means(keys, kind=None):
        return [round(float(np.mean([r[k] for r in results if kind in (None, r["kind"])])), 3) for k in keys]

    names = ["format", "box", "shifted", "right", "label"]
    kinds = {f"{kind}: box, right": means(["box", "right"], kind) for kind in sorted({r["kind"] for r in results})}
    return dict(zip(names, means(names))) | kinds, texts


def center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@torch.no_grad()
def check_forward(model, processor, patches, scenes, samples, expressions):
    """Our positions, patches and forward are Hugging Face's, on four padded prompts and their answers."""
    rows = torch.arange(4, device=DEVICE) * EXPRESSIONS
    prompts, responses = samples["prompts"][samples["prompt"][rows]].long(), samples["responses"][rows].long()
    ours = patches(scenes["picture"][samples["scene"][rows]])
    logits, _, start = forward(model, prompts, responses, see(model.model.visual, ours))
    pad_id, grid = processor.tokenizer.pad_token_id, torch.tensor([[1, GRID, GRID]], device=DEVICE)
    for i in range(4):
        text = processor.apply_chat_template(rewards.chat_messages(expressions[i][0][2]), add_generation_prompt=True)
        encoded = processor(text=[text], images=[to_image(scenes["picture"][i])], return_tensors="pt",
                            return_mm_token_type_ids=True).to(DEVICE)
        kept = prompts[i] != pad_id
        assert torch.equal(prompts[i][kept], encoded["input_ids"][0]), "prompt tokens"
        assert torch.allclose(ours[i], encoded["pixel_values"], atol=1e-5), "patches"
        answer_ids = responses[i][responses[i] != pad_id]
        ids = torch.cat([encoded["input_ids"][0], answer_ids])[None]
        types = F.pad(encoded["mm_token_type_ids"], (0, len(answer_ids)))
        theirs, _ = model.model.get_rope_index(ids, types, image_grid_thw=grid)
        begin = (ids == model.config.image_token_id).int().argmax(1)
        assert torch.equal(rope_positions(ids, torch.zeros_like(begin), begin), theirs), "positions"
        theirs = model(input_ids=ids, mm_token_type_ids=types, pixel_values=ours[i], image_grid_thw=grid).logits
        wanted = theirs[0, -len(answer_ids) - 1:-1]
        assert torch.allclose(logits[i, :len(answer_ids)], wanted, atol=1e-4, rtol=1e-4), "logits"


def build_mllm_part(args, scenes, expressions, held_out, held_expressions, say):
    folder, processor = Path(args.output) / "mllm", build_processor()
    tokenizer, patches = processor.tokenizer, functools.partial(patchify, image_processor=processor.image_processor)
    began = time.time()
    samples, held = (make_samples(s, e, processor, f"{args.seed} {name}", args.loose, args.broken) for s, e, name in
                     ((scenes, expressions, "train"), (held_out, held_expressions, "held out")))
    torch.manual_seed(args.seed)
    model, head = build_mllm(tokenizer), torch.nn.Linear(96, 2 + len(world.COLORS) + len(world.SHAPES) + 4).to(DEVICE)
    check_forward(model, processor, patches, held_out, held, held_expressions)
    lengths = {k: (samples[k] != tokenizer.pad_token_id).sum(1) for k in ("prompts", "responses")}
    lengths["prompts"] = lengths["prompts"][samples["prompt"]]
    say(f"mllm: {count(model)} parameters, {len(tokenizer)} tokens, {len(samples['scene'])} answers tokenised in "
        f"{time.time() - began:.0f} s; tokens, mean and max:",
        {k: (round(v.float().mean().item(), 1), v.max().item()) for k, v in lengths.items()})
    if args.attention_weight:
        model.set_attn_implementation("eager")                   # the one that hands its weights out
    soft, steps = soft_targets(tokenizer), args.steps or 1200

    def losses(step):
        rows = torch.randint(len(samples["scene"]), (args.batch or 32,)).to(DEVICE)
        named = mllm_losses(model, head, patches, soft, scenes, samples, rows, args.attention_weight > 0)
        decay = min(1.0, max(0.05, 1.5 - 2 * step / steps))      # look where told at first, where it helps later
        weights = {"attention": args.attention_weight * decay}
        return sum(weights.get(k, 1.0) * v for k, v in named.items()), named

    def report(step):
        model.eval()
        for sampled in (False, True):
            torch.manual_seed(args.seed + step)
            result, texts = evaluate_mllm(model, tokenizer, patches, held_out, held, held_expressions, args.loose,
                                          sampled)
            say(f"  {'sampled' if sampled else 'greedy'} {json.dumps(result)}")
        if step in args.save_at or step == steps:
            say(f"  for {held_expressions[0][0][2]!r}, sampled: {texts[0]!r}")
            target = folder if step == steps else folder.with_name(f"mllm-{step}")
            model.save_pretrained(target)
            processor.save_pretrained(target)
        model.train()

    train([model, head], losses, report, args, steps, say)
    check_mllm(model, folder, patches, held_out, held, held_expressions, say)


def check_mllm(model, folder, patches, scenes, samples, expressions, say):
    """What was saved loads as any other checkpoint does, and answers as the model that was trained."""
    processor = AutoProcessor.from_pretrained(folder)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).to(DEVICE)
    item = {"id": "check", "text": expressions[0][0][2], "image": to_image(scenes["picture"][0]),
            "mask": np.ones((SIDE, SIDE), bool), "ignore": np.zeros((SIDE, SIDE), bool), "box": (0, 0, 1, 1)}
    batch = data.Collator(processor, loaded.config.model_type, SIDE, max_prompt=400)([item])
    ids = batch["ids"][0][None].to(DEVICE)
    out = loaded.generate(input_ids=ids, mm_token_type_ids=batch["types"][0][None].to(DEVICE),
                          pixel_values=batch["pixel_values"].to(DEVICE), image_grid_thw=batch["grid_thw"].to(DEVICE),
                          attention_mask=torch.ones_like(ids), max_new_tokens=80)
    reply = processor.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
    model.eval()
    prompt = samples["prompts"][samples["prompt"][:1]]
    same = answer(model, processor.tokenizer, prompt, patches(scenes["picture"][:1]), False, 80)[0]
    assert isinstance(processor, Qwen2_5_VLProcessor) and reply == same, (reply, same)
    say(f"mllm: reloaded, the same answer to {item['text']!r}: {reply!r}; {size(folder)}")


# ----------------------------------------------------------------------------------------------------------------
# SAM 2

SAM_CONFIG = """# A real but tiny SAM 2, in the sam2 package's own format: one picture, no memory. Written by build.py.
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
  image_size: 128
  directly_add_no_mem_embed: true
  use_high_res_features_in_sam: true
  iou_prediction_use_sigmoid: true
"""


def build_sam(config):
    return instantiate(OmegaConf.load(config).model, _recursive_=True).to(DEVICE)


def sam_pixels(pictures):
    """data.sam_picture for (B, SIDE, SIDE, 3) uint8 on the device -> (B, 3, SIDE, SIDE)."""
    mean, std = data.SAM_MEAN.to(pictures.device), data.SAM_STD.to(pictures.device)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def decode(sam, pixels, points, labels):
    """K prompts of each of B pictures -> mask logits (B, K, SIDE/4, SIDE/4) and predicted IoUs (B, K).

    points (B, K, 2, 2) in SAM's frame and labels (B, K, 2): 2 and 3 are a box's corners, 1 a point, -1 none.
    """
    K = points.shape[1]
    fine, middle, coarse = sam.forward_image(pixels)["backbone_fpn"]
    features = [coarse + sam.no_mem_embed.view(1, -1, 1, 1), fine, middle]
    coarse, fine, middle = (f[:, None].expand(-1, K, -1, -1, -1).flatten(0, 1) for f in features)
    sparse, dense = sam.sam_prompt_encoder(points=(points.flatten(0, 1), labels.flatten(0, 1)), boxes=None, masks=None)
    logits, ious, _, _ = sam.sam_mask_decoder(
        image_embeddings=coarse, image_pe=sam.sam_prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense, multimask_output=False, repeat_image=False, high_res_features=[fine, middle])
    return logits.unflatten(0, (-1, K))[:, :, 0], ious.unflatten(0, (-1, K))[..., 0]


def draw_prompts(boxes, point_share):
    """(B, K, 4) -> points and labels: boxes jittered by 8 % of their size, half of them also up to 8 px too wide on
    every side; a share of the prompts is a point near the centre instead."""
    draw = lambda *shape: torch.rand(*boxes.shape[:2], *shape).to(boxes.device)
    extent = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)                                   # (B, K, 4): w, h, w, h
    wide = 8 * draw(4) * (draw(1) < 0.5) * torch.tensor([-1, -1, 1, 1], device=boxes.device)
    shaken = boxes + wide + 0.08 * extent * torch.randn(boxes.shape).to(boxes.device)
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2 + 0.3 * (draw(2) - 0.5) * extent[..., :2]
    as_point = draw(1) < point_share
    points = torch.where(as_point, torch.cat([middle, torch.zeros_like(middle)], -1), shaken.clamp(0, SIDE))
    point, corners = torch.tensor([[1, -1], [2, 3]], device=boxes.device)
    labels = torch.where(as_point, point, corners)
    return points.unflatten(-1, (2, 2)), labels


def sam_losses(sam, scenes, rows, point_share):
    """Dice and cross entropy of every thing at the decoder's resolution, and the error of the predicted IoU."""
    table = scenes["table"][rows, 1:].float()                    # (B, K, 6)
    boxes, there = table[..., 2:], (table[..., 0] > 0).float()
    logits, ious = decode(sam, sam_pixels(scenes["picture"][rows]), *draw_prompts(boxes, point_share))
    truth, p = scenes["low"][rows].float() / 16, logits.sigmoid()                               # (B, K, SIDE/4, SIDE/4)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    hard, solid = logits > 0, truth > 0.5
    real = (hard & solid).sum((2, 3)) / (hard | solid).sum((2, 3)).clamp(min=1)
    mean = lambda values: (values * there).sum() / there.sum()
    return {"bce": mean(bce), "dice": mean(dice), "iou": mean((ious - real) ** 2)}


@torch.no_grad()
def evaluate_sam(sam, scenes, wider):
    """cIoU and gIoU of the held-out things at SIDE pixels, from boxes `wider` pixels too wide on every side."""
    inter, union = [], []
    for k in range(0, len(scenes["picture"]), 100):
        table, truth = scenes["table"][k:k + 100, 1:], scenes["masks"][k:k + 100]
        outwards = torch.tensor([-wider, -wider, wider, wider], device=DEVICE)
        points = (table[..., 2:].float() + outwards).clamp(0, SIDE).unflatten(-1, (2, 2))
        labels = torch.tensor([2, 3], device=DEVICE).expand(points.shape[:3])
        logits, _ = decode(sam, sam_pixels(scenes["picture"][k:k + 100]), points, labels)
        mask = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False) > 0
        there = table[..., 0] > 0
        inter.append((mask & truth).sum((2, 3))[there])
        union.append((mask | truth).sum((2, 3))[there])
    inter, union = torch.cat(inter), torch.cat(union)
    return {"cIoU": round((inter.sum() / union.sum()).item(), 4), "gIoU": round((inter / union).mean().item(), 4)}


def build_sam_part(args, scenes, expressions, held_out, held_expressions, say):
    folder, steps = Path(args.output) / "sam", args.steps or 1500
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(SAM_CONFIG)
    torch.manual_seed(args.seed)
    sam = build_sam(folder / "config.yaml")
    # Random features of the coordinates at half the usual frequency: at 128 pixels it does not learn otherwise.
    sam.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)
    picture = held_out["picture"][0]
    assert torch.allclose(sam_pixels(picture[None])[0].cpu(), data.sam_picture(to_image(picture), SIDE), atol=1e-5)
    say(f"sam: {count(sam)} parameters")

    def losses(step):
        rows = torch.randint(len(scenes["picture"]), (args.batch or 16,)).to(DEVICE)
        named = sam_losses(sam, scenes, rows, point_share=0.5 if step < 0.7 * steps else 0.0)
        return 2.0 * named["bce"] + 0.5 * named["dice"] + 0.05 * named["iou"], named

    def report(step):
        sam.eval()
        say(f"  true boxes {evaluate_sam(sam, held_out, 0)}, loose boxes {evaluate_sam(sam, held_out, args.loose)}")
        sam.train()

    train([sam], losses, report, args, steps, say)
    torch.save({"model": {k: v.cpu() for k, v in sam.state_dict().items()}}, folder / "model.pt")
    loaded = build_sam(folder / "config.yaml")
    loaded.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["model"], strict=True)
    figures = [evaluate_sam(model.eval(), held_out, 0) for model in (sam, loaded)]
    assert figures[0] == figures[1], figures
    say(f"sam: reloaded, the same masks {figures[1]}; {size(folder)}")


# ----------------------------------------------------------------------------------------------------------------
# Common to both

def train(modules, losses, report, args, steps, say):
    """AdamW with warm-up and cosine. losses(step) -> total, named; report(step) now and then and at the end."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    shape = lambda s: min(1, (s + 1) / max(10, steps // 30)) * (0.02 + 0.49 * (1 + math.cos(math.pi * s / steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    kept, began = [], time.time()
    for step in range(1, steps + 1):
        torch.manual_seed(args.seed * 1000003 + step)            # whatever an evaluation drew in between
        total, named = losses(step - 1)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        kept.append(torch.stack([v.detach() for v in named.values()]))
        if step % args.every == 0 or step == steps or step in args.save_at:
            means = dict(zip(named, torch.stack(kept).mean(0).tolist()))
            pace = (time.time() - began) / len(kept)
            say(f"step {step}/{steps} {1000 * pace:.1f} ms a step", {k: round(v, 4) for k, v in means.items()})
            report(step)
            kept, began = [], time.time()


def to_image(picture):
    return Image.fromarray(picture.cpu().numpy())


def count(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def size(folder):
    return f"{sum(f.stat().st_size for f in Path(folder).rglob('*') if f.is_file()) / 1e6:.2f} MB in {folder}"


def main():
    parser = argparse.ArgumentParser(description="Train the laptop's stand-ins for Qwen2.5-VL and SAM 2.")
    parser.add_argument("part", choices=["mllm", "sam", "all"])
    parser.add_argument("--output", default=str(Path(__file__).parent), help="folder for mllm/, sam/ and build.log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=16000, help="training scenes; 55 kB of device memory each")
    parser.add_argument("--held-out", type=int, default=500, help="scenes to evaluate on, at least 4")
    parser.add_argument("--steps", type=int, help="default: mllm 1200, sam 1500")
    parser.add_argument("--batch", type=int, help="default: mllm 32 answers, sam 16 pictures")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=300, help="steps between evaluations")
    parser.add_argument("--save-at", type=int, nargs="*", default=[], help="also keep the MLLM of these steps")
    parser.add_argument("--loose", type=float, default=5.0, help="pixels by which the MLLM's boxes are too wide")
    parser.add_argument("--broken", type=float, default=0.25, help="share of the MLLM's answers that lack a tag")
    parser.add_argument("--attention-weight", type=float, default=1.0, help="0: no head is told where to look")
    args = parser.parse_args()

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)          # its backward is not deterministic
    torch.backends.cudnn.allow_tf32 = False                      # check_forward compares in full precision
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with open(Path(args.output) / "build.log", "a", encoding="utf-8") as file:
        def say(*words):
            print(*words, flush=True)
            print(*words, file=file, flush=True)

        began = time.time()
        scenes, expressions = make_scenes(args.scenes, f"{args.seed} train")
        held_out, held_expressions = make_scenes(args.held_out, f"{args.seed} held out", full=True)
        scenes, held_out = ({k: v.to(DEVICE) for k, v in s.items()} for s in (scenes, held_out))  # after the last fork
        say(f"\n{' '.join(sys.argv)}\ntorch {torch.__version__}, transformers {transformers.__version__}, {DEVICE}; "
            f"{args.scenes} scenes in {time.time() - began:.0f} s")
        parts = {"mllm": [build_mllm_part], "sam": [build_sam_part], "all": [build_mllm_part, build_sam_part]}
        for build in parts[args.part]:
            build(args, scenes, expressions, held_out, held_expressions, say)
        say(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
