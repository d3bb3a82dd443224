"""What a group costs: our step of stage 2 beside a straightforward implementation.

    python tests/evidence/benchmark.py          # about 70 minutes of one core
    python tests/evidence/benchmark.py --pair   # only P = 591 beside P = 1,400: five minutes
    python tests/evidence/benchmark.py --page   # only benchmark.md, from benchmark.json

One prompt with its image, G completions of T tokens, M context queries, and the same random weights
in three ways:

    group     ours: generate, Lens.forward and backward, as train_rl.py calls them
    single    the straightforward step, written out below, one sample at a time: every sample in
              full (prompt, image, completion, queries), logits and log-probabilities at every
              position, SAM's encoder for every sample
    batch     the same with the G samples as one padded batch

Parts: prefill, until the first token; decode, the further tokens (16 of T are run, and scaled);
policy, forward and backward of MLLM and connector; segmentation, SAM's encoder, and its decoder
forward and backward; step, all of these and the log-probabilities under the reference. The
optimizer's update is the same in all ways and left out. Advantages are given; otherwise `single`,
which frees a sample's graph before the next one, would run everything twice to know its group's
rewards.

The model is real Qwen2.5-VL and SAM 2 code, of a size that one core can run, with the proportions
of the 3B model and SAM2-Large (REAL below): MLLM to SAM, vision tower to language model, lm_head
and attention as small as they are there. This gives few and wide layers and a small vocabulary. No
way uses gradient checkpointing.

How much a group gains depends on its prompt. So two prompts are also measured side by side, in
interleaved runs of one process: P = 591, which is a COCO image of 640 x 480 and 200 tokens of text,
and P = 1,400. There the policy runs without context queries too, as in plain GRPO (text_policy).

Time is CPU time of the one thread, the median of interleaved runs. Memory is the peak of a fresh
process, less what stood before the part. Arithmetic is counted operator by operator while the part
runs; causal attention counts half, which is what its kernel does. Before anything is timed, all
three ways must give the same log-probabilities and mask logits (within 1e-4) and gradients (within
1e-3 of the largest).

Writes docs/evidence/benchmark.json and benchmark.md. tests/tools/gpu.py runs the straightforward
step on a GPU.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.modeling.sam.transformer import TwoWayTransformer
from tiny_runs import EVIDENCE, ROOT, markdown_table, read_json, write_json
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from align import segmentation_loss
from grpo import completion_table, grpo_loss, pack_groups, token_log_probs
from model import Lens, group_hidden, prompt_positions, set_trainable
from train_rl import (MicroBatch, Reference, RLArgs, backward, copy_mllm, draw_uniforms, generate)

# Qwen2.5-VL-3B and SAM2-Large, Tflop of one sample's forward in full at P = 1400 (1200 of them
# image), T = 200, M = 64; counted on the meta device. One step of a sample is about five MLLM
# forwards (prefill, reference, policy and its backward).
REAL = {"vision": 6.66, "language": 10.05, "lm_head": 1.04, "SAM": 1.82}
M, V, S, D = 64, 2048, 256, 32
DECODED = 16                                                 # tokens that are really decoded
IMAGE, START, END = V - 1, V - 2, V - 3                      # token ids
# P -> height and width of the image in tokens; the other 200 or so are words
IMAGES = {256: (7, 8), 512: (24, 13), 591: (17, 23), 1000: (25, 32), 1400: (30, 40)}
EVEN, MIXED = [200] * 8, [50, 93, 136, 179, 221, 264, 307, 350]      # both 1,600 tokens
SETTINGS = {"headline": (1400, EVEN), "mixed": (1400, MIXED), "G=2": (1400, [200] * 2),
            "G=4": (1400, [200] * 4), "G=16": (1400, [200] * 16), "P=256": (256, EVEN),
            "P=512": (512, EVEN), "P=1000": (1000, EVEN)}
WAYS, PARTS = ("group", "single", "batch"), ("prefill", "decode", "policy", "segmentation", "step")
PAIR, PAIR_PARTS = (591, 1400), ("text_policy", "policy")    # each with completions of EVEN


# --- The models and one prompt --------------------------------------------------------------------

def build_mllm(seed):
    """A random Qwen2.5-VL of few and wide layers."""
    torch.manual_seed(seed)
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])
    text = dict(vocab_size=V, hidden_size=256, intermediate_size=2560, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
                pad_token_id=0, rope_parameters=rope)
    # windows alone, but larger ones, for attention's share
    vision = dict(depth=2, hidden_size=128, intermediate_size=1024, num_heads=2, patch_size=14,
                  window_size=224, out_hidden_size=256, fullatt_block_indexes=[])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE,
                              video_token_id=V - 4, vision_start_token_id=START,
                              vision_end_token_id=END, tie_word_embeddings=True)
    family = Qwen2_5_VLForConditionalGeneration
    return family._from_config(config, attn_implementation="sdpa").float()


def build_sam(width=56):
    """The stand-in's SAM 2 with a larger trunk; in the decoder, MLPs of 8 D and heads of 32 as in
    the real one."""
    config = OmegaConf.load(ROOT / "tests/tiny/sam/config.yaml").model
    config.image_size, trunk, neck = S, config.image_encoder.trunk, config.image_encoder.neck
    trunk.embed_dim, trunk.stages, trunk.global_att_blocks = width, [1, 2, 5, 1], [5, 7]
    neck.d_model = neck.position_encoding.num_pos_feats = D
    neck.backbone_channel_list = [8 * width, 4 * width, 2 * width, width]
    sam = instantiate(config, _recursive_=True)
    sam.sam_mask_decoder.transformer = TwoWayTransformer(depth=2, embedding_dim=D, mlp_dim=8 * D,
                                                         num_heads=D // 32)
    return sam


def random_words(n, generator):
    return torch.randint(0, V - 8, (n,), generator=generator)


def random_prompt(image, words, generator):
    """A batch of one prompt: an image of this height and width in tokens, and so many words."""
    h, w = image
    ids = torch.cat([random_words(20, generator), torch.tensor([START]),
                     torch.full((h * w,), IMAGE), torch.tensor([END]),
                     random_words(words - 22, generator)])
    return {"prompt_ids": [ids], "token_types": [(ids == IMAGE).long()],
            "grid_thw": torch.tensor([[1, 2 * h, 2 * w]]),
            "pixel_values": torch.randn(4 * h * w, 1176, generator=generator)}


def build_world(P, lengths):
    """Models, a prompt of P tokens with an image, and completions of the given lengths."""
    settings = SimpleNamespace(num_queries=M, connector="vit", precision="fp32", sam_tokens="all",
                               prompt="paper", mask_pass="paper")
    lens = Lens(build_mllm(0), build_sam(), settings, torch.zeros(V, dtype=torch.bool), eos=-1)
    set_trainable(lens.train(), "rl")
    g, G = torch.Generator().manual_seed(0), len(lengths)
    batch = {**random_prompt(IMAGES[P], 200, g),
             "sam_pixels": torch.randn(1, 3, S, S, generator=g),
             "low_res_masks": (torch.rand(1, S // 4, S // 4, generator=g) > 0.7).float(),
             "low_res_weights": torch.ones(1, S // 4, S // 4)}
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    completions = [random_words(n, g) for n in lengths]
    positions = prompt_positions(lens.mllm, batch)
    return SimpleNamespace(
        lens=lens, sampler=copy_mllm(lens.mllm, "fp32"),
        reference=Reference(build_mllm(1), lens.forbidden), batch=batch, positions=positions,
        completions=completions, mask=mask, G=G, mean_length=sum(lengths) / G,
        packed=pack_groups(batch["prompt_ids"], positions, [completions], M),
        packed_text=pack_groups(batch["prompt_ids"], positions, [completions], 0),
        uniforms=draw_uniforms(0, 0, [0], G, DECODED + 1), old=torch.full(mask.shape, -7.6),
        advantages=torch.linspace(-1.5, 1.5, G)[None], args=RLArgs(group_size=G, batch=1),
        prompts=torch.randn(G, M, D, generator=g))           # for SAM, where it is measured alone


# --- Ours -----------------------------------------------------------------------------------------

class NoSam(nn.Module):
    """In SAM's place where the policy is measured alone. Prompt embeddings get a gradient that
    costs nothing."""

    def forward(self, features, prompts):
        return prompts.mean()


def group_forward(w, features):
    return w.lens(w.batch["pixel_values"], w.batch["grid_thw"], w.packed, features)


def group_policy(w):
    with mock.patch.dict(w.lens._modules, sam=NoSam()):
        out = group_forward(w, [w.batch["sam_pixels"]])      # of the features it asks how many
    loss, _ = grpo_loss(out["log_probs"], w.old, w.old, w.advantages[0], w.mask, w.args.clip_eps,
                        w.args.beta)
    (loss + out["mask_logits"]).backward()


def group_text_policy(w):
    hidden = group_hidden(w.lens.mllm, w.batch["pixel_values"], w.batch["grid_thw"], w.packed_text)
    log_probs, _ = token_log_probs(w.lens.mllm.lm_head, hidden[w.packed_text.target_places],
                                   w.packed_text.targets, w.lens.forbidden)
    loss, _ = grpo_loss(completion_table(log_probs, w.mask), w.old, w.old, w.advantages[0], w.mask,
                        w.args.clip_eps, w.args.beta)
    loss.backward()
    return loss.item()


def group_segmentation(w):
    features = w.lens.encode_images(w.batch["sam_pixels"])
    logits = w.lens.sam(features, w.prompts[None].clone().requires_grad_())
    segmentation_loss(logits, w.batch["low_res_masks"].expand_as(logits)).mean().backward()


def group_update(w):
    """All of a step but sampling."""
    features, zero = w.lens.encode_images(w.batch["sam_pixels"]), torch.zeros(1, w.G)
    ref_log_probs = w.reference(w.batch["pixel_values"], w.batch["grid_thw"], w.packed)
    micro = MicroBatch(batch=w.batch, packed=w.packed, features=features,
                       ref_log_probs=ref_log_probs, r_format=zero, r_box=zero, finished=zero == 0,
                       old_log_probs=w.old, r_mask=zero, reward=zero, advantages=w.advantages)
    backward(group_forward(w, features), micro, w.args, world=1)


# --- The straightforward step, n samples at a time: n = 1 is `single`, n = G is `batch` -----------

def chunks(w, n):
    return [slice(i, i + n) for i in range(0, w.G, n)]


def copies(w, n):
    """n copies of prompt and image, as in a batch that repeats its prompts."""
    ids, types = w.batch["prompt_ids"][0].repeat(n, 1), w.batch["token_types"][0].repeat(n, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types,
            "pixel_values": w.batch["pixel_values"].repeat(n, 1),
            "image_grid_thw": w.batch["grid_thw"].repeat(n, 1)}


def full_forward(w, mllm, rows, queries=None):
    """The samples of `rows` in full, each with its own copy of the image. -> log-probabilities
    (n, T), their mask, query states (n, M, C)"""
    prompt, completions = w.batch["prompt_ids"][0], w.completions[rows]
    n, P = len(completions), len(prompt)
    slots = torch.zeros(0 if queries is None else M, dtype=torch.long)
    sequences = [torch.cat([prompt, c, slots]) for c in completions]
    L, T = max(map(len, sequences)), max(map(len, completions))
    ids = torch.stack([F.pad(ids, (0, L - len(ids))) for ids in sequences])
    attention = torch.stack([F.pad(torch.ones_like(ids), (0, L - len(ids))) for ids in sequences])
    behind = w.positions[0].max() + 1 + torch.arange(L - P)
    positions = torch.cat([w.positions[0], behind.expand(3, -1)], 1)
    inputs = copies(w, n)
    features = mllm.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    embeds = mllm.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE)[..., None], torch.cat(features.pooler_output))
    embeds = embeds.clone()
    places = [slice(P + len(c), P + len(c) + len(slots)) for c in completions]
    for i in range(n if len(slots) else 0):
        embeds[i, places[i]] = queries
    out = mllm.model.language_model(inputs_embeds=embeds, attention_mask=attention, use_cache=False,
                                    position_ids=positions[:, None].expand(3, n, L))
    hidden = out.last_hidden_state
    log_probs = mllm.lm_head(hidden).float().log_softmax(-1)                             # (n, L, V)
    log_probs = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    states = torch.stack([hidden[i, places[i]] for i in range(n)])
    return log_probs[:, P - 1:P - 1 + T], w.mask[rows, :T], states


def masks(w, prompts):
    """Every sample with its own copy of the image through SAM's encoder and decoder. -> mask logits
    (n, S/4, S/4)"""
    images = w.batch["sam_pixels"].repeat(len(prompts), 1, 1, 1)
    with torch.no_grad():
        features = w.lens.image_encoder(images)["backbone_fpn"]
    return w.lens.sam(features, prompts[:, None])


def mask_loss(w, prompts):
    logits = masks(w, prompts)
    return segmentation_loss(logits, w.batch["low_res_masks"].expand_as(logits)).mean()


def full_policy(w, n, with_rest=False):
    """Forward and backward of n samples at a time; with_rest: reference and segmentation too."""
    for rows in chunks(w, n):
        old = ref = w.old[rows, :max(map(len, w.completions[rows]))]
        if with_rest:
            with torch.no_grad():
                ref = full_forward(w, w.reference.mllm, rows)[0]
        log_probs, mask, states = full_forward(w, w.lens.mllm, rows, w.lens.queries)
        loss, _ = grpo_loss(log_probs, old, ref, w.advantages[0, rows], mask, w.args.clip_eps,
                            w.args.beta)
        prompts = w.lens.connector(states)
        loss = loss + (mask_loss(w, prompts) if with_rest else prompts.mean())
        (loss * n / w.G).backward()


def full_text_policy(w, n):
    total = 0.0
    for rows in chunks(w, n):
        log_probs, mask, _ = full_forward(w, w.lens.mllm, rows)
        old = w.old[rows, :log_probs.shape[1]]
        loss, _ = grpo_loss(log_probs, old, old, w.advantages[0, rows], mask, w.args.clip_eps,
                            w.args.beta)
        (loss * n / w.G).backward()
        total += loss.item() * n / w.G
    return total


def full_segmentation(w, n):
    for rows in chunks(w, n):
        (mask_loss(w, w.prompts[rows].clone().requires_grad_()) * n / w.G).backward()


# --- The same numbers, then arithmetic, time and memory -------------------------------------------

def call(w, way, part):
    """Run one part in one way. The part "update" is a step without its sampling."""
    w.lens.mllm.set_attn_implementation({"text_config": "lens" if way == "group" else "sdpa"})
    w.lens.zero_grad()
    n, max_new = {"single": 1, "batch": w.G}.get(way), DECODED + 1
    if part in ("sampling", "step"):
        if way == "group":
            generate(w.sampler, w.batch, w.positions, w.G, max_new, -1, w.lens.forbidden,
                     w.uniforms)
        for _ in chunks(w, n) if n else ():
            w.sampler.generate(**copies(w, n), do_sample=True, top_k=0, max_new_tokens=max_new)
    if part == "text_policy":
        return full_text_policy(w, n) if n else group_text_policy(w)
    if part == "policy":
        full_policy(w, n) if n else group_policy(w)
    if part == "segmentation":
        full_segmentation(w, n) if n else group_segmentation(w)
    if part in ("update", "step"):
        full_policy(w, n, with_rest=True) if n else group_update(w)


def run(w, way, part, now):
    """-> {part: by how much now() rose}. The sampler's lm_head runs once for each token, so its
    calls tell prefill from decode."""
    calls, start = [], now()
    hook = w.sampler.lm_head.register_forward_hook(lambda *_: calls.append(now()))
    call(w, way, part)
    total, prefill, decode = now() - start, 0, 0
    hook.remove()
    for first, last in zip(calls[::DECODED + 1], calls[DECODED::DECODED + 1]):   # of each generate
        prefill, decode, start = prefill + first - start, decode + last - first, last
    scaled = decode / DECODED * (w.mean_length - 1)
    sampling = {"prefill": prefill, "decode": scaled} if calls else {}
    return {**sampling, part: total - decode + scaled}


def largest_differences(w):
    """-> the largest differences of both straightforward ways from ours. AssertionError if they are
    too large."""
    tensors, gradients = {}, {}
    for way, n in zip(WAYS, (None, 1, w.G)):
        call(w, way, "update")
        gradients[way] = {name: p.grad.clone() for name, p in w.lens.named_parameters()
                          if p.grad is not None}
        with torch.no_grad():
            if n:
                parts = [full_forward(w, w.lens.mllm, rows, w.lens.queries)
                         for rows in chunks(w, n)]
                logits = torch.cat([masks(w, w.lens.connector(states)) for *_, states in parts])
                tensors[way] = torch.cat([log_probs[mask] for log_probs, mask, _ in parts]), logits
            else:
                out = group_forward(w, w.lens.encode_images(w.batch["sam_pixels"]))
                tensors[way] = out["log_probs"][w.mask], out["mask_logits"]
    largest = {"log_probs": 0, "mask_logits": 0, "gradients": 0}
    for way in WAYS[1:]:
        assert gradients[way].keys() == gradients["group"].keys()
        values = [(a - b).abs().max().item() for a, b in zip(tensors[way], tensors["group"])]
        values.append(max(((gradient - gradients["group"][name]).abs().max()
                           / gradient.abs().max().clamp(min=1e-6)).item()
                          for name, gradient in gradients[way].items()))
        largest = {key: max(value, largest[key]) for key, value in zip(largest, values)}
    assert largest["log_probs"] < 1e-4 and largest["mask_logits"] < 1e-4, largest
    assert largest["gradients"] < 1e-3, largest
    return largest


# torch 2.11 does not count the CPU's attention yet
flop_registry.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
                         flop_registry[torch.ops.aten._scaled_dot_product_flash_attention])


class Arithmetic(TorchDispatchMode):
    """Counts floating point operations. torch's FlopCounterMode counts causal attention in full."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, formula = function(*args, **kwargs), flop_registry.get(function._overloadpacket)
        if formula:
            names = [argument.name for argument in function._schema.arguments]
            causal = {**dict(zip(names, args)), **kwargs}.get("is_causal")
            self.total += formula(*args, **kwargs, out_val=out) // (2 if causal else 1)
        return out


