"""Lens: a multimodal LLM, context queries, a connector and SAM 2 (Eqs. 1-4); sampling; the group forward.

    Eq. 1   P_CoT, P_box = mllm.generate(p_sys, T, I)                      generate()
    Eq. 2   Q' = mllm.forward(p_sys, T, I, P_CoT, P_box, Q)                group_hidden(), Lens.forward()
    Eq. 3   Q_seg = connector(Q')                                          Connector
    Eq. 4   P_seg = sam(Q_seg, I)                                          SamHead

One group is a prompt and its G completions. They share the picture and the prompt, so the group is one packed row

    [prompt] [completion 1, M queries] [completion 2, M queries] ... [completion G, M queries]

in which completion i sees the prompt and itself only, at the positions it would have alone. The result is that of G
separate forwards (tests/test_model.py), for the cost of one prompt. The vision tower and SAM's image encoder run once
per picture. The released code forwards every sample in full and encodes every copy of the picture.

Departures. Positions are Qwen's 3-D M-RoPE in every pass; the released context pass falls back to 1-D ones
(`--positions 1d`). The connector hands all M tokens to SAM (our reading of Eq. 3); the released one squeezes them into
one (`--prompt-tokens one`). Logits exist for completion tokens only and in chunks, never as (L, V). `--profile released`
switches all that differs, and a folder that the authors published is read as it is (tests/extras/released.py).

Letters: B prompts, G samples per prompt, N = B * G, P prompt tokens, T completion tokens, L row length, M context
queries, C hidden size, V vocabulary, K prompt tokens to SAM, D SAM's width, S SAM's picture side.
"""
import copy
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import sam2
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from hydra.utils import instantiate
from huggingface_hub import hf_hub_download
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForImageTextToText,
                          AutoProcessor, DynamicCache, HfArgumentParser)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import LensError, extra, write_whole

# --- Settings that every script shares; each script adds its own dataclass ------------------------

def flag(default, help):
    """A dataclass field with the text that --help shows."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**make, metadata={"help": help})


@dataclass
class SharedArgs:
    mllm: str = flag("Qwen/Qwen2.5-VL-3B-Instruct", "Hugging Face id or folder of the multimodal LLM")
    sam: str = flag("weights/sam2_hiera_large.pt", "SAM 2 or 2.1: a checkpoint under its official name, a hub id "
                                                   "(facebook/sam2.1-hiera-large) or a folder (config.yaml, model.pt)")
    num_queries: int = flag(64, "M, context queries (Table 3)")
    connector: Literal["vit", "mlp"] = flag("vit", "connector between MLLM and SAM (Table 4)")
    connector_heads: int = flag(16, "attention heads of the ViT connector; must divide the MLLM's hidden size")
    prompt_tokens: Literal["all", "one"] = flag("all", "tokens SAM is prompted with: all M, or one squeezed from them "
                                                       "(released code)")
    prompt: Literal["paper", "released", "released-cot"] = flag("paper", "Fig. 4's prompt, or the released code's without "
                                                                         "and with reasoning")
    positions: Literal["mrope", "1d"] = flag("mrope", "positions in the context pass; 1d: the released code's")
    multimask: bool = flag(False, "outside stage 2, let SAM fall back on its multi-mask tokens where one mask is "
                                  "unstable (released code)")
    data: str = flag("datasets", "folder that holds the datasets, laid out as data.py says")
    datasets: list[str] = flag(["refcoco", "refcoco+", "refcocog"], "datasets to read below it, mixed in training")
    max_pixels: int = flag(0, "cap on the pixels of the MLLM's picture; 0 keeps the processor's own (default smart resize)")
    max_prompt: int = flag(2048, "longest prompt, in tokens; a longer one is an error, never cut")
    max_completion: int = flag(768, "longest completion, in tokens")
    precision: Literal["bf16", "fp32"] = flag("bf16", "compute precision of the MLLM and connector; masters are fp32")
    limit: int = flag(0, "use only so many training objects, or evaluation rows; 0 uses all")
    seed: int = flag(42, "the only source of randomness: data order, expressions, initial queries, samples")
    workers: int = flag(4, "processes that load pictures")

    def __post_init__(self):
        for name in ("num_queries", "connector_heads", "max_prompt", "max_completion"):
            if getattr(self, name) < 1:
                raise LensError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if min(self.workers, self.max_pixels, self.limit) < 0:
            raise LensError("--workers, --max-pixels and --limit must not be negative")


ARCHITECTURE = ("num_queries", "connector", "connector_heads", "prompt_tokens")
INHERITED = (*ARCHITECTURE, "prompt", "positions", "multimask")         # what stage 2 takes over from stage 1
PROFILES = {"paper": {}, "released": dict(
    prompt="released", positions="1d", multimask=True, prompt_tokens="one", max_pixels=1_000_000, context="true",
    iou_power=2.0, deviation="sample", lambda_format=0.0)}


def parse_settings(classes, presets, description):
    """Command line -> one instance per dataclass. Defaults come from the class, then from `--preset` and `--profile`, then
    from the run that `--checkpoint` names (all but --limit) or `--init` (its architecture); flags override all. An unknown
    flag or a value out of range ends with one line."""
    presets = {"2b": {"mllm": "Qwen/Qwen2-VL-2B-Instruct"}, "3b": {"mllm": "Qwen/Qwen2.5-VL-3B-Instruct"}, **presets}
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), help="defaults for a whole set-up; flags override them")
    parser.add_argument("--profile", choices=list(PROFILES), default="paper", help="whose choices are the defaults where "
                        "the paper and the released code differ")
    early = lambda: parser.parse_known_args([a for a in sys.argv[1:] if a not in ("-h", "--help")])[0]
    parser.set_defaults(**presets.get(early().preset, {}))
    parser.set_defaults(**PROFILES[early().profile])
    checkpoint, init = getattr(early(), "checkpoint", ""), getattr(early(), "init", "")
    try:
        if checkpoint:
            parser.set_defaults(**{name: value for name, value in read_run(checkpoint).items() if name != "limit"})
        elif init and (Path(init) / "lens.json").exists():
            parser.set_defaults(**{name: value for name, value in read_run(init).items() if name in INHERITED})
        values = vars(parser.parse_args())
        return [cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in classes]
    except LensError as error:
        parser.error(str(error))


def run(main):
    """A script's entry: an error meant for the user is one line, not a traceback."""
    try:
        main()
    except LensError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    if dist.is_initialized():
        dist.barrier()                                            # nobody leaves while another is still in a collective
        dist.destroy_process_group()


