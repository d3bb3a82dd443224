"""Lens: a multimodal LLM, context queries, a connector and SAM 2 (Eqs. 1-4).

    Eq. 1   P_CoT, P_box = mllm.generate(p_sys, T, I)             generate()
    Eq. 2   Q' = mllm.forward(p_sys, T, I, P_CoT, P_box, Q)       group_hidden(), Lens.forward()
    Eq. 3   Q_seg = connector(Q')                                 Connector
    Eq. 4   P_seg = sam(Q_seg, I)                                 SamHead

A group is a prompt and its G completions. They share picture and prompt, so it is one packed row

    [prompt] [completion 1, M queries] [completion 2, M queries] ... [completion G, M queries]

in which completion i sees the prompt and itself only, at the positions it would have alone. The
result is that of G separate forwards, for the cost of one prompt. The vision tower and SAM's image
encoder run once per picture. (The released code does all of it for every sample.)

Departures. Positions are Qwen's 3-D M-RoPE in every pass; the released context pass falls back to
1-D ones (`--positions 1d`). The connector hands all M tokens to SAM (our reading of Eq. 3); the
released one squeezes them into one (`--prompt-tokens one`). Logits exist for completion tokens only
and in chunks, never as (L, V). `--profile released` switches what flags can (README's table).

Letters: B prompts, G samples per prompt, N = B * G, P prompt tokens, T completion tokens, L row
length, M context queries, C hidden size, V vocabulary, K prompt tokens to SAM, D SAM's width, S
its picture side, H x W pixels."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sam2
import torch
import torch.nn as nn
import torch.nn.functional as F
from hydra.utils import instantiate
from huggingface_hub import hf_hub_download
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoModelForImageTextToText, AutoProcessor, DynamicCache)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import LensError
from grpo import completion_table, pick_tokens, policy_logits, token_log_probs

# --- The parts: connector (Eq. 3) and SAM's head (Eq. 4) ------------------------------------------

class Block(nn.Module):
    """One pre-norm transformer block, bidirectional over the M queries."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):                                                    # (N, M, C)
        N, M, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, M, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, M, d) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, M, C)
        x = x + self.proj(attended)
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))          # quick GELU


class Connector(nn.Module):
    """Eq. 3, Q_seg = connector(Q'): query states (N, M, C) -> SAM prompt embeddings (N, K, D).

    "A shallow transformer" in the paper; four blocks, as in the released code. `kind="mlp"` is
    Table 4's other row. K is M, or 1 where a convolution squeezes them, as in the released code."""

    def __init__(self, C, M, D, kind="vit", heads=16, prompt_tokens="all"):
        super().__init__()
        if kind == "vit" and C % heads:
            raise LensError(f"--connector-heads {heads} does not divide the MLLM's hidden size {C}")
        # as large as the states: with 0.02 all M tokens stay alike for long (docs/world.md)
        self.position = nn.Parameter(torch.randn(1, M, C)) if kind == "vit" else None
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
    """Eq. 4: SAM 2 without its image encoder and without its video memory, under sam2's own
    parameter names. It stays in fp32: SAM 2 is not clean in bf16."""

    def __init__(self, sam):
        super().__init__()
        self.sam_prompt_encoder = sam.sam_prompt_encoder
        self.sam_mask_decoder = sam.sam_mask_decoder
        self.no_mem_embed = sam.no_mem_embed

    def forward(self, features, prompts):
        """features: encode_pictures' three maps, (B, c, h, w) at strides 4, 8, 16; prompts (B, G,
        K, D) -> mask logits (B * G, S/4, S/4)."""
        decoder, G = self.sam_mask_decoder, prompts.shape[1]
        features = [f.float() for f in features]
        maps = [decoder.conv_s0(features[0]), decoder.conv_s1(features[1]),
                features[2] + self.no_mem_embed.view(1, -1, 1, 1)]
        # one picture's maps serve its G prompts: views for B = 1, copies only for B > 1
        maps = [m[:, None].expand(-1, G, -1, -1, -1).flatten(0, 1) for m in maps]
        _, dense = self.sam_prompt_encoder(points=None, boxes=None, masks=None)  # for "no mask"
        logits = decoder(image_embeddings=maps[2], image_pe=self.sam_prompt_encoder.get_dense_pe(),
                         sparse_prompt_embeddings=prompts.flatten(0, 1).float(),
                         dense_prompt_embeddings=dense, multimask_output=False, repeat_image=False,
                         high_res_features=maps[:2])[0]
        return logits[:, 0].clone()  # FSDP warns of views that leave a unit

    def box_prompts(self, boxes):
        """Boxes (N, 4) in the SAM frame -> (N, 3, D), as SAM 2's predictor does it: two corner
        points and padding. What Seg-Zero prompts with; not used by Lens itself."""
        corners = boxes.view(-1, 2, 2)
        labels = torch.tensor([[2, 3]], device=boxes.device).expand(len(boxes), 2)
        return self.sam_prompt_encoder(points=(corners, labels), boxes=None, masks=None)[0]


