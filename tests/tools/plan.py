"""Does stage 2 fit into my GPUs, and what does one step cost? Ask before you rent them:

    python tests/tools/plan.py --gpus 16 --gpu-memory 48
    python tests/tools/plan.py --gpus 8 --gpu-memory 80 --max-pixels 500000 --offload

Nothing trains and nothing is downloaded. Every flag of train_rl.py changes the plan as it changes
the run. The plan is for the limits: every prompt has --max-prompt tokens (fewer with --max-pixels),
and every completion has --max-completion.

A step has three phases: sampling, training (forward and backward over its micro-batches), and the
update of the weights. `memory` adds up the bytes that one GPU holds in each of them. Besides, the
page says how much memory the host needs while the model loads (`host_memory`), what a GPU receives
from the others (`communication`), and how many FLOPs it computes (`arithmetic`).

tests/test_plan.py compares these formulas with measured bytes and counted FLOPs of small models on
a CPU. What CUDA itself takes (2 GB are assumed) and what the allocator wastes are not known.
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from align import SharedArgs, flag, parse_settings, run
from data import LensError
from model import Lens, load_sam, set_trainable
from train_rl import PRESETS, RLArgs

TEXT = 200      # tokens of a prompt beside its image (Fig. 4's text, an expression): an estimate
NODE = 8        # GPUs of one machine, for --shard hybrid
CUDA = 2e9      # bytes that CUDA, NCCL and cuBLAS keep for themselves: an assumption


@dataclass
class PlanArgs:
    gpus: int = flag(16, "GPUs to plan for")
    gpu_memory: float = flag(48.0, "GB of memory of each")

    def __post_init__(self):
        if self.gpus < 1 or not self.gpu_memory > 0:
            raise LensError("--gpus must be at least 1 and --gpu-memory positive")


@dataclass
class Sizes:
    """The numbers that the formulas read. Capital letters mean what they mean in model.py."""
    # one step
    P: int                  # tokens of a prompt
    patches: int            # of its image, as the vision tower counts them
    T: int                  # tokens of a completion
    M: int                  # context queries
    G: int                  # completions per prompt
    B: int                  # prompts of a micro-batch
    prompts: int            # prompts per process and step
    width: int              # bytes of a number in the compute precision
    shards: int             # processes over which the weights are sharded
    nodes: int              # copies of all shards: 1, or the machines with --shard hybrid
    longest_prompt: int     # what the fixed cache has room for (--max-prompt)
    # the language model
    V: int                  # vocabulary
    C: int                  # hidden size
    mlp: int                # width of its MLP
    keys: int               # width of its keys, over all key heads
    heads: int
    layers: int
    # the vision tower
    plain: bool             # Qwen2-VL's: LayerNorm and an MLP without gate
    vision_C: int           # its hidden size
    vision_mlp: int         # width of its MLP
    blocks: int
    full_blocks: int        # blocks that attend to the whole image
    window: int             # patches that a patch of the other blocks attends to
    merge: int              # patches per token
    patch: int              # numbers per patch
    # SAM
    S: int                  # side of its image
    sam_map: int            # numbers in its coarsest map, D (S / 16)^2
    # parameters
    trained: int
    frozen: int
    mllm: int               # those of the MLLM
    block: int              # those of FSDP's largest block
    root: int               # the trained ones in no block, which FSDP's root unit holds
    sam: int                # the trained ones of SAM's head, a unit in fp32
    connector: int

    @property
    def N(self):
        """completions of a micro-batch"""
        return self.B * self.G

    @property
    def segment(self):
        """places of one completion with its queries"""
        return self.T + self.M

    @property
    def L(self):
        """places of a packed row"""
        return self.P + self.G * self.segment


# --- Memory of a GPU ------------------------------------------------------------------------------

def memory(z, args, on_gpu=True):
    """-> {phase: {part: bytes per GPU}}. With --offload the shards lie in CPU memory, so they count
    as nothing. on_gpu=False is for the tests: a CPU decodes in a growing cache, and its AdamW needs
    room for a temporary copy."""
    shard = 0 if args.offload else 1 / z.shards
    # the batch holds every image, and its micro-batch a copy: patches, SAM's pixels, low-res masks
    image = 2 * 4 * (z.patches * z.patch + 3 * z.S ** 2 + z.S ** 2 // 8)
    features = 2 * (16 + 4 + 1) * z.sam_map                          # SAM's three maps in bf16
    attention_mask = z.G * z.segment * (z.P + z.segment)
    always = {"weights": 4 * z.trained * shard, "Adam": 8 * z.trained * shard,
              "frozen parts": 4 * z.frozen, "sampling copy": z.width * z.mllm,
              "reference": z.width * z.mllm * shard * (args.beta > 0),
              "images": z.prompts * (image + features + attention_mask)}

    completions = z.prompts * z.G
    if on_gpu:                                       # one allocation, which stays
        always["cache"] = cached_token(z) * completions * slots(z.longest_prompt, z.T)
        sampling = {"prompts' cache": cached_token(z) * z.P * z.prompts
                                      + z.width * z.keys * z.P * completions}
    else:                                            # one layer is there twice while it grows
        length = z.P + z.T - 1
        sampling = {"cache": cached_token(z) * (1 + 1 / z.layers) * length * completions}
    sampling["picking"] = 22 * z.V * completions

    gradients = {"gradients": 4 * z.trained * shard}
    moments = training_moments(z, args)
    largest = max(moments, key=moments.get)
    training = {"gathered root": z.width * z.root, "kept": kept(z, args.gradient_checkpointing),
                f"moment: {largest}": moments[largest]}
    # AdamW is one fused kernel on a GPU
    update = {"temporary": 0 if on_gpu else 4 * z.mllm * shard}
    return {"sampling": {**always, **sampling}, "training": {**always, **gradients, **training},
            "update": {**always, **gradients, **update}}


def cached_token(z):
    """Bytes of one token's keys and values in all layers."""
    return 2 * z.width * z.keys * z.layers