def kilobytes(field):
    """Of this process, as the kernel counts them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0])


def child(name, way, part):
    """In a fresh process: print arithmetic and peak memory of one part as a line of json."""
    w = build_world(*SETTINGS[name])
    Path("/proc/self/clear_refs").write_text("5")                            # the peak starts anew
    before = kilobytes("VmRSS")
    with Arithmetic() as counter:
        flops = run(w, way, part, lambda: counter.total)
    print(json.dumps({"gb": (kilobytes("VmHWM") - before) / 2 ** 20,
                      "gflop": {part: value / 1e9 for part, value in flops.items()}}))


def measure(name, repetitions):
    """One setting -> {part: {way: {gflop, gb, seconds}}}"""
    result = {part: {way: {} for way in WAYS} for part in (*PARTS, "sampling")}
    for part in ("sampling", "policy", "segmentation", "step"):
        for way in WAYS:
            command = [sys.executable, __file__, "--child", name, way, part]
            numbers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            result[part][way]["gb"] = numbers["gb"]
            for key, value in numbers["gflop"].items():
                result[key][way]["gflop"] = value
    w = build_world(*SETTINGS[name])
    for part in ("policy", "segmentation", "step"):
        runs = {way: [] for way in WAYS}
        for _ in range(repetitions):                         # A B C A B C, since machines drift
            for way in WAYS:
                runs[way].append(run(w, way, part, process_time))
        for way, rows in runs.items():
            for key in rows[0]:
                result[key][way]["seconds"] = statistics.median(row[key] for row in rows)
    return result


def token_ratio(P, queries):
    """Positions of the language model that the straightforward way has for each of ours, with
    completions of EVEN and so many queries behind each."""
    segments = sum(length + queries for length in EVEN)
    return (len(EVEN) * P + segments) / (P + segments)


def measure_pair(rounds):
    """The prompts of PAIR side by side: yields {P: {part: [a ratio for each round]}} after every
    round. A ratio is the time of the better of the other two ways over ours."""
    worlds = {P: build_world(P, EVEN) for P in PAIR}
    small = build_world(256, EVEN[:2])                       # to warm up
    losses = [call(small, way, "text_policy") for way in WAYS]
    assert max(losses) - min(losses) < 1e-5, losses
    ratios = {str(P): {part: [] for part in PAIR_PARTS} for P in PAIR}
    for _ in range(rounds):
        for P, w in worlds.items():
            for part in PAIR_PARTS:
                ours, *theirs = (run(w, way, part, process_time)[part] for way in WAYS)
                ratios[str(P)][part].append(min(theirs) / ours)
        yield ratios


# --- The page -------------------------------------------------------------------------------------

def over(part, key, ways=WAYS[1:]):
    """The cheapest of `ways` over ours."""
    return min(part[way][key] for way in ways) / part["group"][key]


def memory_of(result, part):
    """{way: GB}; prefill and decode are measured together, as sampling."""
    part = "sampling" if part in ("prefill", "decode") else part
    return {way: result[part][way]["gb"] for way in WAYS}


def parts_table(result):
    rows = []
    for part in PARTS:
        numbers = result[part]
        counted, measured = over(numbers, "gflop"), over(numbers, "seconds")
        cells = [numbers["group"]["gflop"], min(numbers[way]["gflop"] for way in WAYS[1:]), counted,
                 *(numbers[way]["seconds"] for way in WAYS), measured]
        gb = memory_of(result, part)
        memory = [f"{value:.2f}" for value in (*gb.values(), gb["group"] / gb["batch"])]
        if part == "decode":
            memory = ["in prefill's", "", "", ""]
        rows.append([part, *(f"{cell:.2f}" for cell in cells), f"{measured / counted:.0%}",
                     *memory])
    return markdown_table(["part", "Gflop ours", "theirs", "counted", "s ours", "single", "batch",
                           "measured", "reached", "GB ours", "single", "batch", "ours to batch"],
                          rows)


def sweep_table(results, names):
    rows = []
    for name in names:
        result, step, (P, lengths) = results[name], results[name]["step"], SETTINGS[name]
        cells = [over(step, "gflop"), over(step, "seconds"),
                 *(over(step, "seconds", [way]) for way in WAYS[1:]),
                 *(over(result[part], "seconds") for part in ("prefill", "policy", "segmentation")),
                 *(step["group"]["gb"] / step[way]["gb"] for way in WAYS[1:])]
        rows.append([f"P={P}, G={len(lengths)}", P + sum(n + M for n in lengths),
                     *(f"{cell:.2f}" for cell in cells)])
    return markdown_table(["", "our tokens", "step: counted", "measured", "to single", "to batch",
                           "prefill", "policy", "segmentation", "memory to single's",
                           "to batch's"], rows)


def pair_table(pair):
    """What a group gains with the two prompts of PAIR, for docs/speed.md. pair: None if it was not
    measured."""
    rows = []
    for P in PAIR:
        for queries, part in zip((0, M), PAIR_PARTS):
            ratios, time = pair and pair["ratios"][str(P)][part], "not measured yet"
            if ratios:
                middle = statistics.median(ratios)
                time = f"{middle:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
            rows.append([f"P = {P:,}, {queries or 'no'} queries", f"{token_ratio(P, queries):.1f}",
                         time])
    return markdown_table(["", "tokens, theirs / ours", "time, theirs / ours"], rows)


def pair_section(pair):
    if not pair:
        return ""
    rounds = len(pair["ratios"][str(PAIR[0])]["policy"])
    return f"""