TINY = dict(mllm="tests/tiny/mllm", sam="tests/tiny/sam", num_queries=8, connector_heads=4, data="runs/shapes",
            datasets=["shapes"], max_completion=64, precision="fp32", workers=0)

# --- The parts: connector (Eq. 3) and SAM's head (Eq. 4) ------------------------------------------

class Block(nn.Module):
    """One pre-norm transformer block, bidirectional over the M queries."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):                                                    # (N, M, C)
        N, M, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(N, M, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, M, C))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))          # quick GELU


class Connector(nn.Module):
    """Eq. 3, Q_seg = connector(Q'): query states (N, M, C) -> SAM prompt embeddings (N, K, D), K = M or 1.

    "A shallow transformer" in the paper; four blocks, as in the released code. `kind="mlp"` is Table 4's other row."""

    def __init__(self, C, M, D, kind="vit", heads=16, prompt_tokens="all"):
        super().__init__()
        if kind == "vit" and C % heads:
            raise LensError(f"--connector-heads {heads} does not divide the MLLM's hidden size {C}")
        self.position = nn.Parameter(torch.randn(1, M, C) * 0.02) if kind == "vit" else None
        self.blocks = nn.ModuleList(Block(C, heads) for _ in range(4 if kind == "vit" else 0))
        self.squeeze = nn.Conv1d(C, C, kernel_size=M) if prompt_tokens == "one" else None
        self.to_sam = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, D))

    def forward(self, x):                                                    # (N, M, C)
        if self.position is not None:
            x = x + self.position
        for block in self.blocks:
            x = block(x)
        if self.squeeze is not None:
            x = self.squeeze(x.transpose(1, 2)).transpose(1, 2)              # (N, 1, C)
        return self.to_sam(x)


class SamHead(nn.Module):
    """Eq. 4: SAM 2 without its image encoder and without its video memory, under sam2's own parameter names.
    It stays in fp32: SAM 2 is not clean in bf16."""

    def __init__(self, sam):
        super().__init__()
        self.sam_prompt_encoder, self.sam_mask_decoder = sam.sam_prompt_encoder, sam.sam_mask_decoder
        self.no_mem_embed = sam.no_mem_embed

    def forward(self, features, prompts):
        """features: encode_pictures' three maps, (B, c, h, w) at strides 4, 8, 16; prompts (B, G, K, D)
        -> mask logits (B * G, S/4, S/4)."""
        decoder, G = self.sam_mask_decoder, prompts.shape[1]
        features = [f.float() for f in features]
        maps = [decoder.conv_s0(features[0]), decoder.conv_s1(features[1]),
                features[2] + self.no_mem_embed.view(1, -1, 1, 1)]
        # one picture's maps serve its G prompts: views for B = 1, copies only for B > 1
        maps = [m[:, None].expand(-1, G, -1, -1, -1).flatten(0, 1) for m in maps]
        _, dense = self.sam_prompt_encoder(points=None, boxes=None, masks=None)      # (1, D, S/16, S/16): "no mask"
        logits = decoder(image_embeddings=maps[2], image_pe=self.sam_prompt_encoder.get_dense_pe(),
                         sparse_prompt_embeddings=prompts.flatten(0, 1).float(), dense_prompt_embeddings=dense,
                         multimask_output=False, repeat_image=False, high_res_features=maps[:2])[0]
        return logits[:, 0].clone()                                          # FSDP warns of views that leave a unit

    def box_prompts(self, boxes):
        """Boxes (N, 4) in the SAM frame -> (N, 3, D), as SAM 2's predictor does it: two corner points and padding.
        What Seg-Zero prompts with; not used by Lens itself."""
        corners, labels = boxes.view(-1, 2, 2), torch.tensor([[2, 3]], device=boxes.device).expand(len(boxes), 2)
        return self.sam_prompt_encoder(points=(corners, labels), boxes=None, masks=None)[0]


