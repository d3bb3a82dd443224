"""LENS, the model: a multimodal LLM (MLLM), context queries, a connector and SAM 2 (Eqs. 1-4).

    Eq. 1   P_CoT, P_box = mllm.generate(p_sys, T, I)             train_rl.generate
    Eq. 2   Q' = mllm.forward(p_sys, T, I, P_CoT, P_box, Q)       forward_one, query states
    Eq. 3   Q_seg = connector(Q')                                 Connector, prompt embeddings
    Eq. 4   P_seg = sam(Q_seg, I)                                 SamHead, mask logits

In words: the MLLM reads the image I and the expression T under the system prompt p_sys and writes a
completion, which is a reasoning (P_CoT) and a box (P_box). Then M learned vectors Q, the context
queries, follow the completion as if they were M more tokens. They attend to the image, the prompt,
the reasoning and the box, and the MLLM's last hidden states at their places (Q', the query states)
say what they found. The connector turns these into prompts for SAM 2, which draws the mask. Stage 1
(align.py) trains Q and the connector, stage 2 (train_rl.py) everything but SAM's image encoder.

Read `forward_one` first. For one given completion it computes Eqs. 2-4 and the log-probabilities of
its tokens, and nothing else. The section "The same numbers, faster" gives the same for whole
groups.

Letters in shapes: B prompts, G completions per prompt, N = B * G; P prompt tokens, those of the
image included; T completion tokens, L the length of a packed row (grpo.py), M context queries, C
the MLLM's hidden size, V its vocabulary, K prompt embeddings given to SAM, D SAM's width, d the
width of an attention head, S the side of SAM's square image, (H, W) the size of an original image.

Departures from the paper
- Eq. 3's "shallow transformer" has four blocks, as in the released code. All M of its outputs go to
  SAM. The released code squeezes them into one (`--sam-tokens one`).
- Positions are the MLLM's own (3-D M-RoPE: time, height, width) in every forward. The released code
  falls back to 1-D positions in the forward after sampling, which gives log-probabilities and
  masks, and outside stage 2 it lets SAM replace an unstable mask (`--mask-pass released`).
"""
import json
import shutil
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path

import sam2
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoModelForImageTextToText, AutoProcessor, DynamicCache)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from data import LensError, write_whole
from grpo import (completion_table, masked_attention, packed_attention, policy_logits,
                  token_log_probs)
from rewards import TAGS, chat_messages


class Lens(nn.Module):
    """MLLM, context queries, connector and SAM 2 in one module.

    FSDP gathers the weights for a call of the module, and reduces the gradients after its backward.
    So each stage makes one such call per micro-batch: stage 1 `align_forward`, stage 2 `forward`.
    """

    def __init__(self, mllm, sam, args, forbidden, eos, opening=""):
        """args: the settings in align.SharedArgs; forbidden (V,) bool: tokens that are never
        sampled; eos: id of the token that ends a completion; opening: see read_template."""
        super().__init__()
        C, D = mllm.config.text_config.hidden_size, sam.sam_prompt_encoder.embed_dim
        self.mllm, self.image_encoder, self.sam = mllm, sam.image_encoder, SamHead(sam)
        scale = mllm.config.text_config.initializer_range  # Q starts like the token embeddings
        self.queries = nn.Parameter(torch.randn(args.num_queries, C) * scale)
        self.connector = Connector(C, args.num_queries, D, args.connector, args.sam_tokens)
        self.register_buffer("forbidden", forbidden, persistent=False)
        self.M, self.eos, self.sam_size = args.num_queries, eos, sam.image_size
        # prompt is a name, such as "paper"; it, eos, sam_size and opening are for the other files
        self.prompt, self.mask_pass, self.opening = args.prompt, args.mask_pass, opening
        self.in_bf16 = args.precision == "bf16"
        # With "released", SAM replaces an unstable mask by the best of three others, but only in
        # eval mode: in evaluation and in stage 1, which trains nothing in SAM; not in stage 2.
        self.sam.sam_mask_decoder.dynamic_multimask_via_stability = args.mask_pass == "released"

    @torch.no_grad()
    def encode_images(self, sam_pixels):
        """(B, 3, S, S) -> SAM's three feature maps, at strides 4, 8 and 16. The encoder is frozen
        in both stages, so once per image is enough."""
        with torch.autocast(sam_pixels.device.type, torch.bfloat16, enabled=self.in_bf16):
            return self.image_encoder(sam_pixels)["backbone_fpn"]

    def masks(self, query_states, features):
        """Eqs. 3 and 4: query states (N, M, C) and the feature maps of B images -> mask logits
        (N, S/4, S/4)."""
        dtype = self.connector.to_sam[0].weight.dtype  # the MLLM may compute in another
        prompts = self.connector(query_states.to(dtype))                         # (N, K, D)
        return self.sam(features, prompts.unflatten(0, (len(features[0]), -1)))  # (B, G, K, D)

    def forward(self, *inputs, **options):
        """Stage 2's forward: `group_forward`."""
        return group_forward(self, *inputs, **options)

    def align_forward(self, prefilled, features):
        """Stage 1's forward. prefilled: what `prefill` returns for B prompts with their
        completions; features: the feature maps of their images. -> mask logits (B, S/4, S/4)"""
        return self.masks(queries_after(self.mllm, prefilled, self.queries), features)