# --- The group forward (Eq. 2) --------------------------------------------------------------------

def prompt_positions(mllm, batch):
    """3-D M-RoPE positions of each prompt: list of B (3, P_b) long, on the CPU."""
    grids = batch["grid_thw"].cpu()
    positions = []
    for b, (ids, types) in enumerate(zip(batch["ids"], batch["types"])):
        of_one, _ = mllm.model.get_rope_index(ids[None], mm_token_type_ids=types[None],
                                              image_grid_thw=grids[b:b + 1])          # (3, 1, P_b)
        positions.append(of_one[:, 0])
    return positions


def context_positions(positions, kind):
    """Positions of the context pass: the MLLM's own, or 0, 1, 2, ... on all three axes
    (`--positions 1d`), which is what the released code's context pass falls back to."""
    if kind == "mrope":
        return positions
    return [torch.arange(p.shape[1]).expand(3, -1) for p in positions]


@dataclass
class GroupLayout:
    """Where the completions of packed rows lie, for lens_attention. S = T + M here: the longest
    completion and its queries."""
    P: int                # tokens of the longest prompt; every row begins with its prompt
    places: torch.Tensor  # (N, S) flat index b * L + l of its tokens and queries, 0 for padding
    mask: torch.Tensor    # (N, 1, S, P + S) bool: what each sees of its prompt and of itself
    slots: torch.Tensor   # (filled,) the slots among N * S that hold a token or query


@dataclass
class PackedGroups:
    """B groups as B packed rows, see pack_groups."""
    ids: torch.Tensor          # (B, L) prompt and completion tokens, 0 for queries and padding
    positions: torch.Tensor    # (3, B, L) every completion continues from its prompt's end
    queries: torch.Tensor      # (N, M) flat index b * L + l of each context query
    predictors: torch.Tensor   # (tokens,) flat index of the state that predicts each token
    targets: torch.Tensor      # (tokens,) those tokens, completion by completion
    mask: torch.Tensor         # (N, T) bool, where they go in a padded table: the completion mask
    group: GroupLayout