def slots(P, T):
    """Places that train_rl.FixedCache has for a sequence of P + T tokens."""
    return -(-P // 512) * 512 + -(-T // 8) * 8


def kept(z, checkpointing):
    """Bytes that the MLLM keeps for the backward pass of a micro-batch: all of every layer, or its
    input alone with gradient checkpointing, and what both ends of the MLLM keep."""
    width, rows, patches = z.width, z.B * z.L, z.B * z.patches
    if checkpointing:
        layers = z.layers * width * rows * z.C + z.blocks * width * patches * z.vision_C
    else:
        layers = z.layers * kept_by_layer(z) + z.blocks * kept_by_block(z)
    language = rows * (4 + width) * z.C + width * z.N * z.segment * z.C
    vision = patches * ((4 * width + 4 * (not z.plain)) * z.vision_C + width * z.patch)
    return layers + language + vision


def kept_by_layer(z):
    """Bytes that one layer of the language model keeps for its backward pass."""
    width, rows, length = z.width, z.B * z.L, z.P + z.segment
    norms = 2 * (4 + 2 * width) * z.C                        # each a copy in fp32 and two others
    linear = norms + 2 * width * z.C + 2 * width * z.keys + 4 * width * z.mlp
    # the mask is repeated for the heads that share a key head: C / keys of them
    mask = z.N * z.segment * length * z.C / z.keys
    attention = (z.B * z.P * z.C + 3 * z.N * z.segment * z.C + 2 * z.N * length * z.keys + mask)
    log_sum_exp = 4 * z.heads * (z.B * z.P + z.N * z.segment)
    return rows * linear + width * attention + log_sum_exp


def kept_by_block(z):
    """Bytes that one block of the vision tower keeps for its backward pass."""
    norms, mlp = (4 * z.width, 3) if z.plain else (2 * (4 + 2 * z.width), 4)
    numbers = norms * z.vision_C + 7 * z.width * z.vision_C + mlp * z.width * z.vision_mlp
    return z.B * z.patches * numbers


def training_moments(z, args):
    """-> {moment of the backward pass: bytes that it alone takes}. They come one after another, so
    only the largest counts.

    logits   the backward pass of lm_head, chunk by chunk, of SAM and of the connector
    layer    one layer is computed again; FSDP has gathered it and the next, and has its gradients
    root     the gradient of the root's weights leaves
    """
    width, lm_head = z.width, z.V * z.C
    chunk = min(128, z.N * z.T)                              # tokens, see grpo.token_log_probs
    # lm_head's gradient: the sum so far, this chunk's, and the new sum; one where one chunk is all
    copies = 3 if z.N * z.T > chunk else 1
    again = kept_by_layer(z) * args.gradient_checkpointing
    return {"logits": (chunk * z.V * (12 + width) + copies * width * lm_head
                       + 4 * z.sam_map * (24 * z.N + 20 * z.B) + 84 * width * z.N * z.M * z.C),
            "layer": (again + 2 * width * z.B * z.L * z.mlp + (3 * width + 4) * z.block
                      + width * lm_head),
            "root": (width + 4) * z.root + 4 * z.root / z.shards * (z.shards > 1)}


# --- Memory of the host, while the model loads ----------------------------------------------------

def host_memory(z, moved=True):
    """-> bytes of mapped files, which all processes of a machine share, and bytes that each process
    has of its own. The MLLM's files (bf16) are mapped and cut unit by unit. A process holds SAM and
    the context module in fp32 and one unit at a time, which moves to the GPU; the root comes last.
    moved=False is for the tests: on a CPU everything stays. Python, CUDA and the processes that
    load data are not counted."""
    outside_mllm = z.frozen + z.trained - z.mllm
    own = max(outside_mllm + z.block, z.root) if moved else z.frozen + z.trained + z.root
    return 2 * z.mllm, 4 * own


# --- Communication --------------------------------------------------------------------------------

def communication(z, args):
    """-> {part: bytes that a GPU receives in a step}. Of what a ring of s processes gathers or
    reduces, each receives (s - 1) / s."""
    share = (z.shards - 1) / z.shards
    micro_batches = z.prompts // z.B
    passes = micro_batches * args.updates_per_batch
    gathered = z.width * z.trained + (4 - z.width) * z.sam           # SAM's head in fp32
    twice = 2 * gathered - z.width * z.root          # forward and backward; the root stays gathered
    received = {"policy gathered": passes * twice * share,
                "reference gathered": micro_batches * z.width * z.mllm * share * (args.beta > 0),
                "gradients reduced": passes * 4 * z.trained * share,
                "refresh": z.width * z.mllm * share}
    if z.nodes > 1:                                  # an all-reduce of the shards in two rounds
        around = 2 * (z.nodes - 1) / z.nodes
        received["between nodes"] = passes * around * 4 * z.trained / z.shards
    return received


# --- Arithmetic -----------------------------------------------------------------------------------

def arithmetic(lens, z, args):
    """-> {part: FLOPs per GPU and step}. SAM's are counted on the meta device, the rest follows
    from formulas. The backward pass costs two forward passes; with gradient checkpointing the MLLM
    computes its forward pass once more."""
    D = lens.sam.sam_prompt_encoder.embed_dim
    with torch.device("meta"), FlopCounterMode(display=False) as encoder, torch.no_grad():
        features = lens.image_encoder(torch.empty(1, 3, z.S, z.S))["backbone_fpn"]
    with torch.device("meta"), FlopCounterMode(display=False) as decoder:
        lens.sam(features, torch.empty(1, z.G, z.M, D))
    segmentation = decoder.get_total_flops() + 2 * z.connector * z.G * z.M
    logits = 2 * z.V * z.C * z.G * z.T
    decoding = language_flops(z, z.G * z.T, z.G * (z.P * z.T + z.T ** 2 / 2)) + logits
    mllm = vision_flops(z) + group_flops(z)
    policy = (4 if args.gradient_checkpointing else 3) * mllm + 4 * logits
    per_prompt = {"sampling": vision_flops(z) + language_flops(z, z.P, z.P ** 2) + decoding,
                  "policy": policy * args.updates_per_batch,
                  "reference": (mllm + logits) * (args.beta > 0),
                  "SAM encoder": encoder.get_total_flops(),
                  "SAM and connector": 3 * segmentation * args.updates_per_batch}
    return {name: z.prompts * flops for name, flops in per_prompt.items()}


def token_weights(z):
    """Parameters that a token of the language model passes through: its layers' and lm_head's."""
    return z.layers * (2 * z.C ** 2 + 2 * z.C * z.keys + 3 * z.C * z.mlp) + z.V * z.C


def language_flops(z, tokens, pairs):
    """Of the language model's layers: 2 per weight and token, 4 C per pair of a query and a key.
    Causal attention is counted in full."""
    return 2 * tokens * (token_weights(z) - z.V * z.C) + z.layers * 4 * z.C * pairs


def vision_flops(z):
    """Of the vision tower, for one image."""
    in_windows = (z.blocks - z.full_blocks) * min(z.window, z.patches)
    pairs = z.patches * (z.full_blocks * z.patches + in_windows)
    weights = z.blocks * (4 * z.vision_C ** 2 + (2 if z.plain else 3) * z.vision_C * z.vision_mlp)
    ends = z.patch * z.vision_C + z.merge * z.vision_C ** 2 + z.vision_C * z.C
    return 2 * z.patches * (weights + ends) + 4 * z.vision_C * pairs


def group_flops(z):
    """Of the language model's forward pass over one packed row, without logits."""
    return language_flops(z, z.L, z.P ** 2 + z.G * z.segment * (z.P + z.segment))


# --- The page -------------------------------------------------------------------------------------

def print_plan(shared, args, plan_args):
    lens = build(shared)
    z = sizes(lens, shared, args, plan_args.gpus)
    phases, limit = memory(z, args), plan_args.gpu_memory * 1e9
    print(f"{shared.mllm} on {plan_args.gpus} GPUs of {plan_args.gpu_memory:g} GB: "
          f"{z.trained / 1e9:.2f} G parameters train, {z.frozen / 1e9:.2f} G do not.\n"
          f"At most {z.P} prompt tokens and {z.T} of a completion, so rows of {z.L}; {z.prompts} "
          f"prompts per GPU and step in micro-batches of {z.B}.\n")
    print("\n".join(memory_table(phases)))
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    peak, unfused = max(totals.values()), max(*totals.values(), totals["training"] + scores(z))
    print(f"\nWith {CUDA / 1e9:g} GB for CUDA: {verdict(peak + CUDA, limit)}.\n"
          f"If this GPU has no fused kernel for attention with a mask (tests/tools/gpu.py finds "
          f"out), training needs {scores(z) / 1e9:.1f} GB more for the scores: "
          f"{verdict(unfused + CUDA, limit)}.")
    files, own = host_memory(z)
    print(f"CPU memory while the model loads: {files / 1e9:.1f} GB of mapped files per machine "
          f"and {own / 1e9:.1f} GB per process.")
    if args.offload:
        offloaded = (16 * z.trained + z.width * z.mllm * (args.beta > 0)) / z.shards
        print(f"Afterwards {offloaded / 1e9:.1f} GB of shards per process lie in CPU memory.")
    print_parts("GB that a GPU receives per step", communication(z, args), 1e9)
    flops = arithmetic(lens, z, args)
    print_parts("TFLOP per GPU and step", flops, 1e12)
    cache = cached_token(z) * z.prompts * z.G * slots(z.P, z.T)
    reads = z.T * (z.width * token_weights(z) + cache)
    print(f"That is {sum(flops.values()) / 1e14:.1f} s if a GPU achieves 100 TFLOP/s, which is not "
          f"measured. Sampling also reads {reads / 1e12:.1f} TB of weights and cache, one token "
          f"after another.")


def scores(z):
    """Bytes of the attention scores of one layer, where no fused kernel keeps them away."""
    return 12 * z.N * z.heads * z.segment * (z.P + z.segment)


def verdict(need, limit):
    return f"{need / 1e9:.1f} GB, {'fits' if need <= limit else 'DOES NOT FIT'}"


def print_parts(title, parts, unit):
    listed = ", ".join(f"{name} {value / unit:.1f}" for name, value in parts.items())
    print(f"\n{title}: {listed}; all {sum(parts.values()) / unit:.1f}.")


def memory_table(phases):
    """Lines: a row per part, a column per phase, in GB."""
    lines = [f"{'GB per GPU':<18}" + "".join(f"{phase:>10}" for phase in phases)]
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        cells = [f"{parts[part] / 1e9:10.2f}" if part in parts else " " * 10
                 for parts in phases.values()]
        lines.append(f"{part:<18}" + "".join(cells))
    totals = [f"{sum(parts.values()) / 1e9:10.2f}" for parts in phases.values()]
    return [*lines, f"{'all':<18}" + "".join(totals)]


# --- The model without memory, and its sizes ------------------------------------------------------

QWEN2_VISION = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14)
QWEN2_5_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                      patch_size=14)
# Of each published config.json what decides a shape:
# name: (family, language model, is lm_head tied to the embeddings, vision tower)
MLLMS = {
    "Qwen/Qwen2-VL-2B-Instruct": (
        "qwen2_vl",
        dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
             num_attention_heads=12, num_key_value_heads=2, vocab_size=151936),
        True, {**QWEN2_VISION, "hidden_size": 1536}),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
             num_attention_heads=16, num_key_value_heads=2, vocab_size=151936),
        True, {**QWEN2_5_VISION, "out_hidden_size": 2048}),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
             num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
        False, {**QWEN2_5_VISION, "out_hidden_size": 3584})}