def forward_one(lens, batch, completion, temperature=1.0):
    """LENS in its plainest form: one completion of one prompt, nothing packed and nothing cached.
    Everything faster in this project is tested against it. On the CPU, in one dtype.

    batch: as data.Collator makes it, with B = 1: prompt_ids [(P,)], token_types [(P,)],
    pixel_values (patches, values per patch), grid_thw (1, 3), sam_pixels (1, 3, S, S).
    completion: (T,) with its end token.
    -> {"log_probs" (T,), "query_states" (M, C), "mask_logits" (S/4, S/4)}
    """
    mllm, M = lens.mllm, lens.M
    [prompt] = batch["prompt_ids"]
    P, T = len(prompt), len(completion)

    # the input: the prompt with its image, the completion, and Q after it. The zeros hold Q's
    # places, since what `embed` returns for Qwen3-VL must be as long as the input.
    ids = torch.cat([prompt, completion, completion.new_zeros(M)])[None]         # (1, P + T + M)
    inputs = embed(mllm, ids, batch["pixel_values"], batch["grid_thw"])
    tokens = inputs["inputs_embeds"][:, :P + T]                                  # (1, P + T, C)
    inputs["inputs_embeds"] = torch.cat([tokens, lens.queries[None]], 1)
    # its positions: what follows the prompt counts on from the prompt's end
    [positions] = context_positions(prompt_positions(mllm, batch), lens.mask_pass)  # (3, P)
    after = positions.max() + 1 + torch.arange(T + M)
    positions = torch.cat([positions, after.expand(3, -1)], 1)[:, None]          # (3, 1, P + T + M)
    hidden = mllm.model.language_model(**inputs, position_ids=positions,
                                       use_cache=False).last_hidden_state[0]     # (P + T + M, C)

    # pi(completion), for GRPO: the state at a token predicts the next token
    logits = policy_logits(mllm.lm_head, hidden[P - 1:P + T - 1], lens.forbidden, temperature)
    log_probs = logits.log_softmax(-1)[torch.arange(T), completion]              # (T,)

    query_states = hidden[P + T:]                                                # Eq. 2: Q' (M, C)
    prompt_embeddings = lens.connector(query_states[None])                       # Eq. 3: (1, K, D)
    features = lens.encode_images(batch["sam_pixels"])
    mask_logits = lens.sam(features, prompt_embeddings[None])[0]                 # Eq. 4: P_seg
    return {"log_probs": log_probs, "query_states": query_states, "mask_logits": mask_logits}


# --- The parts: the connector (Eq. 3) and SAM 2 (Eq. 4) -------------------------------------------