def pack_groups(prompt_ids, positions, completions, M, device="cpu"):
    """Lay out B groups as B packed rows on `device`; a completion's first token is predicted by the
    prompt's last state. On the CPU come prompt_ids, B x (P_b,); positions, B x (3, P_b);
    completions, B x G x (T_i,)."""
    B, G = len(prompt_ids), len(completions[0])
    P = max(len(ids) for ids in prompt_ids)
    T = max(len(completion) for group in completions for completion in group)
    L = max(len(ids) + sum(len(completion) + M for completion in group)
            for ids, group in zip(prompt_ids, completions))
    row_ids = torch.zeros(B, L, dtype=torch.long)
    row_positions = torch.zeros(3, B, L, dtype=torch.long)
    places = torch.full((B * G, T + M), -1)
    queries = torch.empty(B * G, M, dtype=torch.long)
    predictors, targets = [], []
    for b, (ids, position, group) in enumerate(zip(prompt_ids, positions, completions)):
        row_ids[b, :len(ids)] = ids
        row_positions[:, b, :len(ids)] = position
        first_position = int(position.max()) + 1
        last_of_prompt = torch.tensor([b * L + len(ids) - 1])
        start = len(ids)  # of the completion, within its row
        for g, completion in enumerate(group):
            tokens, length = len(completion), len(completion) + M
            n, flat = b * G + g, b * L + start + torch.arange(length)
            row_ids[b, start:start + tokens] = completion
            row_positions[:, b, start:start + length] = first_position + torch.arange(length)
            places[n, :length] = flat
            queries[n] = flat[tokens:]
            predictors += [last_of_prompt, flat[:tokens - 1]]
            targets.append(completion)
            start += length

    # what a token of completion n sees: its whole prompt, and its own segment up to itself
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids]).repeat_interleave(G)
    sees_prompt = torch.arange(P, device=device) < prompt_lengths.to(device)[:, None]  # (N, P)
    sees_itself = torch.ones(T + M, T + M, dtype=torch.bool, device=device).tril()
    segment_mask = torch.cat([sees_prompt[:, None].expand(B * G, T + M, P),
                              sees_itself.expand(B * G, T + M, T + M)], 2)[:, None]
    lengths = torch.tensor([len(completion) for group in completions for completion in group])

    def move(tensor):
        return tensor.to(device, non_blocking=True)
    layout = GroupLayout(P, move(places.clamp(min=0)), segment_mask,
                         move((places >= 0).flatten().nonzero()[:, 0]))
    return PackedGroups(ids=move(row_ids), positions=move(row_positions), queries=move(queries),
                        predictors=move(torch.cat(predictors)), targets=move(torch.cat(targets)),
                        mask=move(torch.arange(T) < lengths[:, None]), group=layout)


def masked_attention(query, key, value, mask, scaling):
    """Attention of (n, heads, S, d) over (n, kv heads, L, d), mask (n, 1, S, L). Heads that share
    keys become further rows of one head: fused kernels take no mask with fewer key heads."""
    n, heads, S, d = query.shape
    shared = heads // key.shape[1]
    rows = query.reshape(n, heads // shared, shared * S, d)
    mask = mask.repeat(1, 1, shared, 1) if shared > 1 else mask
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.view(n, heads, S, d)


def lens_attention(module, query, key, value, attention_mask, group=None, one_token=False,
                   scaling=None, **kwargs):
    """What transformers calls for "lens". In a packed row the prompt attends to itself, and every
    completion to the prompt and itself, so a sample pays for its own tokens only. Without `group`
    (a GroupLayout): one token of FixedCache, or transformers' own sdpa attention.

    query (B, heads, L, d); key, value (B, kv heads, L, d) -> (B, L, heads, d). Prompts are where
    rows begin, so one causal pass over the first P columns serves all B; for a prompt shorter than
    P that pass leaves its completions' first places wrong, and they are overwritten below."""
    if one_token:
        out = masked_attention(query, key, value, attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None
    if group is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    (B, heads, L, d), P, G = query.shape, group.P, len(group.places) // len(query)

    def of_segments(x):  # -> (N, heads, S, d)
        rows = x.transpose(1, 2).flatten(0, 1).index_select(0, group.places.flatten())
        return rows.view(*group.places.shape, -1, d).transpose(1, 2)

    def of_prompt_and_segments(x):  # -> (N, heads, P + S, d)
        return torch.cat([x[:, :, :P].repeat_interleave(G, 0), of_segments(x)], 2)
    prompt = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P],
                                            is_causal=True, scale=scaling, enable_gqa=True)
    segments = masked_attention(of_segments(query), of_prompt_and_segments(key),
                                of_prompt_and_segments(value), group.mask, scaling)
    out = F.pad(prompt, (0, 0, 0, L - P)).transpose(1, 2).flatten(0, 1)  # (B * L, heads, d)
    segments = segments.transpose(1, 2).flatten(0, 1)  # (N * S, heads, d)
    filled = group.places.flatten()[group.slots]
    return out.index_copy(0, filled, segments[group.slots]).view(B, L, heads, d), None


AttentionInterface.register("lens", lens_attention)
AttentionMaskInterface.register("lens", sdpa_mask)               # of the passes without a group


