"""How much memory and arithmetic stage 2 takes, before a GPU is rented. By hand:

    python tests/plan.py --gpus 16 --gpu-memory 48
    python tests/plan.py --gpus 8 --gpu-memory 80 --batch 64 --max-pixels 1000000 --offload

Nothing trains and nothing is downloaded. Any flag of train_rl.py changes the plan as it changes the
run. It plans for the limits: every prompt --max-prompt tokens long (less with --max-pixels), every
completion --max-completion. Letters are the fields of Letters below. Bytes per GPU (what is divided
by s is in CPU memory with --offload):

    always     4t/s weights, 8t/s Adam, 4f frozen parts, bm sampling copy, bm/s reference; per
               prompt its pictures twice, SAM's features 2 * 21A, its mask G S (P + S); on GPUs
               the cache that sampling decodes in, one allocation that stays (model.FixedCache):
               2 b Ck layers n G (--max-prompt up to a multiple of 512 + T up to one of 8)
    sampling   the prompts' own cache 2 b Ck P layers n and b Ck P n G as it is copied; 22 V n G to
               pick a token. Without the fixed cache (on a CPU) 2 b Ck (P + T - 1) layers n G, and
               one layer of it again as it grows
    training   4t/s gradients; with --reduce-once and several passes 4t of unreduced ones; br
               gathered (--reshard false: bt and bm, all of policy and reference); what the MLLM
               keeps (`kept`, `layer`, `block`); and the most of three moments:
                 logits   of a chunk 128 V (12 + b), the head's gradient 3bVC (bVC where one
                          chunk is all), SAM's 4A (24N + 20B), the connector's 84 b N M C
                 layer    made again, gradients 2 b B L I, FSDP's block (3b + 4)u: gathered, the
                          next, gradients, fp32 ones; the head's gradient bVC
                 root     its gradient leaves: (b + 4)r and, of several processes, 4r/s
    update     4t/s gradients, 4m/s AdamW's temporary on a CPU (on GPUs it is fused: none)

The model's files are mapped in CPU memory and it is moved part by part, which takes less than
training does: `host`. What a GPU receives in a step: `communication`. tests/test_plan.py compares
the memory with measured bytes, on the CPU only. Not in it: CUDA's own memory (2 GB assumed) and
fragmentation.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from parameters import MLLMS, build_mllm, build_sam
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from align import SharedArgs, flag, parse_settings, run, set_trainable
from data import LensError
from model import Lens
from train_rl import PRESETS, RLArgs

TEXT = 200      # tokens of a prompt beside its picture (Fig. 4's text, an expression): an estimate
NODE = 8        # GPUs in a node, for --shard hybrid
CUDA = 2e9      # bytes that CUDA, NCCL and cuBLAS keep for themselves: an assumption


@dataclass
class PlanArgs:
    gpus: int = flag(16, "GPUs to plan for")
    gpu_memory: float = flag(48.0, "GB of memory of each")

    def __post_init__(self):
        if self.gpus < 1 or not self.gpu_memory > 0:
            raise LensError("--gpus must be at least 1 and --gpu-memory positive")


@dataclass
class Letters:
    """What the formulas read; those of model.py mean what they mean there."""
    # a step and its rows
    P: int                  # tokens of a prompt
    p: int                  # patches of its picture
    T: int                  # tokens of a completion
    M: int                  # context queries
    G: int                  # samples of a prompt
    B: int                  # prompts in a pass (--micro-batch)
    n: int                  # prompts of a process and step
    b: int                  # bytes of a number in the compute precision
    s: int                  # processes that share a shard
    nodes: int              # copies of all shards: 1, or with --shard hybrid the nodes
    longest: int            # prompt that the fixed cache has room for (--max-prompt)
    # the language model
    V: int                  # vocabulary
    C: int                  # width
    I: int                  # width of the MLP
    Ck: int                 # width of the keys
    heads: int
    layers: int
    # the vision tower
    old: bool               # Qwen2-VL's: LayerNorm and a plain MLP
    Cv: int                 # width
    Iv: int                 # width of the MLP
    depth: int              # blocks
    full: int               # blocks that attend to the whole picture
    window: int             # patches that the other blocks attend to
    merge: int              # patches in a token
    d: int                  # numbers in a patch
    # SAM
    A: int                  # numbers in its map: D (S / 16)^2
    side: int               # side of its picture
    # parameters
    t: int                  # trained
    f: int                  # frozen
    m: int                  # of the MLLM
    u: int                  # of FSDP's largest block
    r: int                  # trained ones of FSDP's root
    sam: int                # trained ones of SAM's head, a unit in fp32
    connector: int

    @property
    def N(self):
        """completions in a pass"""
        return self.B * self.G

    @property
    def S(self):
        """tokens of a completion and its queries"""
        return self.T + self.M

    @property
    def L(self):
        """length of a row"""
        return self.P + self.G * self.S


# --- The model and its letters --------------------------------------------------------------------

def build(shared):
    """The model on the meta device, as stage 2 trains it; the configs of the presets' MLLMs are
    known without a network."""
    if shared.mllm in MLLMS:
        mllm = build_mllm(shared.mllm)
    else:
        try:
            config = AutoConfig.from_pretrained(shared.mllm)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise LensError(f"--mllm {shared.mllm}: no config to plan with ({reason})") from None
        with torch.device("meta"):
            mllm = AutoModelForImageTextToText.from_config(config)
    sam = build_sam(shared.sam)
    with torch.device("meta"):
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        lens = Lens(mllm, sam, shared, forbidden, eos=0)
    set_trainable(lens, "rl")
    return lens


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def count_trained(module):
    return count(parameter for parameter in module.parameters() if parameter.requires_grad)


def letters(lens, shared, args, gpus, P=0, p=0):
    """-> Letters. P and p, tokens and patches of a prompt: by default the most that flags allow."""
    if args.batch % gpus or args.batch // gpus % args.micro_batch:
        raise LensError(f"--batch {args.batch} does not split over {gpus} GPUs in passes of "
                        f"--micro-batch {args.micro_batch}")
    text, vision = lens.mllm.config.text_config, lens.mllm.config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    old = hasattr(vision, "mlp_ratio")
    merge = vision.spatial_merge_size ** 2
    if not P:
        P = shared.max_prompt
        if shared.max_pixels:
            P = min(P, TEXT + shared.max_pixels // (vision.patch_size ** 2 * merge))
    trained = count_trained(lens)
    blocks = [count_trained(block) for block in (*lens.mllm.model.visual.blocks,
                                                 *lens.mllm.model.language_model.layers,
                                                 *lens.connector.blocks)]
    D, side = lens.sam.sam_prompt_encoder.embed_dim, lens.sam_size
    s = min(gpus, NODE) if args.shard == "hybrid" else gpus
    return Letters(
        P=P, p=p or max(P - TEXT, 1) * merge, T=shared.max_completion, M=shared.num_queries,
        G=args.group_size, B=args.micro_batch, n=args.batch // gpus,
        b=2 if shared.precision == "bf16" else 4, s=s, nodes=gpus // s, longest=shared.max_prompt,
        V=lens.mllm.lm_head.out_features, C=text.hidden_size, I=text.intermediate_size,
        Ck=text.num_key_value_heads * head, heads=text.num_attention_heads,
        layers=text.num_hidden_layers, old=old,
        Cv=vision.embed_dim if old else vision.hidden_size,
        Iv=vision.embed_dim * vision.mlp_ratio if old else vision.intermediate_size,
        depth=vision.depth, full=vision.depth if old else len(vision.fullatt_block_indexes),
        window=0 if old else (vision.window_size // vision.patch_size) ** 2, merge=merge,
        d=vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2,
        A=D * (side // 16) ** 2, side=side,
        t=trained, f=count(lens.parameters()) - trained, m=count(lens.mllm.parameters()),
        u=max(blocks), r=trained - sum(blocks) - count_trained(lens.sam),
        sam=count_trained(lens.sam), connector=count(lens.connector.parameters()))


# --- Memory ---------------------------------------------------------------------------------------

def layer(z):
    """Bytes that a layer of the language model keeps: two norms (an fp32 copy, two in b each),
    queries and attention's output, keys and values, the MLP's four; of the group attention prompt,
    completions, their keys, and the mask in b, once for each of the C / Ck heads that share keys
    (model.masked_attention); log-sum-exp."""
    b, rows, keys = z.b, z.B * z.L, z.P + z.S
    linear = 2 * (4 + 2 * b) * z.C + 2 * b * z.C + 2 * b * z.Ck + 4 * b * z.I
    mask = z.N * z.S * keys * z.C / z.Ck
    attention = z.B * z.P * z.C + 3 * z.N * z.S * z.C + 2 * z.N * keys * z.Ck + mask
    return rows * linear + b * attention + 4 * z.heads * (z.B * z.P + z.N * z.S)


def block(z):
    """The same of the vision tower: norms, attention 7b Cv, the MLP's four (Qwen2-VL's: three)."""
    norms, mlp = (4 * z.b, 3) if z.old else (2 * (4 + 2 * z.b), 4)
    return z.B * z.p * (norms * z.Cv + 7 * z.b * z.Cv + mlp * z.b * z.Iv)


def kept(z, checkpointing):
    """Bytes that a pass keeps of the MLLM: of each layer its input alone or all of it, and both
    ends."""
    b, rows, patches = z.b, z.B * z.L, z.B * z.p
    if checkpointing:
        inner = z.layers * b * rows * z.C + z.depth * b * patches * z.Cv
    else:
        inner = z.layers * layer(z) + z.depth * block(z)
    text = rows * (4 + b) * z.C + b * z.N * z.S * z.C
    vision = patches * ((4 * b + 4 * (not z.old)) * z.Cv + b * z.d)
    return inner + text + vision


def moments(z, args):
    """{moment of the backward pass: bytes that it alone takes}"""
    b = z.b
    chunk = min(128, z.N * z.T)                                      # tokens; see token_log_probs
    again = layer(z) * args.gradient_checkpointing
    heads = 3 if z.N * z.T > chunk else 1            # its gradient: the sum, a chunk's, the new sum
    return {"logits": (chunk * z.V * (12 + b) + heads * b * z.V * z.C
                       + 4 * z.A * (24 * z.N + 20 * z.B)
                       + 84 * b * z.N * z.M * z.C),
            "layer": again + 2 * b * z.B * z.L * z.I + (3 * b + 4) * z.u + b * z.V * z.C,
            "root": (b + 4) * z.r + 4 * z.r / z.s * (z.s > 1)}


def slots(P, T):
    """Places that model.FixedCache has for a sequence of P + T tokens."""
    return -(-P // 512) * 512 + -(-T // 8) * 8


def memory(z, args, fixed=True):
    """-> {phase: {part: bytes per GPU}}. fixed: as on GPUs, where sampling decodes in a FixedCache
    and AdamW is fused."""
    b, sharded = z.b, 0 if args.offload else 1 / z.s
    per_picture = z.p * z.d + 3 * z.side ** 2 + z.side ** 2 // 8
    per_prompt = 2 * 4 * per_picture + 2 * 21 * z.A + z.G * z.S * (z.P + z.S)
    always = {"weights": 4 * z.t * sharded, "Adam": 8 * z.t * sharded, "frozen parts": 4 * z.f,
              "sampling copy": b * z.m, "reference": b * z.m * sharded * (args.beta > 0),
              "pictures": z.n * per_prompt}
    a_token = 2 * b * z.Ck * z.layers
    if fixed:
        always["cache"] = a_token * z.n * z.G * slots(z.longest, z.T)
        sampling = {"prompts' cache": a_token * z.P * z.n + b * z.Ck * z.P * z.n * z.G}
    else:
        sampling = {"cache": a_token * (1 + 1 / z.layers) * (z.P + z.T - 1) * z.n * z.G}
    sampling["picking"] = 22 * z.V * z.n * z.G
    gradients = {"gradients": 4 * z.t * sharded}
    momentary = moments(z, args)
    busiest = max(momentary, key=momentary.get)
    training = {"gathered": b * (z.r if args.reshard else z.t + z.m * (args.beta > 0)),
                "kept": kept(z, args.gradient_checkpointing),
                f"moment: {busiest}": momentary[busiest]}
    if args.reduce_once and z.n > z.B:
        training["unreduced"] = 4 * z.t
    return {"sampling": {**always, **sampling},
            "training": {**always, **gradients, **training},
            "update": {**always, **gradients, "temporary": 0 if fixed else 4 * z.m * sharded}}


def host(z, moved=True):
    """-> bytes of CPU memory until the model is sharded: the mapped files of the MLLM (bf16), which
    the processes of a machine share, and what each has of its own. That is SAM and the context
    module in fp32 and one unit cast to fp32 after another, each moved to the GPU where it is cut;
    the root comes last, when all else has left. Not moved, as on a CPU, all stays, and the root is
    there twice as it is cut. Not in it: Python, CUDA and the loaders' processes."""
    outside = z.f + z.t - z.m
    own = max(outside + z.u, z.r) if moved else z.f + z.t + z.r
    return 2 * z.m, 4 * own