# --- The group forward ----------------------------------------------------------------------------

def prompt_positions(mllm, batch):
    """3-D M-RoPE positions of each prompt: list of B (3, P_b) long, on the CPU."""
    grids = batch["grid_thw"].cpu()
    return [mllm.model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grids[b:b + 1])[0][:, 0]
            for b, (ids, types) in enumerate(zip(batch["ids"], batch["types"]))]


def context_positions(positions, kind):
    """Positions of the context pass: the MLLM's own, or 0, 1, 2, ... on all three axes (`--positions 1d`), which is what
    the released code's context pass falls back to."""
    return positions if kind == "mrope" else [torch.arange(p.shape[1]).expand(3, -1) for p in positions]


def pack_groups(prompt_ids, positions, completions, M, device="cpu"):
    """Lay out B groups as B packed rows.

    prompt_ids: B x (P_b,); positions: B x (3, P_b); completions: B x G x (T_i,) long, on the CPU.
    Returns a dict of tensors on `device`:
        ids (B, L)             prompt and completion tokens, 0 where a query or padding stands
        positions (3, B, L)    every completion continues from its prompt's end
        queries (N, M)         flat index b * L + l of each context query
        predictors (tokens,)   flat index of the state that predicts each completion token; the first token of every
                               completion is predicted by the prompt's last state
        targets (tokens,)      those tokens, completion by completion
        mask (N, T)            where they go in a padded (N, T) table: the completion mask
        group                  for group_attention: P; flat index of every token of a completion and its queries (N, S), 0
                               for padding; their mask (N, 1, S, P + S) over prompt and themselves; the slots of N * S that
                               hold a token
    """
    rows, lengths = [], [len(c) for group in completions for c in group]
    for ids, position, group in zip(prompt_ids, positions, completions):
        P, slots = len(ids), torch.zeros(M, dtype=torch.long)
        row = {"ids": [ids], "positions": [position], "rows": [], "queries": [], "predictors": []}
        start, first = P, int(position.max()) + 1
        for completion in group:
            T = len(completion)
            row["ids"] += [completion, slots]
            row["positions"].append((first + torch.arange(T + M)).expand(3, -1))
            row["rows"].append(start + torch.arange(T + M))
            row["predictors"].append(torch.cat([torch.tensor([P - 1]), start + torch.arange(T - 1)]))
            row["queries"].append(start + T + torch.arange(M))
            start += T + M
        rows.append({name: torch.cat(parts, -1) if name in ("ids", "positions") else parts for name, parts in row.items()})
    L = max(len(row["ids"]) for row in rows)
    pad = lambda name, value: torch.stack([F.pad(row[name], (0, L - len(row["ids"])), value=value) for row in rows])
    flat = lambda name: [index + b * L for b, row in enumerate(rows) for index in row[name]]
    P, S, N = max(map(len, prompt_ids)), max(lengths) + M, len(lengths)
    places = torch.stack([F.pad(row, (0, S - len(row)), value=-1) for row in flat("rows")])
    packed = {"ids": pad("ids", 0), "positions": pad("positions", 0).transpose(0, 1),
              "queries": torch.stack(flat("queries")), "predictors": torch.cat(flat("predictors")),
              "targets": torch.cat([c for group in completions for c in group]),
              "mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
              "prompts": torch.tensor([len(ids) for ids in prompt_ids]).repeat_interleave(N // len(rows)),
              "places": places.clamp(min=0), "slots": (places >= 0).flatten().nonzero()[:, 0]}
    packed = {name: value.to(device, non_blocking=True) for name, value in packed.items()}
    of_prompt = (torch.arange(P, device=device) < packed.pop("prompts")[:, None])[:, None].expand(N, S, P)
    causal = torch.ones(S, S, dtype=torch.bool, device=device).tril().expand(N, S, S)
    packed["group"] = P, packed.pop("places"), torch.cat([of_prompt, causal], 2)[:, None], packed.pop("slots")
    return packed


def group_attention(module, query, key, value, attention_mask, group=None, scaling=None, **kwargs):
    """Attention of a packed row: the prompt attends to itself, and every completion to the prompt and itself, so a sample
    pays for its own tokens only. Registered with transformers as "lens"; without `group` it is their sdpa attention.

    query (B, heads, L, d); key, value (B, kv heads, L, d); group: see pack_groups.
    Prompts are where rows begin, so one causal pass over the first P columns serves all B; for a prompt shorter than P
    that pass leaves its completions' first places wrong, and they are overwritten below. -> (B, L, heads, d)"""
    if group is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    P, places, mask, slots = group
    (B, heads, L, d), G = query.shape, len(places) // len(query)
    own = lambda x: x.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)                            # (N, heads, S, d)
    both = lambda x: torch.cat([x[:, :, :P].repeat_interleave(G, 0), own(x)], 2)                       # (N, heads, P + S, d)
    prompt = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P], is_causal=True, scale=scaling,
                                            enable_gqa=True)
    completions = F.scaled_dot_product_attention(own(query), both(key), both(value), attn_mask=mask, scale=scaling,
                                                 enable_gqa=True)
    out = F.pad(prompt, (0, 0, 0, L - P)).transpose(1, 2).flatten(0, 1)                                # (B * L, heads, d)
    completions = completions.transpose(1, 2).flatten(0, 1)                                            # (N * S, heads, d)
    return out.index_copy(0, places.flatten()[slots], completions[slots]).view(B, L, heads, d), None