def embed(mllm, ids, pixel_values, grid_thw):
    """Token embeddings (B, L, C) with each picture's features in their place, as the inputs of the
    language model. pixel_values (patches, D), grid_thw (B, 3) in patches. Qwen3-VL adds features of
    its vision tower's inner layers in its first layers as well."""
    features = mllm.model.get_image_features(pixel_values, grid_thw)
    embeds = mllm.model.language_model.embed_tokens(ids)
    of_picture = ids == mllm.config.image_token_id
    pictures = torch.cat(features.pooler_output).to(embeds.dtype)
    inputs = {"inputs_embeds": embeds.masked_scatter(of_picture[..., None], pictures)}
    if mllm.config.model_type == "qwen3_vl":
        inputs["visual_pos_masks"] = of_picture
        inputs["deepstack_visual_embeds"] = [        # tensors in transformers 5.17, tuples later
            layer if torch.is_tensor(layer) else torch.cat(layer)
            for layer in features.deepstack_features]
    return inputs


def use_lens_attention(mllm):  # any other would ignore `group` and `one_token`
    if mllm.config.text_config._attn_implementation != "lens":
        mllm.set_attn_implementation({"text_config": "lens"})


def group_hidden(mllm, pixel_values, grid_thw, packed, queries=None):
    """Eq. 2 for whole groups: the MLLM's last hidden states of packed rows, flat (B * L, C).
    `queries` (M, C) are the same for all N completions."""
    use_lens_attention(mllm)
    inputs = embed(mllm, packed.ids, pixel_values, grid_thw)
    B, L, C = inputs["inputs_embeds"].shape
    if queries is not None:
        flat = inputs["inputs_embeds"].view(B * L, C)
        everyone = queries.to(flat.dtype).repeat(len(packed.queries), 1)  # (N * M, C)
        flat = flat.index_copy(0, packed.queries.flatten(), everyone)
        inputs["inputs_embeds"] = flat.view(B, L, C)
    out = mllm.model.language_model(**inputs, position_ids=packed.positions, use_cache=False,
                                    group=packed.group)
    return out.last_hidden_state.view(B * L, C)


@dataclass
class AnswerCache:
    """What the frozen MLLM keeps of B prompts and answers in stage 1."""
    cache: DynamicCache
    attention: torch.Tensor  # (B, P + T) 1 where a token stands, 0 on the padding before it
    first: torch.Tensor      # (B,) the position after each answer


@torch.no_grad()
def read_answers(mllm, batch, positions, answers):
    """Stage 1, where nothing before the queries is trained: prompt and answer of each of B prompts,
    read once without gradients, for query_states to go on from. answers: B (T_b,) on the CPU."""
    longer, after = {**batch, "ids": []}, []
    for ids, position, answer in zip(batch["ids"], positions, answers):
        longer["ids"].append(torch.cat([ids, answer]))
        continued = int(position.max()) + 1 + torch.arange(len(answer))
        after.append(torch.cat([position, continued.expand(3, -1)], -1))
    _, cache, attention, first = prefill(mllm, longer, after)
    return AnswerCache(cache, attention, first)


def query_states(mllm, read, queries):
    """Eq. 2 for the M queries alone, after what `read_answers` has read. -> (B, M, C)"""
    B, M = len(read.first), len(queries)
    attention = torch.cat([read.attention, read.attention.new_ones(B, M)], 1)
    position = (read.first[:, None] + torch.arange(M, device=queries.device)).expand(3, B, M)
    embeds = queries.to(mllm.lm_head.weight.dtype).expand(B, -1, -1)
    return mllm.model.language_model(inputs_embeds=embeds, attention_mask=attention,
                                     position_ids=position, past_key_values=read.cache,
                                     use_cache=True).last_hidden_state


# --- The whole model ------------------------------------------------------------------------------