def host_before(z, args):
    """What each process held before the files were mapped: all in fp32 and the reference."""
    return 4 * (z.t + z.f) + z.b * z.m * (args.beta > 0)


# --- Communication --------------------------------------------------------------------------------

def communication(z, args, before=False):
    """-> {part: bytes that a GPU receives in a step}. A ring's share (s - 1) / s of what is
    gathered (in b, SAM's head in fp32) or reduced; no padding, no scalars. before: the root
    gathered twice, every pass reduced, and a refresh that gathered the connector and SAM's decoder
    as well."""
    b, share = z.b, (z.s - 1) / z.s
    of_reference = z.n // z.B                           # passes
    of_policy = of_reference * args.updates_per_batch
    whole = b * z.t + (4 - b) * z.sam
    again = (whole if before else whole - b * z.r) * args.reshard
    once = args.reduce_once and not before
    reductions = args.updates_per_batch if once else of_policy
    received = {"policy gathered": of_policy * (whole + again) * share,
                "reference gathered": of_reference * b * z.m * share * (args.beta > 0),
                "gradients reduced": reductions * 4 * z.t * share,
                "refresh": (whole if before else b * z.m) * share}
    if z.nodes > 1:
        around = 2 * (z.nodes - 1) / z.nodes            # an all-reduce's two rounds
        received["between nodes"] = reductions * around * 4 * z.t / z.s
    return received


