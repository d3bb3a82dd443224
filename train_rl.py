"""Stage 2, reinforcement learning (Eq. 12): GRPO with unified rewards and a segmentation loss, end
to end.

    torchrun --nproc_per_node=2 train_rl.py --preset tiny   # a laptop; one process does the same
    torchrun --nproc_per_node=16 train_rl.py                # the paper's settings (Table A2)
    torchrun --nproc_per_node=16 train_rl.py --resume       # go on, on any number of processes

`python tests/plan.py --gpus 16 --gpu-memory 48` says beforehand whether it fits.

One step: draw a batch of pictures, each with one expression. Sample G answers to each from the
policy (Eq. 1). One packed pass per group gives the log-probabilities of the answers, and behind
each answer a mask (Eqs. 2-4). Score text, box and mask (Eq. 11), compare within the group (Eqs.
6-7), and minimise

    -J(theta; R_unified, D_KL) + alpha L_seg(P_seg, M_gt)                                    (12)

(as printed, Eq. 12 adds a loss to an objective that is maximised). Everything trains but SAM's
image encoder.

Departures. Released code: IoU squared in both rewards (`--iou-power 2`), sampling at temperature
0.9 with top-p and top-k while its losses assume temperature 1, no clip, no format reward on
RefCOCO, one SAM loaded anew. Here what samples is what is trained: one temperature, no cut, the
same forbidden tokens. Both stages' decoders go on from where they were. epsilon, beta, warm-up and
the optimizer's betas are not in the paper; they are flags.

Precision: fp32 master weights, sharded; compute in bf16 (`--precision fp32` for exactness); a whole
copy per process in the compute precision samples, refreshed after every update on every rank; the
reference model is frozen and sharded. """
import copy
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from align import (TINY, Metrics, SharedArgs, TrainArgs, apply_update, end_of_step, export, flag,
                   learning_rate, load_checkpoint, open_output, parse_settings, plan_steps, run,
                   segmentation_loss, set_trainable, shard, start_processes, watch_signals)
from data import (Collator, LensError, TrainingStream, read_records, rescale_box, select, to_device,
                  training_batches)
from grpo import group_advantages, grpo_loss
from model import (PackedGroups, build_lens, completion_table, context_positions, draw_uniforms,
                   full_size_masks, generate, group_hidden, pack_groups, prompt_positions,
                   token_log_probs)
from rewards import box_iou, find_box, format_reward, mask_iou, unified_reward


@dataclass
class RLArgs(TrainArgs):
    output: str = flag("runs/rl", "folder for metrics.jsonl, checkpoints and the finished model")
    init: str = flag("runs/align", "stage 1's folder; 'none' starts from an untrained context "
                     "module (Table 5)")
    batch: int = flag(64, "prompts per step, over all processes")
    epochs: int = flag(16, "passes over the training objects")
    lr: float = flag(3e-6, "peak learning rate of the MLLM, and of the rest where it is not given")
    lr_context: float = flag(0.0, "peak learning rate of context queries and connector; 0 "
                             "takes --lr")
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
    deviation: Literal["population", "sample"] = flag(
        "population", "sigma of Eq. 6; sample: the released code's")
    alpha: float = flag(1.0, "weight of the segmentation loss (Eq. 12)")
    gradient_checkpointing: bool = flag(True, "recompute the MLLM's layers in the backward pass")

    def __post_init__(self):
        super().__post_init__()
        if self.group_size < 2:
            raise LensError(f"--group-size must be at least 2: a group of {self.group_size} "
                            "has nothing to compare")
        if self.updates_per_batch < 1 or not 0 < self.clip_eps < 1:
            raise LensError("--updates-per-batch must be at least 1, --clip-eps between 0 and 1")
        if not self.temperature > 0 or not self.iou_power > 0:
            raise LensError("--temperature and --iou-power must be above 0")
        if min(self.beta, self.alpha, self.lr_context, self.lr_sam, self.lambda_format,
               self.lambda_box, self.lambda_mask) < 0:
            raise LensError("--beta, --alpha, --lr-context, --lr-sam and the lambdas must not "
                            "be negative")


