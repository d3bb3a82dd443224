"""Stage 2, reinforcement learning (Eq. 12): GRPO with unified rewards and a segmentation loss, end to end.

    torchrun --nproc_per_node=2 train_rl.py --preset tiny             # a laptop; one process gives the same numbers
    torchrun --nproc_per_node=16 train_rl.py                          # the paper's settings (Table A2)
    torchrun --nproc_per_node=16 train_rl.py --resume                 # go on, also on another number of processes
    python train_rl.py --plan --gpus 16 --gpu-memory 48               # will it fit? Runs nothing

One step: draw a batch of pictures, each with one expression. Sample G answers to each from the policy (Eq. 1). One packed
pass per group gives the log-probabilities of the answers, and behind each answer a mask (Eqs. 2-4). Score text, box and
mask (Eq. 11), compare within the group (Eqs. 6-7), and minimise

    -J(theta; R_unified, D_KL) + alpha L_seg(P_seg, M_gt)                                                  (12)

(as printed, Eq. 12 adds a loss to an objective that is maximised). Everything trains but SAM's image encoder.

Departures. Released code: IoU squared in both rewards (`--iou-power 2`), sampling at temperature 0.9 with top-p and top-k
while its losses assume temperature 1, no clip, no format reward on RefCOCO, one SAM loaded anew. Here what samples is what
is trained: one temperature, no cut, the same forbidden tokens. Both stages' decoders go on from where they were. epsilon,
beta, warm-up and the optimizer's betas are not in the paper; they are flags.

Precision: fp32 master weights, sharded; compute in bf16 (`--precision fp32` for exactness); a whole copy per process in
the compute precision samples, refreshed after every update on every rank; the reference model is frozen and sharded.
"""
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from align import (Metrics, TrainArgs, apply_update, end_of_step, learning_rate, open_output, plan_steps,
                   segmentation_loss, watch_signals)
from data import (Collator, LensError, TrainingStream, extra, read_records, rescale_box, select, to_device,
                  training_batches)
from grpo import group_advantages, grpo_loss
from model import (TINY, Reference, SharedArgs, build_lens, context_positions, copy_mllm, draw_uniforms, export, flag,
                   full_size_masks, generate, load_checkpoint, pack_groups, parse_settings, prompt_positions,
                   refresh, run, set_trainable, shard, start_processes)
from rewards import box_iou, find_box, format_reward, mask_iou, unified_reward


@dataclass
class RLArgs(TrainArgs):
    output: str = flag("runs/rl", "folder for metrics.jsonl, checkpoints and the finished model")
    init: str = flag("runs/align", "stage 1's folder; 'none' starts from an untrained context module (Table 5)")
    batch: int = flag(64, "prompts per step, over all processes")
    epochs: int = flag(16, "passes over the training objects")
    lr: float = flag(3e-6, "peak learning rate of the MLLM, and of the rest where it is not given")
    lr_context: float = flag(0.0, "peak learning rate of context queries and connector; 0 takes --lr")
    lr_sam: float = flag(0.0, "peak learning rate of SAM's decoder; 0 takes --lr")
    group_size: int = flag(8, "G, samples per prompt")
    temperature: float = flag(1.0, "of the policy that is sampled and trained")
    clip_eps: float = flag(0.2, "epsilon of Eq. 8")
    beta: float = flag(0.04, "weight of the KL term (Eq. 10)")
    updates_per_batch: int = flag(1, "updates on one batch of samples; above 1 the clip acts")
    lambda_format: float = flag(1.0, "lambda_1 of Eq. 11; 0 takes R_format out (Table 5)")
    lambda_box: float = flag(1.0, "lambda_2 of Eq. 11")
    lambda_mask: float = flag(1.0, "lambda_3 of Eq. 11")
    iou_power: float = flag(1.0, "R_box and R_seg are IoU to this power (2: released code)")
    deviation: Literal["population", "sample"] = flag("population", "sigma of Eq. 6; sample: the released code's")
    alpha: float = flag(1.0, "weight of the segmentation loss (Eq. 12)")
    gradient_checkpointing: bool = flag(True, "recompute the MLLM's layers in the backward pass")
    plan: bool = flag(False, "print memory per GPU and arithmetic per step, and run nothing (tests/extras/plan.py)")
    gpus: int = flag(16, "GPUs to --plan for")
    gpu_memory: float = flag(48.0, "GB of memory of each")

    def __post_init__(self):
        super().__post_init__()
        if self.group_size < 2:
            raise LensError(f"--group-size must be at least 2: a group of {self.group_size} has nothing to compare")
        if self.updates_per_batch < 1 or not self.temperature > 0 or not self.iou_power > 0 or not 0 < self.clip_eps < 1:
            raise LensError("--updates-per-batch is at least 1, --temperature and --iou-power above 0, --clip-eps in (0, 1)")
        if min(self.beta, self.alpha, self.lr_context, self.lr_sam, self.lambda_format, self.lambda_box,
               self.lambda_mask) < 0:
            raise LensError("--beta, --alpha, --lr-context, --lr-sam and the lambdas must not be negative")