class Lens(nn.Module):
    """MLLM, context queries, connector and SAM. What is trained takes part in `forward` (stage 2)
    or `align_forward` (stage 1): FSDP gathers and reduces around these two calls."""

    def __init__(self, mllm, sam, args, forbidden, eos):
        super().__init__()
        C, D = mllm.config.text_config.hidden_size, sam.sam_prompt_encoder.embed_dim
        self.mllm, self.image_encoder, self.sam = mllm, sam.image_encoder, SamHead(sam)
        scale = mllm.config.text_config.initializer_range        # Q is drawn like token embeddings
        self.queries = nn.Parameter(torch.randn(args.num_queries, C) * scale)
        self.connector = Connector(C, args.num_queries, D, args.connector, args.connector_heads,
                                   args.prompt_tokens)
        self.register_buffer("forbidden", forbidden, persistent=False)  # (V,) bool: never sampled
        self.M, self.eos, self.sam_size = args.num_queries, eos, sam.image_size
        self.prompt, self.positions = args.prompt, args.positions
        self.in_bf16 = args.precision == "bf16"
        # SAM looks at this in eval mode only
        self.sam.sam_mask_decoder.dynamic_multimask_via_stability = args.multimask

    @torch.no_grad()
    def encode_pictures(self, sam_pixels):
        """(B, 3, S, S) -> SAM's feature maps at strides 4, 8 and 16. Frozen in both stages, once
        per picture."""
        with torch.autocast(sam_pixels.device.type, torch.bfloat16, enabled=self.in_bf16):
            return self.image_encoder(sam_pixels)["backbone_fpn"]

    def masks_of(self, states, features):
        """Eqs. 3 and 4: query states (N, M, C), SAM's features of B pictures -> (N, S/4, S/4)
        logits."""
        prompts = self.connector(states.to(self.connector.to_sam[0].weight.dtype))       # (N, K, D)
        return self.sam(features, prompts.view(len(features[0]), -1, *prompts.shape[1:]))

    def align_forward(self, read, features):
        """Stage 1's pass: the queries alone, after what read_answers has read. -> mask logits (B,
        S/4, S/4)"""
        return self.masks_of(query_states(self.mllm, read, self.queries), features)

    def forward(self, pixel_values, grid_thw, packed, features, temperature=1.0,
                with_log_probs=True):
        """One packed pass over B groups, in stage 2 and in evaluation.

        pixel_values (patches, D) and grid_thw (B, 3) as the processor gives them; packed:
        PackedGroups; features: encode_pictures'. -> {"mask_logits" (N, S/4, S/4), "query_states"
        (N, M, C), and with with_log_probs "log_probs" and "entropy" (N, T)}"""
        hidden = group_hidden(self.mllm, pixel_values, grid_thw, packed, self.queries)
        states = hidden[packed.queries]                                      # Q' of Eq. 2
        out = {"query_states": states, "mask_logits": self.masks_of(states, features)}
        if with_log_probs:
            log_probs, entropy = token_log_probs(self.mllm.lm_head, hidden[packed.predictors],
                                                 packed.targets, self.forbidden, temperature)
            out["log_probs"] = completion_table(log_probs, packed.mask)
            out["entropy"] = completion_table(entropy, packed.mask)
        return out


# --- Sampling (Eq. 1) -----------------------------------------------------------------------------

def draw_uniforms(seed, step, prompts, G, T):
    """(len(prompts) * G, T) in [0, 1): a row is a function of (seed, step, prompt's place, g)."""
    rows = [np.random.default_rng([seed, step, prompt, g]).random(T)
            for prompt in prompts for g in range(G)]
    return torch.from_numpy(np.stack(rows))


def prefill(mllm, batch, positions):
    """Run B prompts once, padded on the left so that they end together. -> last hidden states
    (B, C), their cache, attention mask (B, P), first position after each prompt (B,)."""
    device, P = batch["pixel_values"].device, max(len(ids) for ids in batch["ids"])
    def pad_left(x):
        return F.pad(x, (P - x.shape[-1], 0))
    ids = torch.stack([pad_left(ids) for ids in batch["ids"]]).to(device)  # (B, P)
    attention = torch.stack([pad_left(torch.ones_like(ids)) for ids in batch["ids"]]).to(device)
    position = torch.stack([pad_left(p) for p in positions], 1).to(device)  # (3, B, P)
    inputs = embed(mllm, ids, batch["pixel_values"], batch["grid_thw"])
    cache = DynamicCache(config=mllm.config.text_config)
    out = mllm.model.language_model(**inputs, position_ids=position, attention_mask=attention,
                                    past_key_values=cache, use_cache=True)
    return out.last_hidden_state[:, -1], cache, attention, position.amax((0, 2)) + 1


def decode_step(lm, token, position, mask, cache, **kwargs):
    """One token of n sequences; what FixedCache compiles. -> last hidden states (n, C)"""
    return lm(inputs_embeds=lm.embed_tokens(token[:, None]), position_ids=position,
              attention_mask=mask, past_key_values=cache, use_cache=True,
              **kwargs).last_hidden_state[:, -1]