class Connector(nn.Module):
    """Eq. 3, Q_seg = connector(Q'): query states (N, M, C) -> prompt embeddings for SAM (N, K, D).

    kind "vit" is a small transformer of four blocks in which every query sees all others. "mlp" has
    no blocks (Table 4). sam_tokens "all" gives K = M; "one" squeezes the M states into K = 1 with a
    convolution, as the released code does.
    """

    def __init__(self, C, M, D, kind="vit", sam_tokens="all"):
        super().__init__()
        heads = min(16, C // 32)  # 16 as in the released code; small models get fewer
        if kind == "vit" and C % heads:
            raise LensError(f"--connector vit: its {heads} heads do not divide the MLLM's hidden "
                            f"size {C}. Take --connector mlp or another --mllm.")
        # N(0, 1): as large as the query states. Drawn with a deviation of 0.02, all M outputs stay
        # alike for long (docs/world.md).
        self.position = nn.Parameter(torch.randn(1, M, C)) if kind == "vit" else None
        self.blocks = nn.Sequential(*(ConnectorBlock(C, heads)
                                      for _ in range(4 if kind == "vit" else 0)))
        self.squeeze = nn.Conv1d(C, C, kernel_size=M) if sam_tokens == "one" else None
        self.to_sam = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, D))

    def forward(self, x):                                                        # (N, M, C)
        if self.position is not None:
            x = x + self.position
        x = self.blocks(x)
        if self.squeeze is not None:
            x = self.squeeze(x.transpose(1, 2)).transpose(1, 2)                  # (N, 1, C)
        return self.to_sam(x)


class ConnectorBlock(nn.Module):
    """One pre-norm transformer block over the M queries, without a causal mask."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(C, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        # A block adds nothing at first, as in many residual networks (docs/world.md)
        for p in (*self.proj.parameters(), *self.fc2.parameters()):
            nn.init.zeros_(p)

    def forward(self, x):                                                        # (N, M, C)
        N, M, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, M, 3, self.heads, C // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)                           # (N, heads, M, d)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(attended.transpose(1, 2).reshape(N, M, C))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # quick GELU, as released


class SamHead(nn.Module):
    """Eq. 4: SAM 2 without its image encoder and its video memory, under sam2's own parameter
    names. It always computes in fp32: unlike the image encoder, it loses too much in bf16."""

    def __init__(self, sam):
        super().__init__()
        self.sam_prompt_encoder = sam.sam_prompt_encoder
        self.sam_mask_decoder = sam.sam_mask_decoder
        self.no_mem_embed = sam.no_mem_embed

    def forward(self, features, prompts):
        """features: three maps (B, channels, h, w) at strides 4, 8, 16, see Lens.encode_images;
        prompts (B, G, K, D): G prompts for each image -> mask logits (B * G, S/4, S/4)."""
        decoder, G, dtype = self.sam_mask_decoder, prompts.shape[1], self.no_mem_embed.dtype
        fine, middle, coarse = (f.to(dtype) for f in features)
        # what SAM 2 does to its maps for an image without a video memory
        maps = [decoder.conv_s0(fine), decoder.conv_s1(middle),
                coarse + self.no_mem_embed.view(1, -1, 1, 1)]
        # the G prompts of an image share its maps: views for B = 1, copies only for B > 1
        maps = [m[:, None].expand(-1, G, -1, -1, -1).flatten(0, 1) for m in maps]
        _, no_mask = self.sam_prompt_encoder(points=None, boxes=None, masks=None)
        logits = decoder(image_embeddings=maps[2], image_pe=self.sam_prompt_encoder.get_dense_pe(),
                         sparse_prompt_embeddings=prompts.flatten(0, 1).to(dtype),
                         dense_prompt_embeddings=no_mask, multimask_output=False,
                         repeat_image=False, high_res_features=maps[:2])[0]
        return logits[:, 0].clone()  # a copy, since FSDP warns of views that leave a unit

    def box_prompts(self, boxes):
        """Boxes (N, 4) as x1, y1, x2, y2 in the SAM frame -> prompts (N, 3, D), as SAM 2's own
        predictor makes them: two corners and padding. Lens does not use this; evaluate.py does, to
        compare."""
        corners = boxes.view(-1, 2, 2)
        # SAM's labels of the two corners
        labels = torch.tensor([[2, 3]], device=boxes.device).expand(len(boxes), 2)
        return self.sam_prompt_encoder(points=(corners, labels), boxes=None, masks=None)[0]


# --- The inputs of the MLLM's language model ------------------------------------------------------

def embed(mllm, ids, pixel_values, grid_thw):
    """Token ids (B, length) -> inputs of the language model: embeddings (B, length, C) with the
    features of each image in the place of its image tokens.

    pixel_values (patches, values per patch) and grid_thw (B, 3), the (time, height, width) of each
    image in patches, as the processor gives them. Qwen3-VL also adds features of inner vision
    layers in its first text layers.
    """
    features = mllm.model.get_image_features(pixel_values, grid_thw)
    embeds = mllm.model.language_model.embed_tokens(ids)
    is_image = ids == mllm.config.image_token_id
    images = torch.cat(features.pooler_output).to(embeds.dtype)  # (image tokens of all images, C)
    inputs = {"inputs_embeds": embeds.masked_scatter(is_image[..., None], images)}
    if mllm.config.model_type == "qwen3_vl":
        inputs["visual_pos_masks"] = is_image
        inputs["deepstack_visual_embeds"] = [  # tensors in transformers 5.17, tuples later
            layer if torch.is_tensor(layer) else torch.cat(layer)
            for layer in features.deepstack_features]
    return inputs


def prompt_positions(mllm, batch):
    """The 3-D M-RoPE positions of each prompt: list of B (3, P_b) on the CPU."""
    positions = []
    for ids, types, grid in zip(batch["prompt_ids"], batch["token_types"],
                                batch["grid_thw"].cpu()):
        position, _ = mllm.model.get_rope_index(ids[None], mm_token_type_ids=types[None],
                                                image_grid_thw=grid[None])       # (3, 1, P_b)
        positions.append(position[:, 0])
    return positions


def context_positions(positions, mask_pass):
    """The positions of the forward after sampling, which gives log-probabilities and masks.
    "paper": the MLLM's own.
    "released": 0, 1, 2, ... on all three axes, which is what the released code falls back to.
    Sampling always uses the MLLM's own."""
    if mask_pass == "paper":
        return positions
    return [torch.arange(position.shape[1]).expand(3, -1) for position in positions]