AttentionInterface.register("lens", group_attention)
AttentionMaskInterface.register("lens", sdpa_mask)               # of the passes without a group


def embed(mllm, ids, batch):
    """Token embeddings (B, L, C) with each picture's features in their place -> what the language model takes them as.
    Qwen3-VL adds features of its vision tower's inner layers in its first layers as well."""
    features = mllm.model.get_image_features(batch["pixel_values"], batch["grid_thw"])
    embeds, of_picture = mllm.model.language_model.embed_tokens(ids), ids == mllm.config.image_token_id
    inputs = {"inputs_embeds": embeds.masked_scatter(of_picture[..., None],
                                                     torch.cat(features.pooler_output).to(embeds.dtype))}
    if mllm.config.model_type == "qwen3_vl":
        inputs["visual_pos_masks"] = of_picture
        joined = lambda layer: layer if torch.is_tensor(layer) else torch.cat(layer)   # one tensor in transformers 5.17
        inputs["deepstack_visual_embeds"] = [joined(layer) for layer in features.deepstack_features]
    return inputs


def group_hidden(mllm, batch, packed, queries=None):
    """Eq. 2 for whole groups: the MLLM's last hidden states, flat (B * L, C), of packed rows."""
    if mllm.config.text_config._attn_implementation != "lens":               # any other would ignore `group`
        mllm.set_attn_implementation({"text_config": "lens"})
    inputs = embed(mllm, packed["ids"], batch)
    B, L, C = inputs["inputs_embeds"].shape
    if queries is not None:                                                  # (M, C), the same for all N completions
        flat, where = inputs["inputs_embeds"].view(B * L, C), packed["queries"].flatten()
        flat = flat.index_copy(0, where, queries.to(flat.dtype).repeat(len(packed["queries"]), 1))
        inputs["inputs_embeds"] = flat.view(B, L, C)
    return mllm.model.language_model(**inputs, position_ids=packed["positions"], use_cache=False, group=packed["group"]
                                     ).last_hidden_state.view(B * L, C)


@torch.no_grad()
def read_answers(mllm, batch, positions, answers):
    """Stage 1, where nothing before the queries is trained: prompt and answer of each of B prompts, without gradients.
    -> {"cache", "attention" (B, P + T), "first" (B,): the position after each answer} for Lens.forward to go on from."""
    after = [torch.cat([p, (int(p.max()) + 1 + torch.arange(len(a))).expand(3, -1)], -1) for p, a in zip(positions, answers)]
    longer = {**batch, "ids": [torch.cat(pair) for pair in zip(batch["ids"], answers)]}
    return dict(zip(("cache", "attention", "first"), prefill(mllm, longer, after, 1)[1:]))


def query_states(mllm, read, queries):
    """Eq. 2 for the M queries alone, after what `read_answers` has read. -> (B, M, C)"""
    B, M = len(read["first"]), len(queries)
    attention = torch.cat([read["attention"], read["attention"].new_ones(B, M)], 1)
    position = (read["first"][:, None] + torch.arange(M, device=queries.device)).expand(3, B, M)
    return mllm.model.language_model(inputs_embeds=queries.to(mllm.lm_head.weight.dtype).expand(B, -1, -1),
                                     attention_mask=attention, position_ids=position, past_key_values=read["cache"],
                                     use_cache=True).last_hidden_state


def policy_logits(lm_head, hidden, forbidden, temperature):
    """Logits (n, V) in fp32 of the policy that is sampled and trained: the same temperature and the same forbidden
    tokens in both places, else the objective's probabilities are not those of the samples."""
    return (lm_head(hidden).float() / temperature).masked_fill(forbidden, -1e9)


