"""How much memory and arithmetic stage 2 takes, before a GPU is rented. Nothing runs and nothing is downloaded.

    python train_rl.py --plan --gpus 16 --gpu-memory 48       # any other flag changes the plan as it changes the run

It plans for the limits: every prompt --max-prompt tokens long (less with --max-pixels), every completion --max-completion.
Letters as in model.py, B prompts in a pass, N = B G, S = T + M, L = P + G S; n prompts of a process and step; b bytes of the
compute precision; Ck width of the keys, I of the MLP; p patches, Cv, Iv width and MLP of the vision tower, d numbers in a
patch; A = D (S/16)^2, SAM's map; t trained, f frozen, m the MLLM's parameters, u of FSDP's largest block, r of its root; s
processes share a shard. Bytes per GPU (what is divided by s is in CPU memory with --offload):

    always     4t/s weights, 8t/s Adam, 4f frozen parts, bm sampling copy, bm/s reference; per prompt its pictures twice,
               SAM's features 2 * 21A, its mask G S (P + S)
    sampling   cache 2 b Ck (P + T - 1) layers n G and one layer of it again as it grows; 22 V n G to pick a token
    training   4t/s gradients; br gathered (--reshard false: bt and bm, all of policy and reference); what the MLLM keeps
               (`kept`, `layer`, `block`); and the most of three moments:
                 logits   of a chunk 128 V (12 + b), the head's gradient twice 2bVC, SAM's 4A (24N + 20B), the connector's
                          84 b N M C
                 layer    made again, gradients 2 b B L I, FSDP's block (3b + 4)u: gathered, the next, gradients, fp32
                          ones; the head's gradient bVC
                 root     its gradient leaves: (b + 4)r and, of several processes, 4r/s
    update     4t/s gradients, 4m/s AdamW's temporary

The model is loaded in CPU memory and moved part by part, which takes less than training does: `host`.
tests/test_plan.py compares them with measured bytes, on the CPU only. Not in them: CUDA's own memory (2 GB assumed) and
fragmentation.
"""
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from parameters import MLLMS, build_mllm
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from data import LensError
from model import Lens, load_sam, set_trainable

TEXT = 200              # tokens of a prompt beside its picture (Fig. 4's text and an expression): an estimate
NODE = 8                # GPUs in a node, for --shard hybrid
CUDA = 2e9              # bytes that CUDA, NCCL and cuBLAS keep for themselves: an assumption


def build(shared):
    """The model on the meta device, as stage 2 trains it; of the presets' MLLMS the config is known without a network."""
    if shared.mllm in MLLMS:
        mllm = build_mllm(shared.mllm)
    else:
        try:
            config = AutoConfig.from_pretrained(shared.mllm)
        except (OSError, ValueError) as error:
            raise LensError(f"--mllm {shared.mllm}: no config to plan with ({str(error).splitlines()[0]})") from None
        with torch.device("meta"):
            mllm = AutoModelForImageTextToText.from_config(config)
    with torch.device("meta"), mock.patch("torch.linspace", partial(torch.linspace, device="cpu")):  # SAM reads it
        sam = load_sam(shared.sam, with_weights=False)
        lens = Lens(mllm, sam, shared, torch.zeros(mllm.lm_head.out_features, dtype=torch.bool), 0)
    set_trainable(lens, "rl")
    return lens