# --- The same numbers, faster: whole groups as packed rows ----------------------------------------

def group_forward(lens, pixel_values, grid_thw, packed, features, temperature=1.0,
                  with_log_probs=True):
    """`forward_one` for the N completions of B groups at once. The vision tower and the prompt are
    computed once for each group, and so are SAM's feature maps, by the caller.

    pixel_values (patches, values per patch), grid_thw (B, 3); packed: grpo.PackedGroups; features:
    Lens.encode_images of the B images. -> {"query_states" (N, M, C), "mask_logits" (N, S/4, S/4)}
    and, with_log_probs, {"log_probs" (N, T), "entropy" (N, T)}, 0 after a completion's end
    """
    # (B * L, C); the places in `packed` are indices into it
    hidden = group_hidden(lens.mllm, pixel_values, grid_thw, packed, lens.queries)
    query_states = hidden[packed.query_places]                                   # (N, M, C)
    out = {"query_states": query_states, "mask_logits": lens.masks(query_states, features)}
    if with_log_probs:
        log_probs, entropy = token_log_probs(lens.mllm.lm_head, hidden[packed.target_places],
                                             packed.targets, lens.forbidden, temperature)
        # from one value per target, which are all completion tokens, to a table (N, T)
        out["log_probs"] = completion_table(log_probs, packed.mask)
        out["entropy"] = completion_table(entropy, packed.mask)
    return out


def group_hidden(mllm, pixel_values, grid_thw, packed, queries=None):
    """Eq. 2 for whole groups: the last hidden states of packed rows, flat (B * L, C). `queries`
    (M, C) follow every completion; without them only the text is computed."""
    use_lens_attention(mllm)
    inputs = embed(mllm, packed.ids, pixel_values, grid_thw)
    if queries is not None:
        embeds = inputs["inputs_embeds"]                                         # (B, L, C)
        repeated = queries.to(embeds.dtype).repeat(len(packed.query_places), 1)  # (N * M, C)
        flat = embeds.flatten(0, 1).index_copy(0, packed.query_places.flatten(), repeated)
        inputs["inputs_embeds"] = flat.view_as(embeds)
    out = mllm.model.language_model(**inputs, position_ids=packed.positions, use_cache=False,
                                    packed=packed)
    return out.last_hidden_state.flatten(0, 1)