# --- Arithmetic -----------------------------------------------------------------------------------

def weights(z):
    """Parameters that a token of the language model passes through: its layers' and its head's."""
    return z.layers * (2 * z.C ** 2 + 2 * z.C * z.Ck + 3 * z.C * z.I) + z.V * z.C


def language(z, rows, pairs):
    """FLOPs of the language model's layers: 2 per weight and token, 4C per (query, key) pair. No
    discount for causality."""
    return 2 * rows * (weights(z) - z.V * z.C) + z.layers * 4 * z.C * pairs


def vision(z):
    """FLOPs of the vision tower for one picture."""
    pairs = z.p * (z.full * z.p + (z.depth - z.full) * min(z.window, z.p))
    blocks = z.depth * (4 * z.Cv ** 2 + (2 if z.old else 3) * z.Cv * z.Iv)
    ends = z.d * z.Cv + z.merge * z.Cv ** 2 + z.Cv * z.C
    return 2 * z.p * (blocks + ends) + 4 * z.Cv * pairs


def group(z):
    """FLOPs of one prompt's packed row in the language model, forward, without logits."""
    return language(z, z.L, z.P ** 2 + z.G * z.S * (z.P + z.S))


def arithmetic(lens, z, args):
    """-> {part: FLOPs per GPU and step}. SAM's are counted on the meta device, the rest by
    formula."""
    D, side = lens.sam.sam_prompt_encoder.embed_dim, z.side
    with torch.device("meta"), FlopCounterMode(display=False) as encoder, torch.no_grad():
        features = lens.image_encoder(torch.empty(1, 3, side, side))["backbone_fpn"]
    with torch.device("meta"), FlopCounterMode(display=False) as decoder:
        lens.sam(features, torch.empty(1, z.G, z.M, D))
    segmentation = decoder.get_total_flops() + 2 * z.connector * z.G * z.M
    logits = 2 * z.V * z.C * z.G * z.T
    decode = language(z, z.G * z.T, z.G * (z.P * z.T + z.T ** 2 / 2)) + logits
    times = 4 if args.gradient_checkpointing else 3              # forward, (again,) backward twice
    policy = times * (vision(z) + group(z)) + 4 * logits
    per_prompt = {"sampling": vision(z) + language(z, z.P, z.P ** 2) + decode,
                  "policy": policy * args.updates_per_batch,
                  "reference": (vision(z) + group(z) + logits) * (args.beta > 0),
                  "SAM encoder": encoder.get_total_flops(),
                  "SAM and connector": 3 * segmentation * args.updates_per_batch}
    return {name: z.n * flops for name, flops in per_prompt.items()}