def mllm_config(name, text={}, vision={}, **tokens):
    """The config of one of MLLMS, without a network. The others change it."""
    family, published_text, tied, published_vision = MLLMS[name]
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    return AutoConfig.for_model(
        family, text_config={**published_text, "rope_parameters": rope, **text},
        vision_config={**published_vision, **vision}, tie_word_embeddings=tied, **tokens)


def build_mllm(config):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def build_sam(path="sam2_hiera_large.pt"):
    """SAM 2 with its video memory."""
    with sam_on_meta():
        return load_sam(path, with_weights=False)


@contextmanager
def sam_on_meta():
    """Where SAM 2 can be built without memory. Its trunk reads numbers out of a linspace, and meta
    tensors hold none. Where there is a GPU its attention sends tables there, which fails for meta
    tensors, so it must see none."""
    with (torch.device("meta"),
          mock.patch("torch.linspace", partial(torch.linspace, device="cpu")),
          mock.patch("torch.cuda.is_available", return_value=False)):
        yield


def build(shared, config=None):
    """The model on the meta device, as stage 2 trains it. config: the MLLM's; by default the one
    that --mllm names."""
    if config is None and shared.mllm in MLLMS:
        config = mllm_config(shared.mllm)
    try:
        mllm = build_mllm(config or AutoConfig.from_pretrained(shared.mllm))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LensError(f"--mllm {shared.mllm}: no config to plan with ({reason})") from None
    sam = build_sam(shared.sam)
    with torch.device("meta"):
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        lens = Lens(mllm, sam, shared, forbidden, eos=0)
    set_trainable(lens, "rl")
    return lens