def lens_attention(module, query, key, value, attention_mask, packed=None, one_token=False,
                   scaling=None, **kwargs):
    """The attention function that transformers calls in every text layer, under the name "lens".
    transformers passes it `packed` and `one_token` from our calls of the language model.
    query (B, heads, L, d); key and value (B, key heads, L, d) -> (B, L, heads, d), None"""
    if packed is not None:
        return packed_attention(query, key, value, packed, scaling), None
    if one_token:  # a step of train_rl.FixedCache
        out = masked_attention(query, key, value, attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                  **kwargs)


AttentionInterface.register("lens", lens_attention)
AttentionMaskInterface.register("lens", sdpa_mask)  # for calls with neither packed nor one_token


def use_lens_attention(mllm):
    """Switch the text layers to `lens_attention`. Any other would silently ignore `packed` and
    `one_token`."""
    if mllm.config.text_config._attn_implementation != "lens":
        mllm.set_attn_implementation({"text_config": "lens"})


# --- With a cache, for sampling and for stage 1 ---------------------------------------------------

@dataclass
class Prefilled:
    """What the language model keeps of B sequences that it has read, padded on the left."""
    hidden: torch.Tensor          # (B, C) the last hidden state of each
    cache: DynamicCache           # keys and values of every layer
    attention_mask: torch.Tensor  # (B, length) 1 on tokens, 0 on the padding before them
    next_position: torch.Tensor   # (B,) the position of what follows


def prefill(mllm, batch, positions, completions=None):
    """Run B prompts through the MLLM once, each followed by its completion if `completions` are
    given: B x (T_b,) on the CPU. positions: `prompt_positions` of the batch, or the
    `context_positions` if queries will follow. -> Prefilled"""
    rows, row_positions = batch["prompt_ids"], positions
    if completions is not None:
        after = [position.max() + 1 + torch.arange(len(completion)).expand(3, -1)
                 for position, completion in zip(positions, completions)]
        rows = [torch.cat(pair) for pair in zip(rows, completions)]
        row_positions = [torch.cat(pair, 1) for pair in zip(positions, after)]
    device, length = batch["pixel_values"].device, max(len(row) for row in rows)

    def pad_left(x):  # so that all sequences end together
        return F.pad(x, (length - x.shape[-1], 0))
    ids = torch.stack([pad_left(row) for row in rows]).to(device)                # (B, length)
    attention_mask = torch.stack([pad_left(torch.ones_like(row)) for row in rows]).to(device)
    position = torch.stack([pad_left(p) for p in row_positions], 1).to(device)   # (3, B, length)
    inputs = embed(mllm, ids, batch["pixel_values"], batch["grid_thw"])
    cache = DynamicCache(config=mllm.config.text_config)
    out = run_with_cache(mllm.model.language_model, cache, **inputs, position_ids=position,
                         attention_mask=attention_mask)
    return Prefilled(out.last_hidden_state[:, -1], cache, attention_mask,
                     position.amax((0, 2)) + 1)


def queries_after(mllm, prefilled, queries):
    """Eq. 2 for the queries (M, C) alone, after B sequences that are prefilled with completions.
    -> query states (B, M, C)

    In stage 1 nothing before the queries is trained. So prompts and completions are read once,
    without gradients, and only the queries run with gradients. This uses `prefilled` up: its cache
    holds the queries afterwards."""
    B, M = len(prefilled.hidden), len(queries)
    attention_mask = F.pad(prefilled.attention_mask, (0, M), value=1)
    position = prefilled.next_position[:, None] + torch.arange(M, device=queries.device)  # (B, M)
    embeds = queries.to(mllm.lm_head.weight.dtype).expand(B, -1, -1)
    return run_with_cache(mllm.model.language_model, prefilled.cache, inputs_embeds=embeds,
                          attention_mask=attention_mask,
                          position_ids=position.expand(3, B, M)).last_hidden_state