def token_log_probs(lm_head, hidden, targets, forbidden, temperature=1.0, chunk=128):
    """Log-probabilities of `targets` (n,) under states (n, C), and the policy's entropy there (no gradient).

    A chunk's logits are made again in the backward pass, so that no (n, V) table outlives its chunk."""
    def one_chunk(h, t):
        log_p = policy_logits(lm_head, h, forbidden, temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, t[:, None])[:, 0], entropy
    parts = [checkpoint(one_chunk, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    return tuple(torch.cat(column) for column in zip(*parts))


def completion_table(values, mask):
    """Values (tokens,) of all completions, one after another -> (N, T), 0 where there is no token."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


class Lens(nn.Module):
    """The whole model. Whatever is trained takes part in `forward`: FSDP gathers and reduces around this one call."""

    def __init__(self, mllm, sam, args, forbidden, eos):
        super().__init__()
        C, D = mllm.config.text_config.hidden_size, sam.sam_prompt_encoder.embed_dim
        self.mllm, self.image_encoder, self.sam = mllm, sam.image_encoder, SamHead(sam)
        scale = mllm.config.text_config.initializer_range
        self.queries = nn.Parameter(torch.randn(args.num_queries, C) * scale)       # Q, drawn like token embeddings
        self.connector = Connector(C, args.num_queries, D, args.connector, args.connector_heads, args.prompt_tokens)
        self.register_buffer("forbidden", forbidden, persistent=False)              # (V,) bool: never sampled
        self.M, self.eos, self.sam_size = args.num_queries, eos, sam.image_size
        self.prompt, self.positions = args.prompt, args.positions
        self.sam.sam_mask_decoder.dynamic_multimask_via_stability = args.multimask      # in eval mode only

    @torch.no_grad()
    def encode_pictures(self, sam_pixels):
        """(B, 3, S, S) -> SAM's feature maps at strides 4, 8 and 16. Frozen in both stages, once per picture."""
        with torch.autocast(sam_pixels.device.type, torch.bfloat16, enabled=sam_pixels.is_cuda):
            return self.image_encoder(sam_pixels)["backbone_fpn"]

    def forward(self, batch, packed, features, temperature=1.0, with_log_probs=True):
        """One packed pass over B groups; in stage 1 `packed` is what read_answers gives.

        -> mask_logits (N, S/4, S/4) and query_states (N, M, C); with_log_probs also log_probs and entropy (N, T)."""
        if "cache" in packed:
            out = {"query_states": query_states(self.mllm, packed, self.queries)}
        else:
            hidden = group_hidden(self.mllm, batch, packed, self.queries)
            out = {"query_states": hidden[packed["queries"]]}                       # Q' of Eq. 2
        prompts, B = self.connector(out["query_states"].to(self.connector.to_sam[0].weight.dtype)), len(batch["ids"])
        out["mask_logits"] = self.sam(features, prompts.view(B, -1, *prompts.shape[1:]))
        if with_log_probs:
            log_probs, entropy = token_log_probs(self.mllm.lm_head, hidden[packed["predictors"]], packed["targets"],
                                                 self.forbidden, temperature)
            out["log_probs"] = completion_table(log_probs, packed["mask"])
            out["entropy"] = completion_table(entropy, packed["mask"])
        return out


class Reference(nn.Module):
    """The frozen policy of the KL term (Eq. 9): the same packed pass, without queries."""

    def __init__(self, mllm, forbidden):
        super().__init__()
        self.mllm = mllm.requires_grad_(False)
        self.register_buffer("forbidden", forbidden, persistent=False)

    @torch.no_grad()
    def forward(self, batch, packed, temperature=1.0):
        hidden = group_hidden(self.mllm, batch, packed)
        log_probs, _ = token_log_probs(self.mllm.lm_head, hidden[packed["predictors"]], packed["targets"], self.forbidden,
                                       temperature)
        return completion_table(log_probs, packed["mask"])


def full_size_masks(logits, size):
    """Mask logits (G, S/4, S/4) -> (G, H, W) bool at the picture's own size, as SAM 2's post-processing does: SAM's square
    covers the whole picture, so this is one bilinear resize."""
    return F.interpolate(logits[None].float(), tuple(size), mode="bilinear", align_corners=False)[0] > 0


# --- Sampling (Eq. 1) -----------------------------------------------------------------------------

def pick_tokens(logits, uniforms=None):
    """One token per row of (n, V): the most likely one, or by inverse CDF from uniforms (n,) in [0, 1)."""
    if uniforms is None:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).double().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cdf, target, right=True)[:, 0]     # the first interval that holds u; never one of width 0
    return found.clamp(max=logits.shape[-1] - 1)                   # NaN finds none: training stops at its loss, not here