def letters(lens, shared, args, gpus, P=0, p=0):
    """What the formulas read. P and p, tokens and patches of a prompt: by default the most that the flags allow."""
    if args.batch % gpus or args.batch // gpus % args.micro_batch:
        raise LensError(f"--batch {args.batch} does not split over {gpus} GPUs in passes of --micro-batch "
                        f"{args.micro_batch}")
    text, vision = lens.mllm.config.text_config, lens.mllm.config.vision_config
    count = lambda parameters: sum(q.numel() for q in parameters)
    trained = lambda module: count(q for q in module.parameters() if q.requires_grad)
    blocks = [*lens.mllm.model.visual.blocks, *lens.mllm.model.language_model.layers, *lens.connector.blocks]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    old = hasattr(vision, "mlp_ratio")                                   # Qwen2-VL's tower: LayerNorm, a plain MLP
    P = P or min(shared.max_prompt, TEXT + shared.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
                 if shared.max_pixels else shared.max_prompt)
    z = SimpleNamespace(
        P=P, p=p or max(P - TEXT, 1) * vision.spatial_merge_size ** 2, T=shared.max_completion, M=shared.num_queries,
        G=args.group_size, B=args.micro_batch, n=args.batch // gpus, b=2 if shared.precision == "bf16" else 4,
        s=min(gpus, NODE) if args.shard == "hybrid" else gpus, V=lens.mllm.lm_head.out_features, C=text.hidden_size,
        I=text.intermediate_size, Ck=text.num_key_value_heads * head, heads=text.num_attention_heads,
        layers=text.num_hidden_layers, old=old, Cv=vision.embed_dim if old else vision.hidden_size, depth=vision.depth,
        Iv=vision.embed_dim * vision.mlp_ratio if old else vision.intermediate_size, merge=vision.spatial_merge_size ** 2,
        d=vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2,
        window=0 if old else (vision.window_size // vision.patch_size) ** 2,
        full=vision.depth if old else len(vision.fullatt_block_indexes), A=lens.sam.sam_prompt_encoder.embed_dim *
        (lens.sam_size // 16) ** 2, side=lens.sam_size, t=trained(lens), f=count(lens.parameters()) - trained(lens),
        m=count(lens.mllm.parameters()), u=max(map(trained, blocks)),
        r=trained(lens) - sum(map(trained, blocks)) - trained(lens.sam), connector=count(lens.connector.parameters()))
    z.N, z.S = z.B * z.G, z.T + z.M
    z.L = z.P + z.G * z.S
    return z


def layer(z):
    """Bytes that a layer of the language model keeps: two norms (an fp32 copy, two in b each), queries and attention's
    output, keys and values, the MLP's four; of the group attention prompt, completions, their keys and mask; log-sum-exp."""
    b, rows, keys = z.b, z.B * z.L, z.P + z.S
    return (rows * (2 * (4 + 2 * b) * z.C + 2 * b * z.C + 2 * b * z.Ck + 4 * b * z.I)
            + b * (z.B * z.P * z.C + 3 * z.N * z.S * z.C + 2 * z.N * keys * z.Ck + z.N * z.S * keys)
            + 4 * z.heads * (z.B * z.P + z.N * z.S))


def block(z):
    """The same of the vision tower: norms, attention 7b Cv, the MLP's four (Qwen2-VL's: three)."""
    norms, mlp = (4 * z.b, 3) if z.old else (2 * (4 + 2 * z.b), 4)
    return z.B * z.p * (norms * z.Cv + 7 * z.b * z.Cv + mlp * z.b * z.Iv)


def kept(z, checkpointing):
    """Bytes that a pass keeps of the MLLM: of each layer its input alone or all of it, and both ends."""
    b, rows, patches = z.b, z.B * z.L, z.B * z.p
    inner = (z.layers * b * rows * z.C + z.depth * b * patches * z.Cv if checkpointing else
             z.layers * layer(z) + z.depth * block(z))
    return inner + rows * (4 + b) * z.C + b * z.N * z.S * z.C + patches * ((4 * b + 4 * (not z.old)) * z.Cv + b * z.d)


def memory(z, args):
    """-> {phase: {part: bytes per GPU}}"""
    b, sharded = z.b, 0 if args.offload else 1 / z.s
    pictures = 2 * 4 * (z.p * z.d + 3 * z.side ** 2 + z.side ** 2 // 8) + 2 * 21 * z.A + z.G * z.S * (z.P + z.S)
    always = {"weights": 4 * z.t * sharded, "Adam": 8 * z.t * sharded, "frozen parts": 4 * z.f, "sampling copy": b * z.m,
              "reference": b * z.m * sharded * (args.beta > 0), "pictures": z.n * pictures}
    gradients = {"gradients": 4 * z.t * sharded}
    chunk = min(128, z.N * z.T)                                          # tokens; see token_log_probs
    moments = {"logits": chunk * z.V * (12 + b) + 2 * b * z.V * z.C + 4 * z.A * (24 * z.N + 20 * z.B) + 84 * b * z.N * z.M * z.C,
               "layer": layer(z) * args.gradient_checkpointing + 2 * b * z.B * z.L * z.I + (3 * b + 4) * z.u + b * z.V * z.C,
               "root": (b + 4) * z.r + 4 * z.r / z.s * (z.s > 1)}
    busiest = max(moments, key=moments.get)
    cache = 2 * b * z.Ck * (z.P + z.T - 1) * z.layers * z.n * z.G
    gathered = b * (z.r if args.reshard else z.t + z.m * (args.beta > 0))
    return {"sampling": {**always, "cache": cache + cache / z.layers, "picking": 22 * z.V * z.n * z.G},
            "training": {**always, **gradients, "gathered": gathered, "kept": kept(z, args.gradient_checkpointing),
                         f"moment: {busiest}": moments[busiest]},
            "update": {**always, **gradients, "temporary": 4 * z.m * sharded}}


def host(z, args):
    """Bytes of CPU memory per process until the model is sharded: all of it in fp32, and the reference."""
    return 4 * (z.t + z.f) + z.b * z.m * (args.beta > 0)


def language(z, rows, pairs):
    """FLOPs of the language model's layers: 2 per weight and token, 4C per (query, key) pair. No discount for causality."""
    return z.layers * (2 * rows * (2 * z.C ** 2 + 2 * z.C * z.Ck + 3 * z.C * z.I) + 4 * z.C * pairs)


def vision(z):
    """FLOPs of the vision tower for one picture."""
    pairs = z.p * (z.full * z.p + (z.depth - z.full) * min(z.window, z.p))
    linear = z.depth * (4 * z.Cv ** 2 + (2 if z.old else 3) * z.Cv * z.Iv) + z.d * z.Cv + z.merge * z.Cv ** 2 + z.Cv * z.C
    return 2 * z.p * linear + 4 * z.Cv * pairs


def group(z):
    """FLOPs of one prompt's packed row in the language model, forward, without logits."""
    return language(z, z.L, z.P ** 2 + z.G * z.S * (z.P + z.S))


def arithmetic(lens, z, args):
    """-> {part: FLOPs per GPU and step}. SAM's are counted on the meta device, the rest by formula."""
    D, side = lens.sam.sam_prompt_encoder.embed_dim, z.side
    with torch.device("meta"), FlopCounterMode(display=False) as encoder, torch.no_grad():
        features = lens.image_encoder(torch.empty(1, 3, side, side))["backbone_fpn"]
    with torch.device("meta"), FlopCounterMode(display=False) as decoder:
        lens.sam(features, torch.empty(1, z.G, z.M, D))
    head = decoder.get_total_flops() + 2 * z.connector * z.G * z.M
    logits, again = 2 * z.V * z.C * z.G * z.T, 4 if args.gradient_checkpointing else 3
    decode = language(z, z.G * z.T, z.G * (z.P * z.T + z.T ** 2 / 2)) + logits
    policy = again * (vision(z) + group(z)) + 4 * logits
    per_prompt = {"sampling": vision(z) + language(z, z.P, z.P ** 2) + decode, "policy": policy * args.updates_per_batch,
                  "reference": (vision(z) + group(z) + logits) * (args.beta > 0), "SAM encoder": encoder.get_total_flops(),
                  "SAM and connector": 3 * head * args.updates_per_batch}
    return {name: z.n * flops for name, flops in per_prompt.items()}


def print_plan(shared, args):
    lens = build(shared)
    z = letters(lens, shared, args, args.gpus)
    phases, limit = memory(z, args), args.gpu_memory * 1e9
    print(f"{shared.mllm} on {args.gpus} GPUs of {args.gpu_memory:g} GB: {z.t / 1e9:.2f} G parameters train, "
          f"{z.f / 1e9:.2f} G do not\nat most {z.P} prompt tokens, {z.T} of a completion, rows of {z.L}; {z.n} prompts per GPU "
          f"and step\n")
    print(f"{'GB per GPU':<18}" + "".join(f"{phase:>10}" for phase in phases))
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        cells = [f"{parts[part] / 1e9:10.2f}" if part in parts else " " * 10 for parts in phases.values()]
        print(f"{part:<18}" + "".join(cells))
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    print(f"{'all':<18}" + "".join(f"{total / 1e9:10.2f}" for total in totals.values()))
    peak, scores = max(totals.values()) + CUDA, 12 * z.N * z.heads * z.S * (z.P + z.S)
    unfused = max(max(totals.values()), totals["training"] + scores) + CUDA
    says = lambda need: f"{need / 1e9:.1f} GB, {'fits' if need <= limit else 'DOES NOT FIT'}"
    print(f"\nwith {CUDA / 1e9:g} GB for CUDA: {says(peak)}\nwhere attention with a mask and grouped keys has no fused "
          f"kernel, its scores add {scores / 1e9:.1f} GB to training: {says(unfused)}")
    later = (16 * z.t + z.b * z.m * (args.beta > 0)) / z.s / 1e9 if args.offload else 0
    print(f"CPU memory per process: {host(z, args) / 1e9:.1f} GB while it starts, {later:.1f} GB of shards afterwards")
    flops = arithmetic(lens, z, args)
    print("\nTFLOP per GPU and step: " + ", ".join(f"{name} {value / 1e12:.1f}" for name, value in flops.items()))
    read = z.T * z.b * z.m + z.b * z.Ck * 2 * z.layers * z.n * z.G * (z.P * z.T + z.T ** 2 / 2)
    total = sum(flops.values())
    print(f"all {total / 1e12:.0f}: {total / 1e14:.1f} s at 100 TFLOP/s, if a GPU achieves that (not measured). Sampling "
          f"also reads {read / 1e12:.1f} TB of weights and cache, one token after another.")