# transformers 5.24 renamed this argument
CACHE = "cache" if "cache" in signature(Qwen2VLTextModel.forward).parameters else "past_key_values"


def run_with_cache(language_model, cache, **inputs):
    """Run the language model on what follows the content of a cache, and add it to the cache."""
    return language_model(**inputs, **{CACHE: cache}, use_cache=True)


# --- Loading --------------------------------------------------------------------------------------

ARCHITECTURE = ("num_queries", "connector", "sam_tokens")
SAM_CONFIGS = {file: yaml for yaml, file in HF_MODEL_ID_TO_FILENAMES.values()}


def build_lens(args, folder="", dtype=torch.float32):
    """-> Lens, processor

    args: align.SharedArgs. folder: a finished run, see `export`. Its queries, connector and SAM
    head are loaded; its mllm/ and sam/ (a whole SAM), if there, take the place of --mllm and --sam,
    in `args` too. LensError for what is missing or does not fit.
    """
    if folder:
        folder, saved = Path(folder), read_run(folder)
        for name in ARCHITECTURE:
            if getattr(args, name) != saved[name]:
                raise LensError(f"{folder} was trained with --{name.replace('_', '-')} "
                                f"{saved[name]}, not {getattr(args, name)}")
        for name in ("mllm", "sam"):
            if (folder / name).exists():
                setattr(args, name, str(folder / name))
    sam = load_sam(args.sam)
    mllm, processor = load_mllm(args.mllm, dtype)
    if args.max_pixels:
        size = dict(processor.image_processor.size)  # "longest_edge" counts pixels, not an edge
        size["longest_edge"] = min(size["longest_edge"], args.max_pixels)
        processor.image_processor.size = size
    eos, opening = read_template(processor, args)
    torch.manual_seed(args.seed)  # the queries and the connector start at random
    forbidden = forbidden_tokens(processor.tokenizer, mllm.lm_head.out_features, eos, args.prompt)
    lens = Lens(mllm, sam, args, forbidden, eos, opening)
    if folder:
        load_part(context_module(lens), folder / "context.safetensors", args)
        load_part(lens.sam, folder / "sam.safetensors", args)
    return lens, processor


def read_run(folder):
    """The shared settings of a finished run, from its lens.json."""
    path = Path(folder) / "lens.json"
    try:
        return json.loads(path.read_text())
    except OSError:
        raise LensError(f"{folder}: no finished run here (lens.json is missing). Train one first: "
                        f"align.py, then train_rl.py. A checkpoint as published by the authors "
                        f"becomes one with tests/tools/convert_released.py.") from None