PRESETS = {"tiny": dict(TINY, output="runs/tiny/rl", init="runs/tiny/align", batch=16,
                        micro_batch=8, steps=250, lr=1.5e-4, lr_context=1e-3, lr_sam=1e-4,
                        alpha=0.1, warmup=10, adam_beta2=0.99, save_every=50,
                        gradient_checkpointing=False)}
# alpha: with the paper's 1.0 the segmentation loss's gradient on a stand-in's MLLM is ten times the
# policy's (4 to 9 against 0.4) and drowns it; Adam does not notice the factor in the context module
# and SAM, which get no other gradient.


# --- The sampling copy and the reference ----------------------------------------------------------

def copy_mllm(mllm, precision, device="cpu"):
    """An unsharded copy in the compute precision: what samples, and the reference. Parameters are
    cast one by one, so that no second fp32 model exists meanwhile; buffers keep their precision
    (see load_mllm)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made = {}  # id of a parameter -> its copy; a tied one is made once
    for parameter in mllm.parameters():
        cast = parameter.detach().to(device, dtype, copy=True)
        made[id(parameter)] = nn.Parameter(cast, requires_grad=False)
    # deepcopy keeps a table of what it has copied already: given ours, it copies all but parameters
    return copy.deepcopy(mllm, made).to(device).eval()


@torch.no_grad()
def refresh(sampler, lens):
    """sampler <- the policy's sharded weights, one of FSDP's units after another: a unit is one
    bucket, cast before it is gathered. A collective: every rank calls it, after every update, or
    some ranks would sample from a stale model."""
    targets = dict(sampler.named_parameters())
    for unit_name, unit in lens.named_modules():
        if not isinstance(unit, FSDPModule):
            continue
        unit.unshard()
        for name in own_parameters(unit_name, unit):
            if name.startswith("mllm."):
                targets[name.removeprefix("mllm.")].copy_(lens.get_parameter(name))
        unit.reshard()


def own_parameters(unit_name, unit):
    """Names, within the whole, of the parameters that an FSDP unit shards itself: those of its
    modules that are not in a unit nested in it."""
    prefix = unit_name + "." if unit_name else ""
    nested = tuple(f"{name}." for name, child in unit.named_modules()
                   if name and isinstance(child, FSDPModule))
    return [prefix + name for name, _ in unit.named_parameters() if not name.startswith(nested)]


class Reference(nn.Module):
    """The frozen policy of the KL term (Eq. 9): the same packed pass, without queries."""

    def __init__(self, mllm, forbidden):
        super().__init__()
        self.mllm = mllm.requires_grad_(False)
        self.register_buffer("forbidden", forbidden, persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values, grid_thw, packed, temperature=1.0):
        """-> log-probabilities (N, T)"""
        hidden = group_hidden(self.mllm, pixel_values, grid_thw, packed)
        log_probs, _ = token_log_probs(self.mllm.lm_head, hidden[packed.predictors], packed.targets,
                                       self.forbidden, temperature)
        return completion_table(log_probs, packed.mask)


# --- Samples and their rewards --------------------------------------------------------------------

def text_rewards(texts, finished, batch, power, prompt="paper"):
    """R_format and R_box of B groups of G texts -> (B, G) each. A cut completion has no end token,
    so its format is not whole; its box counts. The box is spoken in the MLLM frame and judged in
    the picture frame."""
    r_format, r_box = [], []
    for b, group in enumerate(texts):
        height, width = batch["masks"][b].shape
        r_format.append([format_reward(text) * ended for text, ended in zip(group, finished[b])])
        boxes = [find_box(text, prompt) for text in group]
        boxes = [box and rescale_box(box, batch["frames"][b], (width, height)) for box in boxes]
        r_box.append([box_iou(box, batch["boxes"][b]) ** power for box in boxes])
    return torch.tensor(r_format), torch.tensor(r_box)


def mask_rewards(mask_logits, batch, power):
    """R_seg (B, G) of mask logits (B * G, S/4, S/4), taken at each picture's own size."""
    groups = mask_logits.view(len(batch["masks"]), -1, *mask_logits.shape[1:])
    device, rewards = mask_logits.device, []
    for logits, truth, ignore in zip(groups, batch["masks"], batch["ignores"]):
        masks = full_size_masks(logits, truth.shape)                         # (G, H, W)
        rewards.append(mask_iou(masks, truth.to(device), ignore.to(device)) ** power)
    return torch.stack(rewards)


