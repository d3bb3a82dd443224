"""Stage 2, reinforcement learning (Eq. 12): GRPO with unified rewards and a segmentation loss, end
to end.

    torchrun --nproc_per_node=2 train_rl.py --preset tiny    # on a laptop; plain `python` works too
    torchrun --nproc_per_node=16 train_rl.py                 # the paper's settings (Table A2)
    torchrun --nproc_per_node=16 train_rl.py --resume        # go on, on any number of processes

Will it fit? `python tests/tools/plan.py --gpus 16 --gpu-memory 48` says so beforehand.

One step, in the order of this file:

    1. sample     G completions for each prompt                       generate           Eq. 1
    2. score      the text, the box and the mask of each completion   text_rewards,      Eq. 11
                                                                      mask_rewards
    3. compare    within each group: rewards -> advantages            score              Eqs. 6-7
    4. loss       -J(R_unified, D_KL) + alpha L_seg                   backward           Eq. 12
    5. update     everything but SAM's image encoder                  update

The masks come from the same forward pass as the log-probabilities of the loss (Eqs. 2-4): one
packed row for each group. So steps 2 to 4 happen for a few groups at a time, a micro-batch.

Three copies of the MLLM take part. The policy is trained: its fp32 weights are sharded over all
processes, and it computes in bf16. The sampler is a whole bf16 copy on every process, refreshed
after every update. The reference is the frozen start of this stage, in sharded bf16, for the KL
term (`--precision fp32` makes all of this fp32).

Departures from the paper
- We minimise -J + alpha L_seg. Eq. 12 as printed adds a loss to an objective that is maximised.
- The paper does not give epsilon, beta, the warm-up and the optimizer's betas. They are flags.
- We sample and train with the same temperature and the same forbidden tokens, without top-p or
  top-k. The released code samples with temperature 0.9, top-p and top-k, but its loss assumes
  temperature 1. It also squares both IoUs (`--iou-power 2`), never clips, has no format reward on
  RefCOCO, and loads SAM anew; here SAM's decoder goes on from where stage 1 left it.
"""
import copy
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from align import (LOG_EVERY, TINY, Metrics, SharedArgs, TrainArgs, apply_update, at_least,
                   end_of_step, flag, learning_rate, load_checkpoint, make_optimizer, open_output,
                   parse_settings, plan_steps, run, segmentation_loss, start_processes,
                   watch_signals)
from data import (Collator, EvaluationRows, LensError, TrainingStream, read_records, rescale_box,
                  select, take_evenly, to_device, training_batches)
from grpo import (PackedGroups, completion_table, group_advantages, grpo_loss, pack_groups,
                  policy_logits, token_log_probs)
from model import (build_lens, checkpoint_layers, context_positions, export, group_hidden, prefill,
                   prompt_positions, run_with_cache, set_trainable, shard, use_lens_attention)
from rewards import (box_iou, find_box, format_reward, full_size_masks, mask_iou, unified_reward)

# --- 1. Sample (Eq. 1) ----------------------------------------------------------------------------

@dataclass
class Samples:
    """The G completions of each of B prompts."""
    completions: list        # B x G x (T_i,) token ids on the CPU, the end token included
    finished: list           # B x G bool; False: --max-completion cut it, so it has no end token
    log_probs: torch.Tensor  # (N, max_new) of the sampled tokens, 0 behind the end token


def draw_uniforms(seed, step, places, G, max_new):
    """The randomness of a step, drawn in advance: (len(places) * G, max_new) in [0, 1). A row
    depends on the seed, the step, the prompt's place in the batch and g alone. So a sample does not
    depend on the number of processes."""
    rows = [np.random.default_rng([seed, step, place, g]).random(max_new)
            for place in places for g in range(G)]
    return torch.from_numpy(np.stack(rows))