def load_mllm(path, dtype):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL, whichever its config says. -> MLLM, processor

    Never cast the whole model afterwards: its rotary frequencies are a buffer that must stay fp32.
    """
    try:
        family = AutoConfig.from_pretrained(path).model_type
        if family not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            raise ValueError(f"it is a {family}, not a qwen2_vl, qwen2_5_vl or qwen3_vl")
        mllm, report = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype,
                                                                   output_loading_info=True)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise LensError(f"--mllm {path}: could not be loaded ({reason}). Download it (hf download "
                        f"{path}), give the folder of its config.json and safetensors, or try the "
                        f"method first: --preset tiny") from None
    for kind in ("missing_keys", "unexpected_keys"):
        keys = sorted(report[kind])
        if keys:  # transformers would leave random weights in the place of missing ones
            raise LensError(f"--mllm {path}: its weights do not fit its config.json; {len(keys)} "
                            f"{kind.replace('_', ' ')}: {', '.join(keys[:3])} ... Merge an adapter "
                            f"into its model first, and save with save_pretrained.")
    return mllm, processor


def load_sam(path, with_weights=True):
    """SAM 2 or 2.1, from a checkpoint under its official file name, for which the sam2 package has
    the configuration, or from a folder with config.yaml and model.pt. Built like sam2.build_sam
    without post-processing. Every weight must fit. with_weights=False: random weights, and the
    checkpoint need not be there."""
    path = Path(path)
    if path.is_dir():
        config, weights = path / "config.yaml", path / "model.pt"
        remedy = "A folder needs config.yaml and model.pt"
    elif path.name in SAM_CONFIGS:
        config, weights = Path(sam2.__path__[0]) / SAM_CONFIGS[path.name], path
        remedy = (f"Download it: hf download facebook/{path.stem.replace('_', '-')} {path.name} "
                  f"--local-dir {path.parent}; or try the method first: --preset tiny")
    else:
        raise LensError(f"--sam {path}: not a folder, and not one of SAM 2's file names "
                        f"({', '.join(SAM_CONFIGS)})")
    for file in (config, weights) if with_weights else (config,):
        if not file.exists():
            raise LensError(f"{file} is missing. {remedy}.")
    sam = instantiate(OmegaConf.load(config).model)
    try:
        if with_weights:
            sam.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise LensError(f"{weights}: not the weights of {config} ({str(error)[:300]})") from None
    return sam


def read_template(processor, args):
    """What the chat template decides, asked once. -> the id of the token that ends a completion,
    and the text with which the prompt already opens the completion ("<think>" and a newline
    for models that always think, else ""). LensError if this template cannot work."""
    if not processor.chat_template:
        raise LensError(f"--mllm {args.mllm}: it has no chat template. Copy chat_template.jinja "
                        f"from the model that it was trained from.")
    tokenizer, chat = processor.tokenizer, chat_messages("x", args.prompt)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special_tags = [token for token in special if any(tag in token for tag in TAGS)]
    if special_tags:
        raise LensError(f"--mllm {args.mllm}: {', '.join(map(repr, special_tags))} are special "
                        f"tokens, which are never sampled and not shown in the text, so every "
                        f"completion would lose its format reward. Set \"special\": false for "
                        f"them in tokenizer.json.")
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    opening = "<think>\n" if prompt.rstrip().endswith("<think>") else ""
    turn = {"role": "assistant", "content": [{"type": "text", "text": "COMPLETION"}]}
    # what the template puts after an answer, for example "<|im_end|>"
    end = processor.apply_chat_template([*chat, turn]).partition("COMPLETION")[2].strip()
    eos = tokenizer.convert_tokens_to_ids(end if end in special else tokenizer.eos_token)
    return eos, opening


def forbidden_tokens(tokenizer, vocab_size, eos, prompt="paper"):
    """(V,) bool: the tokens that are never sampled.

    These are all special tokens but the end token, since a sampled image token would break the next
    forward, and the ids past the tokenizer's last, which only pad the vocabulary. Completions of
    the released prompts may also hold Qwen's marks of an object and its box.
    """
    if len(tokenizer) > vocab_size:
        raise LensError(f"the tokenizer has {len(tokenizer)} tokens, but the MLLM's vocabulary "
                        f"only {vocab_size}: they do not belong together. Take both from one "
                        "model.")
    forbidden = torch.arange(vocab_size) >= len(tokenizer)
    marks = {"<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"}
    allowed = set() if prompt == "paper" else marks
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special and index != eos and token.content not in allowed:
            forbidden[index] = True
    return forbidden


def context_module(lens):
    """The queries and the connector under one state dict: what stage 1 trains."""
    module = nn.Module()
    module.queries, module.connector = lens.queries, lens.connector
    return module


def load_part(module, path, args):
    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise LensError(f"{path} does not fit --mllm {args.mllm} and --sam {args.sam}: it belongs "
                        f"to another architecture ({str(error).splitlines()[0]})") from None


# --- What is trained, on how many processes -------------------------------------------------------

# Parts of SAM that get no gradient when it draws one mask from given prompt embeddings
NEVER_TRAINED = ("point_embed", "not_a_point", "mask_downscaling", "iou_prediction_head",
                 "pred_obj_score_head", "hypernetworks_mlps.1", "hypernetworks_mlps.2",
                 "hypernetworks_mlps.3")


def set_trainable(lens, stage):
    """Stage 1 ("align") trains the queries and the connector. Stage 2 ("rl") trains everything but
    SAM's image encoder (Fig. 2). -> the frozen parameters, which stay whole on every rank"""
    lens.requires_grad_(stage == "rl")
    lens.image_encoder.requires_grad_(False)
    context_module(lens).requires_grad_(True)
    for name, parameter in lens.sam.named_parameters():
        if any(part in name for part in NEVER_TRAINED):
            parameter.requires_grad_(False)
    return [p for p in lens.parameters() if not p.requires_grad]