def draw_uniforms(seed, step, prompts, G, T):
    """(len(prompts) * G, T) in [0, 1): a row is a function of (seed, step, place of the prompt in the batch, g) alone."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, step, prompt, g]).random(T)
                                      for prompt in prompts for g in range(G)]))


def prefill(mllm, batch, positions, G):
    """Run B prompts once, padded on the left so that they end together, and repeat their cache G times.
    -> last hidden states (N, C), cache, attention mask (N, P), first position after each prompt (N,)."""
    device, P = batch["pixel_values"].device, max(len(ids) for ids in batch["ids"])
    left = lambda x: F.pad(x, (P - x.shape[-1], 0))
    ids = torch.stack([left(ids) for ids in batch["ids"]]).to(device)                                       # (B, P)
    attention = torch.stack([left(torch.ones_like(ids)) for ids in batch["ids"]]).to(device)
    position = torch.stack([left(p) for p in positions], 1).to(device)                                      # (3, B, P)
    cache = DynamicCache(config=mllm.config.text_config)
    hidden = mllm.model.language_model(**embed(mllm, ids, batch), position_ids=position, attention_mask=attention,
                                       past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    cache.batch_repeat_interleave(G)
    return (hidden.repeat_interleave(G, 0), cache, attention.repeat_interleave(G, 0),
            (position.amax((0, 2)) + 1).repeat_interleave(G))


@torch.no_grad()
def generate(mllm, batch, positions, G, max_new, eos, forbidden, uniforms=None, temperature=1.0):
    """Eq. 1: G completions of each of B prompts, all decoded as one batch, each prompt prefilled once.

    uniforms: (N, max_new) double, one row per sample drawn before sampling, so that a sample depends on neither rank,
    batch nor world size; None decodes greedily. Returns (completions, finished): B lists of G (T_i,) long CPU tensors,
    the end token included, and B lists of G bools, False where the limit cut the completion.
    """
    training, lm = mllm.training, mllm.model.language_model
    mllm.eval()                                                  # in training mode checkpointing would drop the cache
    hidden, cache, attention, next_position = prefill(mllm, batch, positions, G)
    N, device = len(hidden), hidden.device
    alive = torch.arange(N, device=device)                       # the samples that the decoding batch still holds
    tokens, done = torch.full((N, max_new), eos, device=device), torch.zeros(N, dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = policy_logits(mllm.lm_head, hidden, forbidden, temperature)
        token = pick_tokens(logits, None if uniforms is None else uniforms[alive, t])
        token = torch.where(done[alive], eos, token)             # what follows the end token is cut off below
        tokens[alive, t], done[alive] = token, done[alive] | (token == eos)
        if t + 1 == max_new:
            break
        if t % 8 == 7:                                           # one host sync per eight tokens
            running = (~done[alive]).nonzero()[:, 0]
            if len(running) == 0:
                break
            if len(running) <= len(alive) // 2:                  # half have ended: drop them, so that few shapes occur
                cache.batch_select_indices(running)
                alive, token, attention = alive[running], token[running], attention[running]
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
        hidden = lm(inputs_embeds=lm.embed_tokens(token[:, None]), attention_mask=attention, past_key_values=cache,
                    position_ids=(next_position[alive] + t).expand(3, 1, -1).transpose(1, 2), use_cache=True
                    ).last_hidden_state[:, -1]
    mllm.train(training)
    lengths = torch.where(done, (tokens == eos).int().argmax(1) + 1, max_new).tolist()
    rows = [row[:length] for row, length in zip(tokens.cpu(), lengths)]
    group = lambda flat: [flat[i:i + G] for i in range(0, N, G)]
    return group(rows), group(done.tolist())


# --- Loading and saving ---------------------------------------------------------------------------

SAM_CONFIGS = {file: config for config, file in HF_MODEL_ID_TO_FILENAMES.values()}       # official file name -> its yaml


def load_sam(path, with_weights=True):
    """SAM 2 from a folder (config.yaml, model.pt), a checkpoint under its official name or a hub id; the sam2 package holds
    the official configurations. Built from that yaml as sam2.build_sam does without post-processing; loaded strictly."""
    if path in HF_MODEL_ID_TO_FILENAMES and with_weights:
        try:
            path = hf_hub_download(path, HF_MODEL_ID_TO_FILENAMES[path][1])
        except (OSError, ValueError) as error:
            file = HF_MODEL_ID_TO_FILENAMES[path][1]
            raise LensError(f"--sam {path}: could not be fetched. Where there is a network: hf download {path} {file} "
                            f"--local-dir weights; then --sam weights/{file} ({str(error).splitlines()[0]})") from None
    path = Path(HF_MODEL_ID_TO_FILENAMES.get(str(path), (0, path))[1])
    if path.is_dir():
        config, weights, remedy = path / "config.yaml", path / "model.pt", "A folder has config.yaml and model.pt"
    elif path.name in SAM_CONFIGS:
        config, weights = Path(sam2.__path__[0]) / SAM_CONFIGS[path.name], path
        remedy = (f"Download it: hf download facebook/{path.stem.replace('_', '-')} {path.name} --local-dir {path.parent}; "
                  f"or try the method without any download: --preset tiny")
    else:
        raise LensError(f"--sam {path}: not a folder, not one of SAM 2's file names ({', '.join(SAM_CONFIGS)}), and not one "
                        f"of its hub ids ({', '.join(HF_MODEL_ID_TO_FILENAMES)})")
    for file in (config, weights) if with_weights else (config,):
        if not file.exists():
            raise LensError(f"{file} is missing. {remedy}.")
    sam = instantiate(OmegaConf.load(config).model, _recursive_=True)
    try:
        if with_weights:
            sam.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])
    except Exception as error:
        raise LensError(f"{weights}: not the weights of {config} ({str(error)[:300]})") from None
    return sam


def load_mllm(path, dtype):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL by its own config, and its processor. Never cast a Qwen model afterwards as a
    whole: its rotary frequencies are a buffer that must stay fp32."""
    try:
        family = AutoConfig.from_pretrained(path).model_type
        if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            raise ValueError(f"its config says {family}, which is none of qwen2_vl, qwen2_5_vl, qwen3_vl")
        return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype), AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise LensError(f"--mllm {path}: could not be loaded. Download it (hf download {path}) or give the "
                         f"folder that holds its config.json and safetensors; or try the method without any download: "
                         f"--preset tiny. ({str(error).splitlines()[0]})") from None