def pick_tokens(logits, uniforms=None):
    """One token for each row of (n, V). Without uniforms the most likely one; with uniforms (n,) in
    [0, 1), the token at which the cumulative distribution passes that number."""
    if uniforms is None:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).double().cumsum(-1)
    total = cdf[:, -1:]
    just_below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms[:, None] * total, just_below)
    # "right" never picks a token of probability 0
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    # rows of NaN find no token; training ends at its loss, not here
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(mllm, batch, positions, G, max_new, eos, forbidden, uniforms=None, temperature=1.0,
             fixed=None):
    """Eq. 1: sample G completions for each of B prompts. Each prompt is read once, then all N
    completions are decoded as one batch. -> Samples

    positions: model.prompt_positions; max_new: the longest completion; forbidden (V,) bool;
    uniforms (N, max_new) from `draw_uniforms`, None for greedy decoding; fixed: a FixedCache to
    decode in, otherwise the cache grows.
    """
    training = mllm.training
    mllm.eval()  # in training mode, gradient checkpointing would drop the cache
    prompts = prefill(mllm, batch, positions)
    hidden = prompts.hidden.repeat_interleave(G, 0)                # (N, C)
    next_position = prompts.next_position.repeat_interleave(G, 0)  # (N,)
    if fixed is None:
        cache = GrowingCache(mllm.model.language_model, prompts, G)
    else:
        cache = fixed.begin(prompts, G)
    N, device = len(hidden), hidden.device
    tokens = torch.full((N, max_new), eos, device=device)
    log_probs = torch.zeros(N, max_new, device=device)
    done = torch.zeros(N, dtype=torch.bool, device=device)
    running = torch.arange(N, device=device)  # which of the N the batch still decodes: n of them
    for t in range(max_new):
        logits = policy_logits(mllm.lm_head, hidden, forbidden, temperature)  # (n, V)
        token = pick_tokens(logits, None if uniforms is None else uniforms[running, t])
        log_p = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        ended = done[running]
        token = torch.where(ended, eos, token)  # what is behind the end token is cut off below
        tokens[running, t] = token
        log_probs[running, t] = log_p.masked_fill(ended, 0)
        done[running] = ended | (token == eos)
        if t + 1 == max_new:
            break
        if t % 8 == 7:  # to ask is a host sync, so only every eighth token
            unfinished = (~done[running]).nonzero()[:, 0]
            if len(unfinished) == 0:
                break
            kept = cache.shrink(unfinished)
            if kept is not None:
                running, token = running[kept], token[kept]
        position = (next_position[running] + t).expand(3, 1, -1).transpose(1, 2)  # (3, n, 1)
        hidden = cache.step(token, position)
    mllm.train(training)
    lengths = torch.where(done, (tokens == eos).int().argmax(1) + 1, max_new).tolist()
    rows = [row[:length] for row, length in zip(tokens.cpu(), lengths)]
    finished, firsts = done.tolist(), range(0, N, G)
    return Samples([rows[i:i + G] for i in firsts], [finished[i:i + G] for i in firsts], log_probs)


class GrowingCache:
    """Keys and values of n sequences, one token longer after every step: the plain way to decode,
    and the fast one on a CPU."""

    def __init__(self, language_model, prompts, G):
        """prompts: model.Prefilled, whose cache is taken over, G times for each prompt."""
        prompts.cache.batch_repeat_interleave(G)
        self.language_model, self.cache = language_model, prompts.cache
        self.attention = prompts.attention.repeat_interleave(G, 0)  # (n, P + t)

    def step(self, token, position):
        """Feed one token (n,) at its position (3, n, 1). -> last hidden states (n, C)"""
        self.attention = F.pad(self.attention, (0, 1), value=1)
        return decode_step(self.language_model, token, position, self.attention, self.cache)

    def shrink(self, unfinished):
        """Once half of the sequences have ended, drop all but the unfinished (k,). -> the indices
        that were kept, or None if nothing has changed"""
        if len(unfinished) > len(self.attention) // 2:
            return None
        self.cache.batch_select_indices(unfinished)
        self.attention = self.attention[unfinished]
        return unfinished


def decode_step(language_model, token, position, mask, cache, **options):
    """One token for n sequences. -> last hidden states (n, C)"""
    return run_with_cache(language_model, cache, position_ids=position, attention_mask=mask,
                          inputs_embeds=language_model.embed_tokens(token[:, None]),
                          **options).last_hidden_state[:, -1]


# --- 2. Score (Eq. 11): the three rewards of each completion --------------------------------------