# --- One pass over a few groups: forward, rewards, loss, backward ---------------------------------

@dataclass
class Groups:
    """B groups that share a pass, and what does not change over the updates on them."""
    batch: dict
    packed: PackedGroups
    features: list                      # SAM's maps of the B pictures
    ref_log_probs: torch.Tensor | None  # (N, T), under the reference
    r_format: torch.Tensor              # (B, G)
    r_box: torch.Tensor                 # (B, G)


@dataclass
class Scores:
    """What the first policy pass over some Groups adds: it made the masks."""
    old_log_probs: torch.Tensor         # (N, T), under the policy that sampled
    r_mask: torch.Tensor                # (B, G)
    reward: torch.Tensor                # (B, G), Eq. 11
    advantages: torch.Tensor            # (B, G), Eqs. 6-7


def make_groups(lens, reference, batch, positions, completions, texts, finished, args):
    """Split a rank's share of the batch into passes of --micro-batch groups. -> list of Groups"""
    passes, device = [], batch["pixel_values"].device
    for i in range(0, len(completions), args.micro_batch):
        some = slice(i, i + args.micro_batch)
        part = select(batch, range(len(completions))[some])

        def pack(kind):
            return pack_groups(part["ids"], context_positions(positions[some], kind),
                               completions[some], lens.M, device)
        packed, ref_log_probs = pack(lens.positions), None
        if reference is not None:
            # with --positions 1d the reference keeps the MLLM's own, as the released code's does
            text_only = packed if lens.positions == "mrope" else pack("mrope")
            ref_log_probs = reference(part["pixel_values"], part["grid_thw"], text_only,
                                      args.temperature)
        r_format, r_box = text_rewards(texts[some], finished[some], part, args.iou_power,
                                       lens.prompt)
        passes.append(Groups(part, packed, lens.encode_pictures(part["sam_pixels"]), ref_log_probs,
                             r_format.to(device), r_box.to(device)))
    return passes


def score(out, groups, args):
    """Rewards and advantages of `groups` from the first policy pass over them. -> Scores"""
    r_mask = mask_rewards(out["mask_logits"].detach(), groups.batch, args.iou_power)
    lambdas = (args.lambda_format, args.lambda_box, args.lambda_mask)
    reward = unified_reward(groups.r_format, groups.r_box, r_mask, lambdas)  # Eq. 11
    advantages = group_advantages(reward, correction=int(args.deviation == "sample"))  # Eqs. 6-7
    return Scores(out["log_probs"].detach(), r_mask, reward, advantages)


def backward_pass(out, groups, scores, args, world):
    """Eq. 12 of some groups and its gradient, which adds up over passes and is averaged over the
    whole batch. -> {name: sum over the groups (0-dim)}"""
    mask = groups.packed.mask
    policy_loss, stats = grpo_loss(out["log_probs"], scores.old_log_probs, groups.ref_log_probs,
                                   scores.advantages.flatten(), mask, args.clip_eps, args.beta)
    truth, weights = (groups.batch[name].repeat_interleave(args.group_size, 0)
                      for name in ("low_masks", "low_weights"))              # (N, S/4, S/4)
    loss_seg = segmentation_loss(out["mask_logits"], truth, args.focal, weights).mean()
    loss = policy_loss + args.alpha * loss_seg
    B = len(groups.batch["ids"])
    (loss * B * world / args.batch).backward()  # FSDP averages over ranks: a mean over all groups
    lengths = mask.sum(1).clamp(min=1)
    equal = (scores.reward == scores.reward[:, :1]).all(1)
    means = {"loss": loss, "loss_seg": loss_seg, "reward": scores.reward.mean(),
             "reward_format": groups.r_format.mean(), "reward_box": groups.r_box.mean(),
             "reward_mask": scores.r_mask.mean(), "kl": stats["kl"],
             "entropy": (out["entropy"].sum(1) / lengths).mean(),
             "completion_length": lengths.float().mean(), "clip_fraction": stats["clip_fraction"],
             "zero_variance": equal.float().mean()}
    return {name: value.detach().float() * B for name, value in means.items()}