class GrowingCache:
    """The cache of n sequences, one token longer at every step: the plain way, and the CPU's."""

    def __init__(self, lm, prompt_cache, attention, G):
        prompt_cache.batch_repeat_interleave(G)
        self.lm, self.cache = lm, prompt_cache
        self.attention = attention.repeat_interleave(G, 0)  # (n, P + t)

    def step(self, token, position):
        """token (n,), position (3, n, 1) -> last hidden states (n, C)"""
        self.attention = F.pad(self.attention, (0, 1), value=1)
        return decode_step(self.lm, token, position, self.attention, self.cache)

    def keep(self, running):
        """Once half have ended, drop all but `running` (k,). -> those kept, or None"""
        if len(running) > len(self.attention) // 2:
            return None
        self.cache.batch_select_indices(running)
        self.attention = self.attention[running]
        return running


class FixedCache:
    """The same in tensors of fixed shapes and addresses, made once for at most N sequences, so that
    one compiled step (on CUDA a captured graph) serves every token without a host sync. Few shapes
    occur: n is N, N/2, N/4 or N/8, and a completion's first slot a multiple of 512. Weights that
    change in place (train_rl.refresh) are seen by the next step."""

    def __init__(self, mllm, N, longest_prompt, max_new, compiled=True):
        config, weight = mllm.config.text_config, mllm.lm_head.weight
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.room = -(-max_new // 8) * 8  # slots of a completion: fused kernels like eights
        length = -(-longest_prompt // 512) * 512 + self.room
        shape = (config.num_hidden_layers, 2, N, config.num_key_value_heads, length, d)
        self.whole = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.lm, self.decode_step = mllm.model.language_model, decode_step
        use_lens_attention(mllm)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each shape
            mode = "reduce-overhead" if weight.is_cuda else "default"
            self.decode_step = torch.compile(decode_step, dynamic=False, mode=mode)

    def take(self, n, length):
        """Keys and values (n, heads, length, d) of each layer from now on: views of the whole."""
        self.layers = [tuple(layer[:, :n, :, :length]) for layer in self.whole]
        for tensor in sum(self.layers, ()):  # else a CUDA graph would copy it at every step
            torch._dynamo.mark_static_address(tensor, guard=False)

    def update(self, key, value, layer, *args, **kwargs):
        """What a layer of the language model calls with the new token's key and value."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.slot, key)
        values.index_copy_(2, self.slot, value)
        return keys, values

    def get_seq_length(self, *args):
        return 0  # asked for, but positions and mask are given

    def begin(self, prompt_cache, attention, G):
        """Take over the cache of B prompts, each repeated G times; attention (B, P)."""
        B, P = attention.shape
        first = -(-P // 512) * 512  # slot of the first completion token
        self.take(B * G, first + self.room)
        for held, layer in zip(self.layers, prompt_cache.layers):
            held[0][:, :, first - P:first] = layer.keys.repeat_interleave(G, 0)
            held[1][:, :, first - P:first] = layer.values.repeat_interleave(G, 0)
        self.slot.fill_(first - 1)
        seen = F.pad(attention.bool(), (first - P, self.room)).repeat_interleave(G, 0)
        self.mask = seen[:, None, None]  # (n, 1, 1, length)
        self.smallest = B * G // 8
        return self

    def step(self, token, position):
        """token (n,), position (3, n, 1) -> last hidden states (n, C)"""
        self.slot += 1
        self.mask.index_fill_(3, self.slot, True)
        return self.decode_step(self.lm, token, position, self.mask, self, one_token=True)

    def keep(self, running):
        """Once half have ended, halve the batch: `running` (k,), filled up. -> those kept"""
        n, half = len(self.mask), len(self.mask) // 2
        if len(running) > half or half < self.smallest:
            return None
        ended = torch.ones(n, dtype=torch.bool, device=running.device)
        ended[running] = False
        kept = torch.cat([running, ended.nonzero()[:half - len(running), 0]])
        self.mask = self.mask[kept]
        for tensor in sum(self.layers, ()):
            tensor[:half] = tensor[kept]
        self.take(half, self.mask.shape[3])
        return kept


@dataclass
class Samples:
    completions: list        # B x G x (T_i,) long on the CPU, the end token included
    finished: list           # B x G bool, False where the limit cut the completion
    log_probs: torch.Tensor  # (N, max_new) of the tokens under the sampler, 0 after the end token


@torch.no_grad()
def generate(mllm, batch, positions, G, max_new, eos, forbidden, uniforms=None, temperature=1.0,
             fixed=None):
    """Eq. 1: G completions of each of B prompts, all decoded as one batch, each prompt prefilled
    once. -> Samples

    uniforms: (N, max_new) double, one row per sample drawn before sampling, so that a sample
    depends on neither rank, batch nor world size; None decodes greedily. fixed: a FixedCache to
    decode in; without it the cache grows.
    """
    training, lm = mllm.training, mllm.model.language_model
    mllm.eval()  # in training mode checkpointing would drop the cache
    hidden, prompt_cache, attention, next_position = prefill(mllm, batch, positions)
    hidden, next_position = (x.repeat_interleave(G, 0) for x in (hidden, next_position))
    if fixed is None:
        cache = GrowingCache(lm, prompt_cache, attention, G)
    else:
        cache = fixed.begin(prompt_cache, attention, G)
    N, device = len(hidden), hidden.device
    alive = torch.arange(N, device=device)  # the samples that the decoding batch still holds
    tokens = torch.full((N, max_new), eos, device=device)
    log_probs = torch.zeros(N, max_new, device=device)
    done = torch.zeros(N, dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = policy_logits(mllm.lm_head, hidden, forbidden, temperature)
        token = pick_tokens(logits, None if uniforms is None else uniforms[alive, t])
        log_p = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        ended = done[alive]
        token = torch.where(ended, eos, token)  # what follows the end token is cut off below
        tokens[alive, t] = token
        log_probs[alive, t] = log_p.masked_fill(ended, 0)
        done[alive] = ended | (token == eos)
        if t + 1 == max_new:
            break
        if t % 8 == 7:  # one host sync per eight tokens
            running = (~done[alive]).nonzero()[:, 0]
            if len(running) == 0:
                break
            kept = cache.keep(running)
            if kept is not None:
                alive, token = alive[kept], token[kept]
        position = (next_position[alive] + t).expand(3, 1, -1).transpose(1, 2)  # (3, n, 1)
        hidden = cache.step(token, position)
    mllm.train(training)
    lengths = torch.where(done, (tokens == eos).int().argmax(1) + 1, max_new).tolist()
    rows = [row[:length] for row, length in zip(tokens.cpu(), lengths)]
    finished, starts = done.tolist(), range(0, N, G)
    return Samples([rows[i:i + G] for i in starts], [finished[i:i + G] for i in starts], log_probs)


# --- Loading --------------------------------------------------------------------------------------

ARCHITECTURE = ("num_queries", "connector", "connector_heads", "prompt_tokens")
INHERITED = (*ARCHITECTURE, "mllm", "sam", "prompt", "positions", "multimask")  # by stage 2
SAM_CONFIGS = {file: yaml for yaml, file in HF_MODEL_ID_TO_FILENAMES.values()}


def read_run(folder):
    """The shared settings of a finished run, from its lens.json."""
    path = Path(folder) / "lens.json"
    try:
        return json.loads(path.read_text())
    except OSError:
        raise LensError(f"{folder}: no finished run here (lens.json is missing). Train one first: "
                        f"align.py, then train_rl.py. A checkpoint as published by the authors "
                        f"becomes one with tests/convert_released.py.") from None
    except ValueError as error:
        raise LensError(f"{path} is damaged ({error}). Write it anew: --resume --export") from None


def load_sam(path, with_weights=True):
    """SAM 2 from a folder (config.yaml, model.pt), a checkpoint under its official name or a hub
    id; the sam2 package holds the official configurations. Built from that yaml as sam2.build_sam
    does without post-processing; loaded strictly."""
    name = HF_MODEL_ID_TO_FILENAMES.get(path, (None, Path(path).name))[1]
    if path in HF_MODEL_ID_TO_FILENAMES:
        try:
            path = hf_hub_download(path, name) if with_weights else name
        except (OSError, ValueError):  # no network: below it is missing, and how to get it is said
            path = f"weights/{name}"
    path = Path(path)
    if path.is_dir():
        config, weights = path / "config.yaml", path / "model.pt"
        remedy = "A folder has config.yaml and model.pt"
    elif name in SAM_CONFIGS:
        config, weights = Path(sam2.__path__[0]) / SAM_CONFIGS[name], path
        remedy = (f"Download it: hf download facebook/{path.stem.replace('_', '-')} {name} "
                  f"--local-dir {path.parent}; or try the method first: --preset tiny")
    else:
        raise LensError(f"--sam {path}: not a folder, not one of SAM 2's file names "
                        f"({', '.join(SAM_CONFIGS)}), and not one of its hub ids "
                        f"({', '.join(HF_MODEL_ID_TO_FILENAMES)})")
    for file in (config, weights) if with_weights else (config,):
        if not file.exists():
            raise LensError(f"{file} is missing. {remedy}.")
    sam = instantiate(OmegaConf.load(config).model, _recursive_=True)
    try:
        if with_weights:
            sam.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise LensError(f"{weights}: not the weights of {config} ({str(error)[:300]})") from None
    return sam


def load_mllm(path, dtype):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL by its own config, and its processor. Never cast a Qwen
    model afterwards as a whole: its rotary frequencies are a buffer that must stay fp32."""
    try:
        family = AutoConfig.from_pretrained(path).model_type
        if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            raise ValueError(f"it is of {family}, not of qwen2_vl, qwen2_5_vl or qwen3_vl")
        mllm = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        return mllm, AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise LensError(f"--mllm {path}: could not be loaded ({reason}). Download it (hf download "
                        f"{path}), give the folder of its config.json and safetensors, or try the "
                        f"method first: --preset tiny") from None


def forbidden_tokens(tokenizer, vocab_size, prompt="paper"):
    """(V,) bool: what must never be sampled. Every special token but the end token (a sampled
    picture token would break the next forward), and rows of the vocabulary beyond the tokenizer's
    last token. Answers to released prompts may hold Qwen's marks of an object and its box."""
    forbidden = torch.arange(vocab_size) >= len(tokenizer)
    allowed = {tokenizer.eos_token}
    if prompt != "paper":
        allowed |= {"<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special and token.content not in allowed:
            forbidden[index] = True
    return forbidden


def context_module(lens):
    """Queries and connector under one state dict, the part that stage 1 trains."""
    module = nn.Module()
    module.queries, module.connector = lens.queries, lens.connector
    return module


def build_lens(args, folder="", dtype=torch.float32):
    """-> (Lens, processor). With `folder`, a finished run: its context module and SAM head, and its
    own MLLM and SAM 2 in place of --mllm and --sam where it has folder/mllm and folder/sam."""
    if folder:
        folder, saved = Path(folder), read_run(folder)
        for name in ARCHITECTURE:
            if getattr(args, name) != saved[name]:
                raise LensError(f"{folder} was trained with --{name.replace('_', '-')} "
                                f"{saved[name]}, not {getattr(args, name)}")
        args.mllm = str(folder / "mllm") if (folder / "mllm").exists() else args.mllm
        args.sam = str(folder / "sam") if (folder / "sam").exists() else args.sam
    sam = load_sam(args.sam)
    mllm, processor = load_mllm(args.mllm, dtype)
    if args.max_pixels:
        size = dict(processor.image_processor.size)  # "longest_edge" counts pixels, not an edge
        size["longest_edge"] = min(size["longest_edge"], args.max_pixels)
        processor.image_processor.size = size
    torch.manual_seed(args.seed)  # the initial queries and connector
    forbidden = forbidden_tokens(processor.tokenizer, mllm.lm_head.out_features, args.prompt)
    lens = Lens(mllm, sam, args, forbidden, processor.tokenizer.eos_token_id)
    if folder:
        load_part(context_module(lens), folder / "context.safetensors", args)
        load_part(lens.sam, folder / "sam.safetensors", args)
    return lens, processor


def load_part(module, path, args):
    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise LensError(f"{path} does not fit --mllm {args.mllm} and --sam {args.sam}: it "
                        f"belongs to another architecture ({str(error).splitlines()[0]})") from None