# --- The page -------------------------------------------------------------------------------------

def memory_table(phases):
    """Lines: a row per part, a column per phase, in GB."""
    lines = [f"{'GB per GPU':<18}" + "".join(f"{phase:>10}" for phase in phases)]
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        cells = [f"{parts[part] / 1e9:10.2f}" if part in parts else " " * 10
                 for parts in phases.values()]
        lines.append(f"{part:<18}" + "".join(cells))
    totals = [f"{sum(parts.values()) / 1e9:10.2f}" for parts in phases.values()]
    return [*lines, f"{'all':<18}" + "".join(totals)]


def verdict(need, limit):
    return f"{need / 1e9:.1f} GB, {'fits' if need <= limit else 'DOES NOT FIT'}"


def print_plan(shared, args, plan_args):
    lens = build(shared)
    z = letters(lens, shared, args, plan_args.gpus)
    phases, limit = memory(z, args), plan_args.gpu_memory * 1e9
    print(f"{shared.mllm} on {plan_args.gpus} GPUs of {plan_args.gpu_memory:g} GB: "
          f"{z.t / 1e9:.2f} G parameters train, {z.f / 1e9:.2f} G do not\n"
          f"at most {z.P} prompt tokens, {z.T} of a completion, rows of {z.L}; {z.n} prompts per "
          f"GPU and step\n")
    print("\n".join(memory_table(phases)))
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    peak = max(totals.values())
    scores = 12 * z.N * z.heads * z.S * (z.P + z.S)
    unfused = max(peak, totals["training"] + scores)
    print(f"\nwith {CUDA / 1e9:g} GB for CUDA: {verdict(peak + CUDA, limit)}\n"
          f"not measured: whether attention with a mask takes a fused kernel on this GPU "
          f"(tests/gpu.py measures it); where not, its scores add {scores / 1e9:.1f} GB to "
          f"training: {verdict(unfused + CUDA, limit)}")
    offloaded = (16 * z.t + z.b * z.m * (args.beta > 0)) / z.s if args.offload else 0
    shared_pages, own = host(z)
    print(f"CPU memory while it starts: {shared_pages / 1e9:.1f} GB of mapped files per machine "
          f"and {own / 1e9:.1f} GB per process; {offloaded / 1e9:.1f} GB of shards per process "
          f"afterwards")
    print_communication(z, args)
    flops = arithmetic(lens, z, args)
    total = sum(flops.values())
    print("\nTFLOP per GPU and step: "
          + ", ".join(f"{name} {value / 1e12:.1f}" for name, value in flops.items()))
    cache_read = 2 * z.b * z.Ck * z.layers * z.n * z.G * slots(z.P, z.T)
    read = z.T * (z.b * weights(z) + cache_read)
    print(f"all {total / 1e12:.0f}: {total / 1e14:.1f} s at 100 TFLOP/s, if a GPU achieves that "
          f"(not measured). Sampling also reads {read / 1e12:.1f} TB of weights and cache, one "
          f"token after another.")


def print_communication(z, args):
    now, before = communication(z, args), communication(z, args, before=True)
    print("\nGB that a GPU receives per step: "
          + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in now.items())
          + f"\nall {sum(now.values()) / 1e9:.1f}; {sum(before.values()) / 1e9:.1f} with the root "
          f"gathered twice, every pass reduced and a refresh of the whole")


def main():
    print_plan(*parse_settings([SharedArgs, RLArgs, PlanArgs], PRESETS, __doc__.splitlines()[0]))


if __name__ == "__main__":
    run(main)
