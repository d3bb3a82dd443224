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
reference model is frozen and sharded."""
import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn

from align import (TINY, Metrics, SharedArgs, TrainArgs, apply_update, end_of_step, export,
                   fixed_cache, flag, learning_rate, load_checkpoint, make_optimizer, open_output,
                   parse_settings, plan_steps, run, set_trainable, shard,
                   start_processes, watch_signals)
from data import (Collator, EvaluationRows, LensError, TrainingStream, read_records, rescale_box,
                  select, to_device, training_batches)
from grpo import (completion_table, group_advantages, grpo_loss, segmentation_loss,
                  token_log_probs)
from model import (PackedGroups, build_lens, context_positions, draw_uniforms, generate,
                   group_hidden, pack_groups, prompt_positions)
from rewards import (box_iou, find_box, format_reward, full_size_masks, mask_iou,
                     unified_reward)


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
    val_every: int = flag(0, "steps between looks at val, whose best model OUTPUT/best keeps; "
                          "0: none")
    val_rows: int = flag(200, "rows of val to look at")
    gpu_tflops: float = flag(0.0, "a GPU's peak in bf16 (L40S 362, H100 989), for mfu in the "
                             "metrics")

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


PRESETS = {"tiny": dict(TINY, output="runs/tiny/rl", init="runs/tiny/align", batch=12,
                        micro_batch=6, steps=140, lr=2.5e-4, lr_context=3e-5, lr_sam=1e-5,
                        alpha=0.1, warmup=10, adam_beta2=0.99, save_every=50,
                        gradient_checkpointing=False)}
# alpha: the two losses share the MLLM, whose answers should follow the rewards; the context module
# and SAM get no other gradient, and Adam does not notice the factor there. Their own rates are low:
# many answers name the wrong thing at first, and the loss behind those teaches queries to guess.


# --- The sampling copy and the reference ----------------------------------------------------------

def copy_mllm(mllm, precision, device="cpu"):
    """An unsharded copy in the compute precision, which samples. Parameters are cast one by one, so
    that no second fp32 model exists meanwhile; buffers keep their precision (see load_mllm)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return copy_with(mllm, lambda p: p.detach().to(device, dtype, copy=True)).to(device).eval()


def share_mllm(mllm):
    """A second model over the same memory, the files mapped in it: the reference, until `shard`
    makes each process its own part of it."""
    return copy_with(mllm, lambda p: p.detach())


def copy_with(mllm, make):
    """A copy whose parameters are make(parameter), frozen; a tied one is made once."""
    made = {id(p): nn.Parameter(make(p), requires_grad=False) for p in mllm.parameters()}
    # deepcopy keeps a table of what it has copied already: given ours, it copies all but parameters
    return copy.deepcopy(mllm, made)


@torch.no_grad()
def refresh(sampler, lens):
    """sampler <- the policy's sharded weights, in place, each cast before it is gathered. A
    collective: every rank calls it, after every update, or some ranks would sample from a stale
    model."""
    for target, parameter in zip(sampler.parameters(), lens.mllm.parameters()):
        target.copy_(parameter.to(target.dtype).full_tensor())


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

def draw_samples(lens, sampler, fixed, batch, step, places, shared, args):
    """Eq. 1 for a rank's share of the batch, whose prompts have these places in the whole. ->
    positions, Samples"""
    positions = prompt_positions(lens.mllm, batch)
    uniforms = draw_uniforms(shared.seed, step, places, args.group_size, shared.max_completion)
    return positions, generate(sampler, batch, positions, args.group_size, shared.max_completion,
                               lens.eos, lens.forbidden, uniforms.to(batch["pixel_values"].device),
                               args.temperature, fixed)


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
    sampler_log_probs: torch.Tensor     # (N, T), as the sampling copy saw its own tokens
    ref_log_probs: torch.Tensor | None  # (N, T), under the reference
    r_format: torch.Tensor              # (B, G)
    r_box: torch.Tensor                 # (B, G)
    finished: torch.Tensor              # (B, G) bool, False where the limit cut a completion


@dataclass
class Scores:
    """What the first policy pass over some Groups adds: it made the masks."""
    old_log_probs: torch.Tensor         # (N, T), under the policy that sampled
    r_mask: torch.Tensor                # (B, G)
    reward: torch.Tensor                # (B, G), Eq. 11
    advantages: torch.Tensor            # (B, G), Eqs. 6-7