def completion_texts(lens, samples, tokenizer):
    """The texts of all completions, B x G. Where the prompt itself opens the think block, the text
    that is scored begins with it too."""
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True)
             for group in samples.completions]
    return [[lens.opening + text for text in group] for group in texts]


def text_rewards(texts, finished, batch, power, prompt="paper"):
    """R_format and R_box of B groups of G texts -> two tensors (B, G).

    A completion that was cut has no end token, so its R_format is 0; its box counts. The model
    names its box in the MLLM frame, and the IoU is taken in the image frame.
    """
    r_format, r_box = [], []
    for b, group in enumerate(texts):
        height, width = batch["gt_masks"][b].shape
        r_format.append([format_reward(text) * ended for text, ended in zip(group, finished[b])])
        boxes = [find_box(text, prompt) for text in group]
        boxes = [box and rescale_box(box, batch["mllm_frames"][b], (width, height))
                 for box in boxes]
        r_box.append([box_iou(box, batch["gt_boxes"][b]) ** power for box in boxes])
    return torch.tensor(r_format), torch.tensor(r_box)


def mask_rewards(mask_logits, batch, power):
    """R_seg of mask logits (B * G, S/4, S/4) -> (B, G), taken at the original size of each image.
    Where the ground truth is a box alone, all pixels are ignored, and R_seg is 0 for the group."""
    groups = mask_logits.view(len(batch["gt_masks"]), -1, *mask_logits.shape[1:])
    device, rewards = mask_logits.device, []
    for logits, gt, ignore in zip(groups, batch["gt_masks"], batch["ignore_masks"]):
        masks = full_size_masks(logits, gt.shape)                  # (G, H, W)
        iou = mask_iou(masks, gt.to(device), ignore.to(device))    # (G,)
        rewards.append(iou ** power * (not ignore.all()))
    return torch.stack(rewards)


# --- 3. and 4. A micro-batch: forward, advantages, loss, backward ---------------------------------

@dataclass
class MicroBatch:
    """B groups that go through the policy together."""
    batch: dict                          # their prompts, images and ground truth
    packed: PackedGroups                 # prompts and completions as packed rows
    features: list                       # SAM's feature maps of the B images
    sampler_log_probs: torch.Tensor      # (N, T) of the sampled tokens under the sampler
    ref_log_probs: torch.Tensor | None   # (N, T) under the reference; None without a KL term
    r_format: torch.Tensor               # (B, G)
    r_box: torch.Tensor                  # (B, G)
    finished: torch.Tensor               # (B, G) bool
    # `score` adds these after the first forward, and all updates on these samples use them
    old_log_probs: torch.Tensor = None   # (N, T) under the policy that sampled
    r_mask: torch.Tensor = None          # (B, G)
    reward: torch.Tensor = None          # (B, G)
    advantages: torch.Tensor = None      # (B, G)


def make_micro_batches(lens, reference, batch, positions, samples, texts, args):
    """Split the samples of this rank into micro-batches. texts: B x G, the decoded completions.
    -> list of MicroBatch"""
    micro_batches, device = [], batch["pixel_values"].device
    G = len(samples.completions[0])
    for first in range(0, len(positions), args.micro_batch):
        rows = slice(first, first + args.micro_batch)
        prompts, completions = select(batch, range(len(positions))[rows]), samples.completions[rows]

        def pack(mask_pass):
            return pack_groups(prompts["prompt_ids"], context_positions(positions[rows], mask_pass),
                               completions, lens.M, device)
        packed, ref_log_probs = pack(lens.mask_pass), None
        if reference is not None:
            # the reference keeps the MLLM's own positions, as the released code's does
            text_only = packed if lens.mask_pass == "paper" else pack("paper")
            ref_log_probs = reference(prompts["pixel_values"], prompts["grid_thw"], text_only,
                                      args.temperature)
        r_format, r_box = text_rewards(texts[rows], samples.finished[rows], prompts,
                                       args.iou_power, lens.prompt)
        T, n = packed.mask.shape[1], first * G
        micro_batches.append(MicroBatch(
            prompts, packed, lens.encode_images(prompts["sam_pixels"]),
            samples.log_probs[n:n + len(completions) * G, :T], ref_log_probs,
            r_format.to(device), r_box.to(device),
            torch.tensor(samples.finished[rows], device=device)))
    return micro_batches