## A prompt of RefCOCO beside a long one

A COCO image of 640 x 480 has 17 * 23 = 391 tokens; with 200 tokens of text P is 591. Forward and
backward of the policy, with T = 200 and G = 8, were measured with this prompt and with P = 1400 in
{rounds} interleaved rounds of one process, on {pair["machine"]}
(`python tests/evidence/benchmark.py --pair`). The load average was {pair["load"]:.1f} on
{pair["cores"]} cores: only the ratios mean something. docs/speed.md has the table.
"""


def page(data):
    """-> docs/evidence/benchmark.md"""
    results, head = data["results"], data["results"]["headline"]
    step, sam = (head[part]["single"]["gflop"] for part in ("step", "segmentation"))
    real = 5 * (REAL["vision"] + REAL["language"] + REAL["lm_head"]) / REAL["SAM"]
    differences = ", ".join(f"{key} {value:.0e}" for key, value in data["check"].items())
    return f"""# What a group costs

Made by `python tests/evidence/benchmark.py`, which took {data["minutes"]:.0f} minutes on
{data["machine"]}. It compares three ways to compute one group: ours, the G samples one by one
(single), and the G samples as one padded batch. The script's head says what the parts are.

A ratio above 1 says how many times more the other way needs. Where neither way is named, the better
one counts. `counted` is the ratio of arithmetic operations, `measured` that of seconds, `reached`
the second in per cent of the first.