PRESETS = {"tiny": dict(TINY, output="runs/tiny/rl", init="runs/tiny/align", batch=16, micro_batch=8, steps=250,
                        lr=1.5e-4, lr_context=1e-3, lr_sam=1e-4, alpha=0.1, warmup=10, adam_beta2=0.99, save_every=50,
                        gradient_checkpointing=False)}
# alpha: with the paper's 1.0 the segmentation loss's gradient on a stand-in's MLLM is ten times the policy's (4 to 9
# against 0.4) and drowns it; Adam does not notice the factor in the context module and SAM, which get no other gradient.


# --- Samples and their rewards --------------------------------------------------------------------

def text_rewards(texts, finished, batch, power, prompt="paper"):
    """R_format and R_box of B groups of G texts -> (B, G) each. A cut completion has no end token, so its format is not
    whole; its box counts. The box is spoken in the MLLM frame and judged in the picture frame."""
    r_format, r_box = [], []
    for b, group in enumerate(texts):
        height, width = batch["masks"][b].shape
        r_format.append([format_reward(text) * done for text, done in zip(group, finished[b])])
        boxes = [find_box(text, prompt) for text in group]
        boxes = [box and rescale_box(box, batch["frames"][b], (width, height)) for box in boxes]
        r_box.append([box_iou(box, batch["boxes"][b]) ** power for box in boxes])
    return torch.tensor(r_format), torch.tensor(r_box)


def mask_rewards(mask_logits, batch, power):
    """R_seg (B, G) of mask logits (B * G, S/4, S/4), taken at each picture's own size."""
    groups = mask_logits.view(len(batch["masks"]), -1, *mask_logits.shape[1:])
    device = mask_logits.device
    return torch.stack([mask_iou(full_size_masks(logits, truth.shape), truth.to(device), ignore.to(device)) ** power
                        for logits, truth, ignore in zip(groups, batch["masks"], batch["ignores"])])


# --- One pass over a few groups: forward, rewards, loss, backward ---------------------------------

def policy_pass(lens, reference, part, args, world):
    """Eq. 12: forward and backward of the groups in `part`; gradients add up over passes, averaged over the whole batch.

    part: {"batch", "packed", "text_positions", "r_format", "r_box"} of some groups. The first pass over them adds what
    later updates on the same samples need: SAM's features, old and reference log-probs, rewards and advantages.
    -> sums over the groups, in the order of SUMS.
    """
    batch, packed = part["batch"], part["packed"]
    if "features" not in part:
        part["features"] = lens.encode_pictures(batch["sam_pixels"])
        text_only = {**packed, **part["text_positions"]}
        part["reference"] = reference(batch, text_only, args.temperature) if reference else None
    out = lens(batch, packed, part["features"], args.temperature)
    log_probs, mask = out["log_probs"], packed["mask"]
    if "advantages" not in part:
        part["old"] = log_probs.detach()
        part["r_mask"] = mask_rewards(out["mask_logits"].detach(), batch, args.iou_power)
        part["reward"] = unified_reward(part["r_format"], part["r_box"], part["r_mask"],
                                        (args.lambda_format, args.lambda_box, args.lambda_mask))       # Eq. 11, (B, G)
        part["advantages"] = group_advantages(part["reward"], correction=int(args.deviation == "sample"))
    policy_loss, stats = grpo_loss(log_probs, part["old"], part["reference"], part["advantages"].flatten(), mask,
                                   args.clip_eps, args.beta)
    truth, weights = (batch[name].repeat_interleave(args.group_size, 0) for name in ("low_masks", "low_weights"))
    loss_seg = segmentation_loss(out["mask_logits"], truth, args.focal, weights).mean()
    loss = policy_loss + args.alpha * loss_seg                                                         # Eq. 12
    B = len(batch["ids"])
    (loss * B * world / args.batch).backward()                    # FSDP averages over ranks: a mean over all groups
    lengths = mask.sum(1).clamp(min=1)
    entropy = (out["entropy"].sum(1) / lengths).mean()
    values = [loss, loss_seg, part["reward"].mean(), part["r_format"].mean(), part["r_box"].mean(), part["r_mask"].mean(),
              stats["kl"], entropy, lengths.float().mean(), stats["clip_fraction"],
              (part["reward"] == part["reward"][:, :1]).all(1).float().mean()]
    return torch.stack([v.detach().float().to(log_probs.device) for v in values]) * B


SUMS = ["loss", "loss_seg", "reward", "reward_format", "reward_box", "reward_mask", "kl", "entropy", "completion_length",
        "clip_fraction", "zero_variance"]