def score(out, micro, args):
    """Rewards and advantages of a MicroBatch, from the first forward of the policy, `out`."""
    micro.old_log_probs = out["log_probs"].detach()
    micro.r_mask = mask_rewards(out["mask_logits"].detach(), micro.batch, args.iou_power)
    lambdas = (args.lambda_format, args.lambda_box, args.lambda_mask)
    micro.reward = unified_reward(micro.r_format, micro.r_box, micro.r_mask, lambdas)   # Eq. 11
    micro.advantages = group_advantages(micro.reward,                                   # Eqs. 6-7
                                        correction=int(args.deviation == "sample"))


def backward(out, micro, args, world):
    """Eq. 12 for a MicroBatch, and its gradient. Gradients add up over micro-batches and ranks to
    the gradient of the mean over the batch. -> {name: sum over the groups (scalar tensor)}"""
    policy_loss, stats = grpo_loss(out["log_probs"], micro.old_log_probs, micro.ref_log_probs,
                                   micro.advantages.flatten(), micro.packed.mask, args.clip_eps,
                                   args.beta)
    gt, weights = (micro.batch[name].repeat_interleave(args.group_size, 0)
                   for name in ("low_res_masks", "low_res_weights"))     # (N, S/4, S/4)
    loss_seg = segmentation_loss(out["mask_logits"], gt, weights).mean()
    loss = policy_loss + args.alpha * loss_seg
    B = len(micro.batch["prompt_ids"])
    (loss * B * world / args.batch).backward()  # FSDP averages over ranks, hence `world`
    means = {"loss": loss, "loss_seg": loss_seg, "kl": stats["kl"],
             "clip_fraction": stats["clip_fraction"], **vital_signs(out, micro)}
    return {name: value.detach().float() * B for name, value in means.items()}


def vital_signs(out, micro):
    """What shows whether a run is healthy -> {name: mean over a MicroBatch (scalar tensor)}.

    reward_spread is the deviation within a group, zero_variance the share of groups that teach
    nothing, cut the share of completions without an end token. sampler_gap is the distance between
    the log-probabilities of the sampler and of the policy: rounding, unless something is wrong.
    """
    mask, lengths = micro.packed.mask, micro.packed.mask.sum(1).clamp(min=1)
    gap = (micro.old_log_probs - micro.sampler_log_probs).abs().masked_fill(~mask, 0)
    equal = (micro.reward == micro.reward[:, :1]).all(1)
    has_mask = micro.batch["low_res_weights"].flatten(1).any(1)
    return {"reward": micro.reward.mean(), "reward_format": micro.r_format.mean(),
            "reward_box": micro.r_box.mean(), "reward_mask": micro.r_mask.mean(),
            "reward_spread": micro.reward.std(1, correction=0).mean(),
            "zero_variance": equal.float().mean(),
            "entropy": (out["entropy"].sum(1) / lengths).mean(),
            "completion_length": lengths.float().mean(), "cut": (~micro.finished).float().mean(),
            "sampler_gap": (gap.sum(1) / lengths).mean(), "has_mask": has_mask.float().mean()}


# --- 5. Update ------------------------------------------------------------------------------------

def update(lens, optimizer, micro_batches, factor, args, world, step):
    """All updates on one batch of samples, usually one. factor: share of the peak learning rate.
    -> {name: mean over the batch and the updates}, gradient norm"""
    means = 0
    for repeat in range(args.updates_per_batch):
        sums = 0
        for micro in micro_batches:
            out = lens(micro.batch["pixel_values"], micro.batch["grid_thw"], micro.packed,
                       micro.features, args.temperature)
            if repeat == 0:
                score(out, micro, args)
            stats = backward(out, micro, args, world)
            sums = sums + torch.stack(list(stats.values()))
        dist.all_reduce(sums)
        loss = (sums / args.batch)[list(stats).index("loss")].item()
        norm = apply_update(lens, optimizer, factor, args, loss, step)
        means = means + sums / args.batch / args.updates_per_batch
    means = dict(zip(stats, means.tolist()))
    means["reward_mask"] /= means.pop("has_mask") or 1  # the mean over the groups that have a mask
    return means, norm