In the straightforward step the MLLM needs {step / sam - 1:.0f} times SAM's arithmetic here, and
about {real:.0f} times with the 3B model and SAM2-Large. The three ways give the same numbers; the
largest differences are: {differences}.

## P = 1400, T = 200, M = 64, G = 8

{parts_table(head)}
## The same with completions of {MIXED[0]} to {MIXED[-1]} tokens

As many tokens in sum, but a padded batch pays for padding. Decoding is not told of the lengths.

{parts_table(results["mixed"])}
## Against G and P

{sweep_table(results, ["G=2", "G=4", "headline", "G=16"])}
{sweep_table(results, ["P=256", "P=512", "P=1000", "headline"])}{pair_section(data.get("pair"))}"""


def machine():
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(mode):
    began = perf_counter()
    about = {"machine": f"one thread of {machine()}, torch {torch.__version__}"}
    data = {} if mode == "all" else read_json("benchmark")
    if mode == "all":
        data = {**about, "check": largest_differences(build_world(*SETTINGS["mixed"])),
                "results": {}}
        for name in SETTINGS:
            data["results"][name] = measure(name, 3)
            print(f"{perf_counter() - began:5.0f} s  {name}", flush=True)
        data["minutes"] = (perf_counter() - began) / 60
    if mode in ("all", "--pair"):
        for ratios in measure_pair(3):
            data["pair"] = {**about, "load": os.getloadavg()[2], "cores": os.cpu_count(),
                            "ratios": ratios}
            write_json("benchmark", data)
            print(f"{perf_counter() - began:5.0f} s  {ratios}", flush=True)
    (EVIDENCE / "benchmark.md").write_text(page(data))


if __name__ == "__main__":
    torch.set_num_threads(1)
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main((sys.argv[1:] or ["all"])[0])