def make_groups(lens, reference, batch, positions, samples, texts, args):
    """Split a rank's share of the batch, its Samples and their texts (B x G) into passes of
    --micro-batch groups. -> list of Groups"""
    passes, device, G = [], batch["pixel_values"].device, len(samples.completions[0])
    for i in range(0, len(positions), args.micro_batch):
        some = slice(i, i + args.micro_batch)
        part, completions = select(batch, range(len(positions))[some]), samples.completions[some]

        def pack(kind):
            return pack_groups(part["ids"], context_positions(positions[some], kind), completions,
                               lens.M, device)
        packed, ref_log_probs = pack(lens.positions), None
        if reference is not None:
            # with --positions 1d the reference keeps the MLLM's own, as the released code's does
            text_only = packed if lens.positions == "mrope" else pack("mrope")
            ref_log_probs = reference(part["pixel_values"], part["grid_thw"], text_only,
                                      args.temperature)
        r_format, r_box = text_rewards(texts[some], samples.finished[some], part, args.iou_power,
                                       lens.prompt)
        of_part = samples.log_probs[i * G:(i + len(completions)) * G, :packed.mask.shape[1]]
        passes.append(Groups(part, packed, lens.encode_pictures(part["sam_pixels"]), of_part,
                             ref_log_probs, r_format.to(device), r_box.to(device),
                             torch.tensor(samples.finished[some], device=device)))
    return passes


def score(out, groups, args):
    """Rewards and advantages of `groups` from the first policy pass over them. -> Scores"""
    r_mask = mask_rewards(out["mask_logits"].detach(), groups.batch, args.iou_power)
    lambdas = (args.lambda_format, args.lambda_box, args.lambda_mask)
    reward = unified_reward(groups.r_format, groups.r_box, r_mask, lambdas)  # Eq. 11
    correction = int(args.deviation == "sample")
    advantages = group_advantages(reward, correction=correction)  # Eqs. 6-7
    return Scores(out["log_probs"].detach(), r_mask, reward, advantages)


def backward_pass(out, groups, scores, args, world):
    """Eq. 12 of some groups and its gradient, which adds up over passes and is averaged over the
    whole batch. -> {name: sum over the groups (0-dim)}"""
    mask = groups.packed.mask
    policy_loss, stats = grpo_loss(out["log_probs"], scores.old_log_probs, groups.ref_log_probs,
                                   scores.advantages.flatten(), mask, args.clip_eps, args.beta)
    truth, weights = (groups.batch[name].repeat_interleave(args.group_size, 0)
                      for name in ("low_masks", "low_weights"))  # (N, S/4, S/4)
    loss_seg = segmentation_loss(out["mask_logits"], truth, args.focal, weights).mean()
    loss = policy_loss + args.alpha * loss_seg
    B = len(groups.batch["ids"])
    (loss * B * world / args.batch).backward()  # FSDP averages over ranks: a mean over all groups
    means = {"loss": loss, "loss_seg": loss_seg, "kl": stats["kl"],
             "clip_fraction": stats["clip_fraction"], **vital_signs(out, groups, scores)}
    return {name: value.detach().float() * B for name, value in means.items()}


def vital_signs(out, groups, scores):
    """What shows whether a run is well, over some groups -> {name: mean (0-dim)}"""
    mask, lengths = groups.packed.mask, groups.packed.mask.sum(1).clamp(min=1)
    gap = (scores.old_log_probs - groups.sampler_log_probs).abs().masked_fill(~mask, 0)
    equal = (scores.reward == scores.reward[:, :1]).all(1)
    return {"reward": scores.reward.mean(), "reward_format": groups.r_format.mean(),
            "reward_box": groups.r_box.mean(), "reward_mask": scores.r_mask.mean(),
            "reward_spread": scores.reward.std(1, correction=0).mean(),
            "zero_variance": equal.float().mean(),
            "entropy": (out["entropy"].sum(1) / lengths).mean(),
            "completion_length": lengths.float().mean(), "cut": (~groups.finished).float().mean(),
            "sampler_gap": (gap.sum(1) / lengths).mean()}