def parameter_groups(lens, args):
    """The MLLM, the context module and SAM's decoder, each with its own peak rate."""
    named = [(name, p) for name, p in lens.named_parameters() if p.requires_grad]
    rates = {"mllm.": args.lr, "sam.": args.lr_sam or args.lr,
             ("queries", "connector."): args.lr_context or args.lr}
    return [{"params": [p for name, p in named if name.startswith(prefix)], "peak_lr": rate}
            for prefix, rate in rates.items()]


# --- The sampler and the reference ----------------------------------------------------------------

def copy_mllm(mllm, precision, device="cpu"):
    """The sampler: an unsharded, frozen copy in the precision that computes. Parameters are cast
    one by one, so that no second fp32 model ever exists. Buffers keep theirs, see load_mllm."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return copy_with(mllm, lambda p: p.detach().to(device, dtype, copy=True)).to(device).eval()


def share_mllm(mllm):
    """A second model over the same memory, for the reference: `shard` then makes each process its
    own part of it."""
    return copy_with(mllm, lambda p: p.detach())


def copy_with(mllm, new_parameter):
    """A frozen copy whose parameters are new_parameter(old parameter). Tied ones stay tied."""
    memo = {id(p): nn.Parameter(new_parameter(p), requires_grad=False) for p in mllm.parameters()}
    return copy.deepcopy(mllm, memo)  # what is in the memo counts as copied already


@torch.no_grad()
def refresh(sampler, lens):
    """sampler <- the policy's weights, in place. A collective: every rank must call it after every
    update, or some ranks would sample from an old model."""
    for target, parameter in zip(sampler.parameters(), lens.mllm.parameters()):
        target.copy_(parameter.to(target.dtype).full_tensor())


class Reference(nn.Module):
    """The policy from which this stage started, for the KL term (Eq. 9)."""

    def __init__(self, mllm, forbidden):
        super().__init__()
        self.mllm = mllm.requires_grad_(False)
        self.register_buffer("forbidden", forbidden, persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values, grid_thw, packed, temperature=1.0):
        """-> log-probabilities (N, T)"""
        hidden = group_hidden(self.mllm, pixel_values, grid_thw, packed)
        log_probs, _ = token_log_probs(self.mllm.lm_head, hidden[packed.target_places],
                                       packed.targets, self.forbidden, temperature)
        return completion_table(log_probs, packed.mask)


def load_models(shared, args, mesh, device):
    """-> policy and reference (None without a KL term), both sharded; sampler; processor. All three
    MLLMs come from the same files, mapped into memory once."""
    lens, processor = build_lens(shared, "" if args.init == "none" else args.init, "auto")
    frozen = set_trainable(lens.train(), "rl")
    sampler = copy_mllm(lens.mllm, shared.precision, device)
    reference = Reference(share_mllm(lens.mllm), lens.forbidden) if args.beta else None
    if args.gradient_checkpointing:
        checkpoint_layers(lens.mllm)
    shard(lens, mesh, shared.precision, frozen, args.offload)
    if reference:
        shard(reference, mesh, shared.precision, (), args.offload)
    return lens, reference, sampler, processor


# --- The flags of this stage ----------------------------------------------------------------------

@dataclass
class RLArgs(TrainArgs):
    output: str = flag("runs/rl", "folder for metrics.jsonl, checkpoints and the finished run")
    init: str = flag("runs/align", "stage 1's folder; 'none' starts from an untrained context "
                                   "module (Table 5)")
    batch: int = flag(64, "prompts per step, over all processes")
    micro_batch: int = flag(4, "prompts per forward and backward of one process; 4 fits 48 GB")
    epochs: int = flag(16, "how often every training object is used")
    lr: float = flag(3e-6, "peak learning rate, of the MLLM alone where the next two are given")
    lr_context: float = flag(0.0, "peak learning rate of context queries and connector; 0 takes "
                                  "--lr")
    lr_sam: float = flag(0.0, "peak learning rate of SAM's decoder; 0 takes --lr")
    group_size: int = flag(8, "G, completions per prompt")
    temperature: float = flag(1.0, "temperature of the policy, in sampling and in the loss")
    clip_eps: float = flag(0.2, "epsilon of Eq. 8")
    beta: float = flag(0.04, "weight of the KL term (Eq. 10)")
    updates_per_batch: int = flag(1, "updates on one batch of samples; above 1 the clip acts")
    lambda_format: float = flag(1.0, "lambda_1 of Eq. 11; 0 removes R_format (Table 5)")
    lambda_box: float = flag(1.0, "lambda_2 of Eq. 11; 0 removes R_box")
    lambda_mask: float = flag(1.0, "lambda_3 of Eq. 11; 0 removes R_seg")
    iou_power: float = flag(1.0, "R_box and R_seg are IoU to this power (released code: 2)")
    deviation: Literal["population", "sample"] = flag(
        "population", "sigma of Eq. 6; the released code takes that of a sample")
    alpha: float = flag(1.0, "weight of the segmentation loss (Eq. 12)")
    gradient_checkpointing: bool = flag(True, "recompute the MLLM's layers in the backward")
    val_every: int = flag(0, "validate every N steps (0: never); the best model is saved in "
                             "OUTPUT/best")

    def __post_init__(self):
        super().__post_init__()
        at_least(2, self, "group_size")  # one completion has nothing to compare with
        at_least(1, self, "updates_per_batch")
        at_least(0, self, "beta", "alpha", "lr_context", "lr_sam", "lambda_format", "lambda_box",
                 "lambda_mask", "val_every")
        if not 0 < self.clip_eps < 1 or not self.temperature > 0 or not self.iou_power > 0:
            raise LensError("--clip-eps must be between 0 and 1, --temperature and --iou-power "
                            "above 0")


# alpha: both losses train the MLLM, and its completions should follow the rewards. For the context
# module and SAM the factor does not matter, since Adam divides it out and they get no other loss.
# Their rates are low: at first many completions name the wrong object, and the mask loss behind
# those teaches the queries to guess.
PRESETS = {"tiny": dict(TINY, output="runs/tiny/rl", init="runs/tiny/align", batch=12,
                        micro_batch=6, steps=140, lr=2.5e-4, lr_context=3e-5, lr_sam=1e-5,
                        alpha=0.1, warmup=10, adam_beta2=0.99, save_every=50,
                        gradient_checkpointing=False)}


def main():
    shared, args = parse_settings([SharedArgs, RLArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(shared, args.shard)
    records = take_evenly(read_records(shared.data, shared.datasets, ["train"]), shared.limit)
    total = plan_steps(args, world, len(records))
    val = validation_rows(shared) if args.val_every else None
    folder = open_output(args, (shared, args), records, rank)
    lens, reference, sampler, processor = load_models(shared, args, mesh, device)
    optimizer = make_optimizer(parameter_groups(lens, args), args, device)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    refresh(sampler, lens)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    received = watch_signals()
    loader = training_batches(TrainingStream(records, shared.seed), collate, start, total,
                              args.batch, rank, world, shared.workers, device, received)
    share = args.batch // world
    places = range(rank * share, (rank + 1) * share)  # those of this rank's prompts in the batch
    fixed = decoding_cache(sampler, shared, share * args.group_size, device)
    metrics = Metrics(folder, start, total, rank)
    best = best_so_far(metrics)
    began = time.time()
    for step, batch in enumerate(loader, start):
        loaded = time.time()
        batch = to_device(batch, device)
        positions = prompt_positions(lens.mllm, batch)
        uniforms = draw_uniforms(shared.seed, step, places, args.group_size, shared.max_completion)
        samples = generate(sampler, batch, positions, args.group_size, shared.max_completion,
                           lens.eos, lens.forbidden, uniforms.to(device), args.temperature, fixed)
        texts = completion_texts(lens, samples, processor.tokenizer)
        sampled = time.time()
        micro_batches = make_micro_batches(lens, reference, batch, positions, samples, texts, args)
        factor = learning_rate(step, total, args.warmup, "linear")
        means, norm = update(lens, optimizer, micro_batches, factor, args, world, step)
        updated = time.time()
        refresh(sampler, lens)
        if device.type == "cuda":  # else the next step would be charged for what still runs
            torch.cuda.synchronize()
        row = {"step": step + 1, **means, "grad_norm": norm, "lr": args.lr * factor,
               **speed(micro_batches, samples, sampled - loaded, updated - sampled, args),
               "seconds_loading": round(loaded - began, 3),
               "seconds_sampling": round(sampled - loaded, 3),
               "seconds_refresh": round(time.time() - updated, 3)}
        if val and (step + 1) % args.val_every == 0:
            row |= validate(lens, sampler, fixed, val, collate, processor.tokenizer, shared, args,
                            rank, world, device)
            if val_score(row) > best:
                best = val_score(row)
                export(folder / "best", lens, shared, sampler, processor)
        row["seconds"] = round(time.time() - began, 3)
        began = time.time()
        metrics.write(row, ("reward", "reward_format", "reward_box", "reward_mask"))
        if step % LOG_EVERY == 0:
            metrics.say(f"step {step + 1}: reward {means['reward']:.3f} = format "
                        f"{means['reward_format']:.3f}, box {means['reward_box']:.3f}, mask "
                        f"{means['reward_mask']:.3f}; kl {means['kl']:.4f}\n"
                        f"  {batch['expressions'][0]!r} -> {texts[0][0]!r}")
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared, sampler, processor)
    metrics.say(f"Stage 2 is done: {folder}")


def speed(micro_batches, samples, seconds_sampling, seconds_update, args):
    """Tokens per second, over all processes -> {name: number}"""
    sampled = sum(len(completion) for group in samples.completions for completion in group)
    trained = sum(micro.packed.ids.numel() for micro in micro_batches) * args.updates_per_batch
    tokens = torch.tensor([sampled, trained], dtype=torch.float64)
    dist.all_reduce(tokens)
    row = {"speed_sampled": round(tokens[0].item() / max(seconds_sampling, 1e-9)),
           "speed_trained": round(tokens[1].item() / max(seconds_update, 1e-9))}
    if samples.log_probs.is_cuda:
        row["gpu_memory"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return row


# --- Validation: which model of the run is the best? ----------------------------------------------

def validation_rows(shared, rows=200):
    """The same rows of the validation split at every look, taken evenly."""
    return EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), rows)


@torch.no_grad()
def validate(lens, sampler, fixed, rows, collate, tokenizer, shared, args, rank, world, device):
    """Greedy completions and their masks on `rows`. -> {"val_giou" (if any row has a mask),
    "val_box_iou", "val_acc50"}

    A forward is a collective, so every process makes the same number of them. Where the rows do not
    split evenly, the last row is repeated and not counted again.
    """
    share, sums = -(-len(rows) // world), torch.zeros(2, 3, device=device)
    lens.eval()
    for first in range(0, share, args.micro_batch):
        places = [rank * share + i for i in range(first, min(first + args.micro_batch, share))]
        items = [rows[min(place, len(rows) - 1)] for place in places]
        batch = to_device(collate(items), device)
        positions = prompt_positions(lens.mllm, batch)
        samples = generate(sampler, batch, positions, 1, shared.max_completion, lens.eos,
                           lens.forbidden, fixed=fixed)
        packed = pack_groups(batch["prompt_ids"], context_positions(positions, lens.mask_pass),
                             samples.completions, lens.M, device)
        out = lens(batch["pixel_values"], batch["grid_thw"], packed,
                   lens.encode_images(batch["sam_pixels"]), with_log_probs=False)
        texts = completion_texts(lens, samples, tokenizer)
        _, r_box = text_rewards(texts, samples.finished, batch, 1.0, lens.prompt)
        values = torch.stack([mask_rewards(out["mask_logits"], batch, 1.0), r_box.to(device),
                              (r_box > 0.5).float().to(device)])[:, :, 0]          # (3, B)
        is_row = torch.tensor([place < len(rows) for place in places])
        has_mask = torch.tensor([not ignore.all() for ignore in batch["ignore_masks"]])
        counts = torch.stack([is_row & has_mask, is_row, is_row]).to(device)       # (3, B)
        sums += torch.stack([(values * counts).sum(1), counts.sum(1)])
    lens.train()
    lens.reshard()  # usually the backward does it, and there was none
    dist.all_reduce(sums)
    means = (sums[0] / sums[1].clamp(min=1)).tolist()
    names = ("val_giou", "val_box_iou", "val_acc50")
    return {name: mean for name, mean, n in zip(names, means, sums[1]) if n}


def val_score(row):
    """What the best model is chosen by: mask IoU, or box IoU where no row has a mask."""
    return row.get("val_giou", row.get("val_box_iou", -1))


def best_so_far(metrics):
    """The best validation of a resumed run; -1 without any. The same on all ranks, since to export
    the best model is a collective."""
    best = [max(map(val_score, metrics.rows), default=-1)]
    dist.broadcast_object_list(best, src=0)
    return best[0]


# --- The same samples, faster: a cache that compiles ----------------------------------------------

def decoding_cache(mllm, shared, N, device):
    """What --compile asks for: a FixedCache for N completions, or None for the growing one."""
    if device.type == "cpu" and shared.compile != "on":
        return None
    return FixedCache(mllm, N, shared.max_prompt, shared.max_completion, shared.compile != "off")


class FixedCache:
    """A GrowingCache with fixed shapes and addresses, made once for at most N sequences. So one
    compiled step (on CUDA one captured graph) serves every token, without a host sync.

    Few shapes occur: n is N, N/2, N/4 or N/8, and the slot of the first completion token is a
    multiple of 512. Weights that change in place (`refresh`) are seen by the next step.
    """

    def __init__(self, mllm, N, longest_prompt, max_new, compiled=True):
        config, weight = mllm.config.text_config, mllm.lm_head.weight
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.room = -(-max_new // 8) * 8  # slots for a completion; fused kernels like eights
        length = -(-longest_prompt // 512) * 512 + self.room
        shape = (config.num_hidden_layers, 2, N, config.num_key_value_heads, length, d)
        self.memory = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.language_model, self.decode_step = mllm.model.language_model, decode_step
        use_lens_attention(mllm)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each shape
            mode = "reduce-overhead" if weight.is_cuda else "default"
            self.decode_step = torch.compile(decode_step, dynamic=False, mode=mode)

    def begin(self, prompts, G):
        """Take over the cache of B prompts (model.Prefilled), G times each. -> self"""
        B, P = prompts.attention.shape
        first = -(-P // 512) * 512  # the slot of the first completion token
        self.use(B * G, first + self.room)
        for (keys, values), layer in zip(self.layers, prompts.cache.layers):
            keys[:, :, first - P:first] = layer.keys.repeat_interleave(G, 0)
            values[:, :, first - P:first] = layer.values.repeat_interleave(G, 0)
        self.slot.fill_(first - 1)
        mask = F.pad(prompts.attention.bool(), (first - P, self.room)).repeat_interleave(G, 0)
        self.mask = mask[:, None, None]  # (n, 1, 1, length)
        self.smallest = B * G // 8
        return self

    def use(self, n, length):
        """From now on the layers are views (n, key heads, length, d) of the memory."""
        self.layers = [tuple(layer[:, :n, :, :length]) for layer in self.memory]
        for tensor in sum(self.layers, ()):  # else a CUDA graph would copy it at every step
            torch._dynamo.mark_static_address(tensor, guard=False)

    def update(self, key, value, layer, *args, **kwargs):
        """What each layer of the language model calls with the new token's key and value."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.slot, key)
        values.index_copy_(2, self.slot, value)
        return keys, values

    def get_seq_length(self, *args):
        return 0  # transformers asks, but positions and mask are given

    def step(self, token, position):
        """As GrowingCache.step."""
        self.slot += 1
        self.mask.index_fill_(3, self.slot, True)
        return self.decode_step(self.language_model, token, position, self.mask, self,
                                one_token=True)

    def shrink(self, unfinished):
        """As GrowingCache.shrink, but exactly to the half: ended sequences fill it up."""
        n, half = len(self.mask), len(self.mask) // 2
        if len(unfinished) > half or half < self.smallest:
            return None
        ended = torch.ones(n, dtype=torch.bool, device=unfinished.device)
        ended[unfinished] = False
        kept = torch.cat([unfinished, ended.nonzero()[:half - len(unfinished), 0]])
        self.mask = self.mask[kept]
        for tensor in sum(self.layers, ()):
            tensor[:half] = tensor[kept]
        self.use(half, self.mask.shape[3])
        return kept


if __name__ == "__main__":
    run(main)