def forbidden_tokens(tokenizer, vocab_size, prompt="paper"):
    """(V,) bool: what must never be sampled. Every special token but the end token (a sampled picture token would break
    the next forward), and rows of the vocabulary beyond the tokenizer's last token. Answers to the released prompts may
    hold Qwen's own marks of an object and its box."""
    forbidden = torch.arange(vocab_size) >= len(tokenizer)
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = () if prompt == "paper" else ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
    forbidden[[i for i, token in special.items() if token not in marks]] = True
    forbidden[tokenizer.eos_token_id] = False
    return forbidden


def is_released(folder):
    return bool(folder) and not (Path(folder) / "lens.json").exists() and (Path(folder) / "config.json").exists()


def read_run(folder):
    """The shared settings of a finished run, or those that a published checkpoint needs."""
    if is_released(folder):
        return {**PROFILES["released"], **extra("released").settings(Path(folder))}
    try:
        return json.loads((Path(folder) / "lens.json").read_text())
    except OSError:
        raise LensError(f"{folder}: no finished run here (lens.json is missing). Train one first: align.py, then "
                        f"train_rl.py.") from None


def build_lens(args, folder=None, dtype=torch.float32):
    """-> (Lens, processor). With `folder`, a run's export: its MLLM (where it trained one), context module and SAM head; or
    a folder as the authors published it."""
    folder, released = folder and Path(folder), is_released(folder)
    saved = read_run(folder) if folder else {}
    for name in ARCHITECTURE:
        if saved and getattr(args, name) != saved[name]:
            raise LensError(f"{folder} was trained with --{name.replace('_', '-')} {saved[name]}, not {getattr(args, name)}")
    sam = load_sam(args.sam, with_weights=not released)
    if released:
        mllm, context, wrong = extra("released").load_released(folder, sam, dtype)
        processor = AutoProcessor.from_pretrained(folder)
    else:
        args.mllm = str(folder / "mllm") if folder and (folder / "mllm").exists() else args.mllm
        mllm, processor = load_mllm(args.mllm, dtype)
    if args.max_pixels:
        processor.image_processor.size = {**dict(processor.image_processor.size), "longest_edge": args.max_pixels}
    torch.manual_seed(args.seed)                                                # the initial queries and connector
    forbidden = forbidden_tokens(processor.tokenizer, mllm.lm_head.out_features, args.prompt)
    lens = Lens(mllm, sam, args, forbidden, processor.tokenizer.eos_token_id)
    if released:
        extra("released").fill_context(folder, context_module(lens), context, wrong)
    for name, module in (("context", context_module(lens)), ("sam", lens.sam)) if folder and not released else ():
        try:
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise LensError(f"{folder / name}.safetensors does not fit --mllm {args.mllm} and --sam {args.sam}: it "
                            f"belongs to another architecture ({str(error).splitlines()[0]})") from None
    return lens, processor


def context_module(lens):
    """Queries and connector under one state dict, the part that stage 1 trains."""
    module = nn.Module()
    module.queries, module.connector = lens.queries, lens.connector
    return module


def export(folder, lens, args, mllm=None):
    """Write a folder for use: context.safetensors, sam.safetensors, lens.json and, where it was trained, mllm/ as
    save_pretrained writes it (transformers and vLLM load it unchanged). `mllm` is (module, processor), unsharded.
    Written beside and moved in, lens.json last: what has a lens.json is whole. Every rank calls this; rank 0 writes."""
    full = lambda module: {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().contiguous()
                           for n, p in module.state_dict().items()}
    context, sam = full(context_module(lens)), full(lens.sam)
    if dist.get_rank() == 0:
        folder, building = Path(folder), Path(folder) / "export.tmp"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save_file(context, building / "context.safetensors")
        save_file(sam, building / "sam.safetensors")
        if mllm:
            mllm[0].save_pretrained(building / "mllm")
            mllm[1].save_pretrained(building / "mllm")
        (folder / "lens.json").unlink(missing_ok=True)
        for path in sorted(building.iterdir()):
            shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
        write_whole(folder / "lens.json", json.dumps(asdict(args), indent=2))
        building.rmdir()
    dist.barrier()


# --- Processes: torch.distributed, FSDP2, resumable checkpoints -----------------------------------