def make_parts(lens, batch, positions, completions, texts, finished, args):
    """Split a rank's share of the batch into passes of --micro-batch groups."""
    parts, device = [], batch["pixel_values"].device
    for i in range(0, len(completions), args.micro_batch):
        some = slice(i, i + args.micro_batch)
        sub = select(batch, range(len(completions))[some])
        pack = lambda kind: pack_groups(sub["ids"], context_positions(positions[some], kind), completions[some], lens.M,
                                        device)
        r_format, r_box = text_rewards(texts[some], finished[some], sub, args.iou_power, lens.prompt)
        # with --positions 1d the context pass alone has those; the reference keeps the MLLM's own, as the released code's
        text_positions = {} if lens.positions == "mrope" else {"positions": pack("mrope")["positions"]}
        parts.append({"batch": sub, "packed": pack(lens.positions), "text_positions": text_positions,
                      "r_format": r_format.to(device), "r_box": r_box.to(device)})
    return parts


def train_on(lens, reference, optimizer, parts, factor, args, world, step):
    """All updates on one batch of samples. -> {name: mean over the batch and the updates} and the gradient norm."""
    means = 0
    for _ in range(args.updates_per_batch):
        sums = sum(policy_pass(lens, reference, part, args, world) for part in parts)
        dist.all_reduce(sums)
        norm = apply_update(lens, optimizer, factor, args, (sums[0] / args.batch).item(), step)
        means = means + sums / args.batch / args.updates_per_batch
    return dict(zip(SUMS, means.tolist())), norm


def parameter_groups(lens, args):
    """MLLM, context module and SAM's decoder, each with its own peak rate."""
    named = [(n, p) for n, p in lens.named_parameters() if p.requires_grad]
    rates = {"mllm.": args.lr, "sam.": args.lr_sam or args.lr, ("queries", "connector."): args.lr_context or args.lr}
    return [{"params": [p for n, p in named if n.startswith(prefix)], "peak_lr": rate} for prefix, rate in rates.items()]


def main():
    shared, args = parse_settings([SharedArgs, RLArgs], PRESETS, __doc__.splitlines()[0])
    if args.plan:
        return extra("plan").print_plan(shared, args)
    rank, world, device, mesh = start_processes(args.shard)
    records = read_records(shared.data, shared.datasets, ["train"])[:shared.limit or None]
    total = plan_steps(args, world, len(records))
    folder = open_output(args, (shared, args), rank)
    lens, processor = build_lens(shared, None if args.init == "none" else args.init)
    frozen = set_trainable(lens, "rl")
    sampler = copy_mllm(lens.train().mllm, shared.precision, device)
    reference = Reference(copy_mllm(lens.mllm, shared.precision), lens.forbidden) if args.beta else None
    if args.gradient_checkpointing:
        lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    shard(lens, mesh, shared.precision, frozen, args.reshard, args.offload)
    if reference:
        shard(reference, mesh, shared.precision, (), args.reshard, args.offload)
    optimizer = torch.optim.AdamW(parameter_groups(lens, args), lr=args.lr, betas=(0.9, args.adam_beta2),
                                  weight_decay=args.weight_decay)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    refresh(sampler, lens)
    if args.export:
        return export(folder, lens, shared, (sampler, processor))
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt, shared.prompt)
    loader = training_batches(TrainingStream(records, shared.seed), collate, start, total, args.batch, rank, world,
                              shared.workers)
    metrics = Metrics(folder, start, total, rank, args.log_to)
    received, began = watch_signals(), time.time()
    first = rank * (args.batch // world)                               # this rank's first place in the batch
    for step, batch in enumerate(loader, start):
        batch = to_device(batch, device)
        positions = prompt_positions(lens.mllm, batch)
        uniforms = draw_uniforms(shared.seed, step, range(first, first + len(positions)), args.group_size,
                                 shared.max_completion).to(device)
        completions, finished = generate(sampler, batch, positions, args.group_size, shared.max_completion, lens.eos,
                                         lens.forbidden, uniforms, args.temperature)
        texts = [processor.tokenizer.batch_decode(group, skip_special_tokens=True) for group in completions]
        sampled = time.time()
        parts = make_parts(lens, batch, positions, completions, texts, finished, args)
        factor = learning_rate(step, total, args.warmup, "linear")
        means, norm = train_on(lens, reference, optimizer, parts, factor, args, world, step)
        updated = time.time()
        refresh(sampler, lens)
        now = time.time()
        row = {"step": step + 1, **means, "grad_norm": norm, "lr": args.lr * factor, "seconds": round(now - began, 3),
               "seconds_sampling": round(sampled - began, 3), "seconds_refresh": round(now - updated, 3)}
        metrics.write(row, ("reward", "reward_format", "reward_box", "reward_mask"))
        began = now
        if step % args.log_every == 0:
            metrics.say(f"step {step + 1}: reward {means['reward']:.3f} = format {means['reward_format']:.3f}, box "
                        f"{means['reward_box']:.3f}, mask {means['reward_mask']:.3f}; kl {means['kl']:.4f}\n"
                        f"  {batch['texts'][0]!r} -> {texts[0][0]!r}")
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared, (sampler, processor))
    metrics.say(f"Stage 2 is done: {folder}")


if __name__ == "__main__":
    run(main)