def train_on(lens, optimizer, passes, factor, args, world, step):
    """All updates on one batch of samples. -> {name: mean over the batch and the updates}, gradient
    norm"""
    scores, means = [None] * len(passes), 0
    for update in range(args.updates_per_batch):
        sums = 0
        for i, groups in enumerate(passes):
            out = lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
                       groups.features, args.temperature)
            if update == 0:
                scores[i] = score(out, groups, args)
            found = backward_pass(out, groups, scores[i], args, world)
            sums = sums + torch.stack(list(found.values()))
        dist.all_reduce(sums)
        sums = dict(zip(found, sums / args.batch))
        norm = apply_update(lens, optimizer, factor, args, sums["loss"].item(), step)
        means = means + torch.stack(list(sums.values())) / args.updates_per_batch
    return dict(zip(sums, means.tolist())), norm


def parameter_groups(lens, args):
    """MLLM, context module and SAM's decoder, each with its own peak rate."""
    named = [(name, p) for name, p in lens.named_parameters() if p.requires_grad]
    rates = {"mllm.": args.lr, "sam.": args.lr_sam or args.lr,
             ("queries", "connector."): args.lr_context or args.lr}
    return [{"params": [p for name, p in named if name.startswith(prefix)], "peak_lr": rate}
            for prefix, rate in rates.items()]


def main():
    shared, args = parse_settings([SharedArgs, RLArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(args.shard)
    records = read_records(shared.data, shared.datasets, ["train"])[:shared.limit or None]
    total = plan_steps(args, world, len(records))
    folder = open_output(args, (shared, args), rank)
    lens, processor = build_lens(shared, "" if args.init == "none" else args.init)
    frozen = set_trainable(lens, "rl")
    sampler = copy_mllm(lens.train().mllm, shared.precision, device)
    reference = Reference(copy_mllm(lens.mllm, shared.precision),
                          lens.forbidden) if args.beta else None
    if args.gradient_checkpointing:
        lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    shard(lens, mesh, shared.precision, frozen, args.reshard, args.offload)
    if reference:
        shard(reference, mesh, shared.precision, (), args.reshard, args.offload)
    optimizer = torch.optim.AdamW(parameter_groups(lens, args), lr=args.lr, betas=(0.9,
                                                                                   args.adam_beta2),
                                  weight_decay=args.weight_decay)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    refresh(sampler, lens)
    if args.export:
        return export(folder, lens, shared, sampler, processor)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    loader = training_batches(TrainingStream(records, shared.seed), collate, start, total,
                              args.batch, rank, world, shared.workers)
    metrics = Metrics(folder, start, total, rank, args.log_to)
    received, began = watch_signals(), time.time()
    first = rank * (args.batch // world)             # this rank's first place in the batch
    for step, batch in enumerate(loader, start):
        batch = to_device(batch, device)
        positions = prompt_positions(lens.mllm, batch)
        uniforms = draw_uniforms(shared.seed, step, range(first, first + len(positions)),
                                 args.group_size, shared.max_completion).to(device)
        completions, finished = generate(sampler, batch, positions, args.group_size,
                                         shared.max_completion, lens.eos, lens.forbidden, uniforms,
                                         args.temperature)
        texts = [processor.tokenizer.batch_decode(group, skip_special_tokens=True) for group
                 in completions]
        sampled = time.time()
        passes = make_groups(lens, reference, batch, positions, completions, texts, finished, args)
        factor = learning_rate(step, total, args.warmup, "linear")
        means, norm = train_on(lens, optimizer, passes, factor, args, world, step)
        updated = time.time()
        refresh(sampler, lens)
        now = time.time()
        row = {"step": step + 1, **means, "grad_norm": norm, "lr": args.lr * factor,
               "seconds": round(now - began, 3), "seconds_sampling": round(sampled - began, 3),
               "seconds_refresh": round(now - updated, 3)}
        began = now
        metrics.write(row, ("reward", "reward_format", "reward_box", "reward_mask"))
        if step % args.log_every == 0:
            metrics.say(f"step {step + 1}: reward {means['reward']:.3f} = format "
                        f"{means['reward_format']:.3f}, box {means['reward_box']:.3f}, mask "
                        f"{means['reward_mask']:.3f}; kl {means['kl']:.4f}\n"
                        f"  {batch['texts'][0]!r} -> {texts[0][0]!r}")
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared, sampler, processor)
    metrics.say(f"Stage 2 is done: {folder}")


if __name__ == "__main__":
    run(main)