def checkpoint_layers(mllm):
    """Compute the layers of the MLLM again in the backward instead of keeping their results."""
    if hasattr(mllm, "activation_checkpointing_enable"):  # since transformers 5.23
        mllm.activation_checkpointing_enable()
    else:
        mllm.gradient_checkpointing_enable()


def shard(module, mesh, precision, whole=(), offload=False):
    """Shard a Lens, or a train_rl.Reference, with FSDP2. -> the module

    Each transformer block is a unit of its own, so is SAM's head (in fp32), and the rest is the
    root's. A Lens keeps fp32 weights, computes in `precision` and reduces gradients in fp32. The
    frozen parameters in `whole` are not sharded. `offload` keeps the shards in CPU memory.

    The module comes in on the CPU with its weights as the files have them, mapped into memory, so
    that all processes of a machine share them. It is cast, moved and cut unit by unit: no process
    ever holds all of it.
    """
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    in_fp32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    trains, whole = isinstance(module, Lens), set(whole)

    def make_unit(unit, policy, reshard=True):
        # what is a DTensor already belongs to an inner unit
        own = [p for p in unit.parameters() if p not in whole and not isinstance(p, DTensor)]
        for parameter in own:  # a Reference is frozen: it needs no fp32 weights
            parameter.data = parameter.data.to(torch.float32 if trains else compute)
        if own:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard,
                        ignored_params=whole,
                        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())

    units = [*module.mllm.model.visual.blocks, *module.mllm.model.language_model.layers]
    if trains:
        make_unit(module.sam, in_fp32)
        units += module.connector.blocks
    for unit in units:
        make_unit(unit, policy)
    for parameter in whole:  # FSDP moves everything else
        parameter.data = parameter.data.to(mesh.device_type)
    # the root's backward directly follows its forward, so its weights may stay gathered
    make_unit(module, policy, reshard=not trains)
    if trains:
        register_fsdp_forward_method(module, "align_forward")
    return module


# --- A finished run: a folder for use -------------------------------------------------------------

def full_state(module):
    """The state dict of a sharded module, with whole tensors on the CPU. Every rank calls this."""
    state = module.state_dict()
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.detach().cpu().contiguous()
    return state


def export(folder, lens, shared, mllm=None, processor=None):
    """Write a finished run: context.safetensors, sam.safetensors, lens.json (the shared settings)
    and, if the MLLM was trained, mllm/ from the argument mllm, an unsharded copy of it, which
    transformers and vLLM load as it is. Every rank calls this.

    Everything is written into a temporary folder and then moved, lens.json last. So a folder with a
    lens.json is complete. An MLLM or a SAM that lies in another run's folder is copied along.
    """
    context, sam = full_state(context_module(lens)), full_state(lens.sam)
    if dist.get_rank() == 0:
        folder = Path(folder)
        building = folder / "export.tmp"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save_file(context, building / "context.safetensors")
        save_file(sam, building / "sam.safetensors")
        if mllm is not None:
            mllm.save_pretrained(building / "mllm")
            processor.save_pretrained(building / "mllm")
        for name in ("mllm", "sam"):
            source = Path(getattr(shared, name))
            if (source.parent / "lens.json").exists() and not (building / name).exists():
                shutil.copytree(source, building / name)
        (folder / "lens.json").unlink(missing_ok=True)
        for path in sorted(building.iterdir()):  # replace() overwrites files, but not folders
            shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
        write_whole(folder / "lens.json", json.dumps(asdict(shared), indent=2))
        building.rmdir()
    dist.barrier()