def train_on(lens, optimizer, passes, factor, args, world, step):
    """All updates on one batch of samples. -> {name: mean over batch and updates}, gradient norm"""
    scores, means = [None] * len(passes), 0
    for update in range(args.updates_per_batch):
        sums = 0
        for i, groups in enumerate(passes):
            last = i + 1 == len(passes)
            lens.set_requires_gradient_sync(last or not args.reduce_once)
            out = lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
                       groups.features, args.temperature)
            if update == 0:
                scores[i] = score(out, groups, args)
            found = backward_pass(out, groups, scores[i], args, world)
            sums = sums + torch.stack(list(found.values()))
        dist.all_reduce(sums)
        of_batch = dict(zip(found, (sums / args.batch).tolist()))
        norm = apply_update(lens, optimizer, factor, args, of_batch["loss"], step)
        means = means + sums / args.batch / args.updates_per_batch
    return dict(zip(found, means.tolist())), norm


def parameter_groups(lens, args):
    """MLLM, context module and SAM's decoder, each with its own peak rate."""
    named = [(name, p) for name, p in lens.named_parameters() if p.requires_grad]
    rates = {"mllm.": args.lr, "sam.": args.lr_sam or args.lr,
             ("queries", "connector."): args.lr_context or args.lr}
    return [{"params": [p for name, p in named if name.startswith(prefix)], "peak_lr": rate}
            for prefix, rate in rates.items()]


# --- Looking at a run -----------------------------------------------------------------------------