def start_processes(kind="full"):
    """-> rank, world size, device, mesh. Under torchrun N processes; without it one, through the same code. The mesh of
    kind "hybrid" is (nodes, processes of a node): shards within a node, copies between nodes."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    world, of_node = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape = (world,) if kind == "full" else (world // of_node, of_node)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shards")[-len(shape):])
    return dist.get_rank(), world, device, mesh


# Parts of SAM's head that one mask from given prompt embeddings never runs a gradient through
NEVER_TRAINED = ("point_embed", "not_a_point", "mask_downscaling", "iou_prediction_head", "pred_obj_score_head",
                 "hypernetworks_mlps.1", "hypernetworks_mlps.2", "hypernetworks_mlps.3")


def set_trainable(lens, stage):
    """Stage 1 trains the context queries and the connector; stage 2 everything but SAM's image encoder (Fig. 2).
    -> the frozen parameters, which `shard` keeps whole on every rank."""
    lens.requires_grad_(stage == "rl")
    lens.image_encoder.requires_grad_(False)
    context_module(lens).requires_grad_(True)
    for name, parameter in lens.sam.named_parameters():
        if any(part in name for part in NEVER_TRAINED):
            parameter.requires_grad_(False)
    return [p for p in lens.parameters() if not p.requires_grad]


def shard(module, mesh, precision, replicated=(), reshard=True, offload=False):
    """FSDP2: each transformer block a unit, SAM's head a unit in fp32, the rest in the root. fp32 masters, compute in
    `precision`, gradients reduced in fp32. `replicated` parameters (the frozen ones) stay whole on every rank; `reshard`
    frees a unit's gathered weights between its forward and its backward; `offload` keeps shards in CPU memory. The module
    comes on the CPU and is moved unit by unit, so that no GPU ever holds the whole of it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "ignored_params": set(replicated), "reshard_after_forward": reshard,
               "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    trained = lambda unit: not set(unit.parameters()) <= options["ignored_params"]
    units = [*module.mllm.model.visual.blocks, *module.mllm.model.language_model.layers]
    units += [*module.connector.blocks] if isinstance(module, Lens) else []
    for unit in units:
        if trained(unit):
            fully_shard(unit, mp_policy=policy, **options)
    if isinstance(module, Lens) and trained(module.sam):
        fully_shard(module.sam, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32), **options)
    for parameter in replicated:                                  # FSDP moves all else, buffers too
        parameter.data = parameter.data.to(mesh.device_type)
    return fully_shard(module, mp_policy=policy, **options)


def copy_mllm(mllm, precision, device="cpu"):
    """An unsharded copy in the compute precision: what samples, and the reference. Cast parameter by parameter, so that no
    second fp32 model exists meanwhile; buffers keep their precision (see load_mllm)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made = {id(p): nn.Parameter(p.detach().to(device, dtype, copy=True), requires_grad=False) for p in mllm.parameters()}
    return copy.deepcopy(mllm, made).to(device).eval()                        # deepcopy takes `made` as already copied


@torch.no_grad()
def refresh(twin, lens):
    """twin <- the policy's sharded weights, one of FSDP's units after another: a unit is one bucket, cast before it is
    gathered. A collective: every rank calls it, after every update, or some ranks would sample from a stale model."""
    for unit in lens.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            for target, parameter in zip(twin.parameters(), lens.mllm.parameters()):
                if not isinstance(parameter, DTensor):                   # one of those that the unit holds
                    target.copy_(parameter)
            unit.reshard()


TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)      # not strict: the frozen ones are not in the state


def save_checkpoint(folder, step, lens, optimizer, keep=2):
    """For resuming: FOLDER/checkpoints/step_N holds what is trained, the optimizer and the step. All else (data order,
    samples, learning rate) is a function of the seed and the step. Written under another name and renamed; then all
    but the last `keep` go."""
    target = Path(folder) / "checkpoints" / f"step_{step:06d}"
    building = target.with_name(f"building_{step:06d}")
    if dist.get_rank() == 0:
        for leftover in target.parent.glob("building_*"):                # of a run that was killed while saving
            shutil.rmtree(leftover)
        target.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights, state = get_state_dict(lens, optimizer, options=TRAINED)
    dcp.save({"weights": weights, "optimizer": state, "step": torch.tensor(step)}, checkpoint_id=str(building))
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
        for old in sorted(target.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder, lens, optimizer):
    """Restore the latest complete checkpoint, on any number of processes. -> its step, 0 where there is none."""
    found = sorted((Path(folder) / "checkpoints").glob("step_*"))
    if not found:
        return 0
    weights, state = get_state_dict(lens, optimizer, options=TRAINED)
    saved = {"weights": weights, "optimizer": state, "step": torch.tensor(0)}
    try:
        dcp.load(saved, checkpoint_id=str(found[-1]))
    except (Exception, CheckpointException) as error:                    # the latter is no Exception
        raise LensError(f"{found[-1]} does not fit this model: it was written with other settings, or is damaged. Use "
                        f"another --output, or the settings of that run ({str(error).strip().splitlines()[-1]})") from None
    set_state_dict(lens, optimizer, model_state_dict=saved["weights"], optim_state_dict=saved["optimizer"],
                   options=TRAINED)
    return int(saved["step"])