def count(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def sizes(lens, shared, args, gpus, P=0, patches=0):
    """-> Sizes. P and patches are those of a prompt; by default the most that the flags allow."""
    if args.batch % gpus or args.batch // gpus % args.micro_batch:
        raise LensError(f"--batch {args.batch} does not split over {gpus} GPUs in micro-batches of "
                        f"{args.micro_batch} (--micro-batch)")
    text, vision = lens.mllm.config.text_config, lens.mllm.config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    plain = hasattr(vision, "mlp_ratio")
    if not plain and not hasattr(vision, "fullatt_block_indexes"):
        raise LensError(f"--mllm {shared.mllm}: the plan knows Qwen2-VL and Qwen2.5-VL only, not "
                        f"{lens.mllm.config.model_type}")
    merge = vision.spatial_merge_size ** 2
    if not P:
        P = shared.max_prompt
        if shared.max_pixels:
            P = min(P, TEXT + shared.max_pixels // (vision.patch_size ** 2 * merge))
    blocks = [count(block, trained=True)
              for block in (*lens.mllm.model.visual.blocks, *lens.mllm.model.language_model.layers,
                            *lens.connector.blocks)]
    trained, sam = count(lens, trained=True), count(lens.sam, trained=True)
    shards = min(gpus, NODE) if args.shard == "hybrid" else gpus
    return Sizes(
        P=P, patches=patches or max(P - TEXT, 1) * merge, T=shared.max_completion,
        M=shared.num_queries, G=args.group_size, B=args.micro_batch, prompts=args.batch // gpus,
        width=2 if shared.precision == "bf16" else 4, shards=shards, nodes=gpus // shards,
        longest_prompt=shared.max_prompt,
        V=lens.mllm.lm_head.out_features, C=text.hidden_size, mlp=text.intermediate_size,
        keys=text.num_key_value_heads * head, heads=text.num_attention_heads,
        layers=text.num_hidden_layers,
        plain=plain, vision_C=vision.embed_dim if plain else vision.hidden_size,
        vision_mlp=vision.embed_dim * vision.mlp_ratio if plain else vision.intermediate_size,
        blocks=vision.depth,
        full_blocks=vision.depth if plain else len(vision.fullatt_block_indexes),
        window=0 if plain else (vision.window_size // vision.patch_size) ** 2, merge=merge,
        patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2,
        S=lens.sam_size, sam_map=lens.sam.sam_prompt_encoder.embed_dim * (lens.sam_size // 16) ** 2,
        trained=trained, frozen=count(lens) - trained, mllm=count(lens.mllm), block=max(blocks),
        root=trained - sum(blocks) - sam, sam=sam, connector=count(lens.connector))


def main():
    print_plan(*parse_settings([SharedArgs, RLArgs, PlanArgs], PRESETS, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run(main)