def speed(lens, passes, samples, seconds_sampling, seconds_update, args, world):
    """Tokens per second over all processes, and the arithmetic of the update on each GPU: 6 FLOPs
    per weight of the layers and token of a packed row, and of the head and completion token; 2 more
    for the reference. Recomputed layers, attention and pictures are not counted, as usual. ->
    {name: number}"""
    sampled = sum(len(ids) for group in samples.completions for ids in group)
    trained = sum(groups.packed.ids.numel() for groups in passes) * args.updates_per_batch
    tokens = torch.tensor([sampled, trained], dtype=torch.float64)
    dist.all_reduce(tokens)
    sampled, trained = tokens.tolist()
    layers = sum(p.numel() for p in lens.mllm.model.language_model.layers.parameters())
    head = lens.mllm.lm_head.weight.numel()
    weighted = layers * trained + head * sampled * args.updates_per_batch
    flops = (6 + 2 * (args.beta > 0) / args.updates_per_batch) * weighted
    tflops = flops / world / max(seconds_update, 1e-9) / 1e12
    row = {"speed_sampled": round(sampled / max(seconds_sampling, 1e-9)),
           "speed_trained": round(trained / max(seconds_update, 1e-9)),
           "speed_tflops": round(tflops, 3)}
    if args.gpu_tflops:
        row["speed_mfu"] = round(tflops / args.gpu_tflops, 4)
    if samples.log_probs.is_cuda:  # the weights may be in CPU memory (--offload)
        row["gpu_memory"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return row


@torch.no_grad()
def validate(lens, sampler, fixed, rows, collate, decode, shared, args, rank, world, device):
    """The same rows of val each time, answered greedily. Every process runs as many passes as any
    other, since a pass is a collective; the rows that pad the last are not counted.
    -> {"val_giou" (where val has masks), "val_box_iou", "val_acc50"}"""
    args = replace(args, iou_power=1.0)
    share, sums = -(-len(rows) // world), torch.zeros(2, 3, device=device)
    lens.eval()
    for i in range(0, share, args.micro_batch):
        places = [rank * share + j for j in range(i, min(i + args.micro_batch, share))]
        items = [rows[min(place, len(rows) - 1)] for place in places]
        batch = to_device(collate(items), device)
        positions = prompt_positions(lens.mllm, batch)
        samples = generate(sampler, batch, positions, 1, shared.max_completion, lens.eos,
                           lens.forbidden, fixed=fixed)
        texts = [decode(group) for group in samples.completions]
        groups, = make_groups(lens, None, batch, positions, samples, texts, args)
        out = lens(batch["pixel_values"], batch["grid_thw"], groups.packed, groups.features,
                   with_log_probs=False)
        found = torch.stack([mask_rewards(out["mask_logits"], batch, 1.0), groups.r_box,
                             (groups.r_box > 0.5).float()])  # (3, B, 1)
        once = torch.tensor([place < len(rows) for place in places])
        has_mask = torch.tensor([not ignore.all() for ignore in batch["ignores"]])
        counted = torch.stack([once & has_mask, once, once]).to(device)  # (3, B)
        sums += torch.stack([(found[:, :, 0] * counted).sum(1), counted.sum(1)])
    lens.train()
    lens.reshard()  # no backward follows that would do it
    dist.all_reduce(sums)
    means = (sums[0] / sums[1].clamp(min=1)).tolist()
    found = dict(zip(("val_giou", "val_box_iou", "val_acc50"), means))
    if not sums[1, 0]:
        del found["val_giou"]  # no row of val has a mask
    return found


def val_score(row):
    """What OUTPUT/best is chosen by: the mask IoU, or the box IoU where val has boxes only."""
    return row.get("val_giou", row.get("val_box_iou", -1))


def load_models(shared, args, mesh, device):
    """-> the policy and the reference (None without a KL term), both sharded, the sampling copy,
    and the processor. All three MLLMs start from the same mapped files."""
    lens, processor = build_lens(shared, "" if args.init == "none" else args.init, "auto")
    frozen = set_trainable(lens.train(), "rl")
    sampler = copy_mllm(lens.mllm, shared.precision, device)
    reference = Reference(share_mllm(lens.mllm), lens.forbidden) if args.beta else None
    if args.gradient_checkpointing:
        lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    shard(lens, mesh, shared.precision, frozen, args.reshard, args.offload)
    if reference:
        shard(reference, mesh, shared.precision, (), args.reshard, args.offload)
    return lens, reference, sampler, processor


def main():
    shared, args = parse_settings([SharedArgs, RLArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(shared, args.shard)
    records = read_records(shared.data, shared.datasets, ["train"])[:shared.limit or None]
    total = plan_steps(args, world, len(records))
    if args.val_every:
        val = EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), args.val_rows)
    folder = open_output(args, (shared, args), rank)
    lens, reference, sampler, processor = load_models(shared, args, mesh, device)
    optimizer = make_optimizer(parameter_groups(lens, args), args, device)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    refresh(sampler, lens)
    if args.export:
        return export(folder, lens, shared, sampler, processor)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    loader = training_batches(TrainingStream(records, shared.seed), collate, start, total,
                              args.batch, rank, world, shared.workers, device)
    share = args.batch // world
    places = range(rank * share, (rank + 1) * share)  # of this rank's prompts in a batch
    fixed = fixed_cache(sampler, shared, share * args.group_size, device)
    decode = partial(processor.tokenizer.batch_decode, skip_special_tokens=True)
    metrics = Metrics(folder, start, total, rank, args.log_to)
    best = [max(map(val_score, metrics.rows), default=-1)]
    dist.broadcast_object_list(best, src=0)  # export is a collective: all must agree
    received, began = watch_signals(), time.time()
    for step, batch in enumerate(loader, start):
        arrived = time.time()
        batch = to_device(batch, device)
        positions, samples = draw_samples(lens, sampler, fixed, batch, step, places, shared, args)
        texts = [decode(group) for group in samples.completions]
        sampled = time.time()
        passes = make_groups(lens, reference, batch, positions, samples, texts, args)
        factor = learning_rate(step, total, args.warmup, "linear")
        means, norm = train_on(lens, optimizer, passes, factor, args, world, step)
        updated = time.time()
        refresh(sampler, lens)
        if device.type == "cuda":  # or the next step's time would hold what is still under way
            torch.cuda.synchronize()
        row = {"step": step + 1, **means, "grad_norm": norm, "lr": args.lr * factor,
               **speed(lens, passes, samples, sampled - arrived, updated - sampled, args, world),
               "seconds_loading": round(arrived - began, 3),
               "seconds_sampling": round(sampled - arrived, 3),
               "seconds_refresh": round(time.time() - updated, 3)}
        if args.val_every and (step + 1) % args.val_every == 0:
            row |= validate(lens, sampler, fixed, val, collate, decode, shared, args, rank, world,
                            device)
            if val_score(row) > best[0]:
                best[0] = val_score(row)
                export(folder / "best", lens, shared, sampler, processor)
        row["seconds"] = round(time.time() - began, 3)
        began = time.time()
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
