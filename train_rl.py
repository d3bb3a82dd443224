"""Stage 2, reinforcement learning (Eq. 12): GRPO with unified rewards and a segmentation loss, end
to end.

    torchrun --nproc_per_node=2 train_rl.py --preset tiny    # on a laptop; plain `python` works too
    torchrun --nproc_per_node=16 train_rl.py                 # the paper's settings (Table A2)
    torchrun --nproc_per_node=16 train_rl.py --resume        # go on, on any number of processes

Will it fit? `python tests/tools/plan.py --gpus 16 --gpu-memory 48` says so beforehand.

One step, in the order of this file:

    1. sample    G completions for each prompt                       generate           Eq. 1
    2. reward    the text, the box and the mask of each completion   text_rewards,      Eq. 11
                                                                     mask_rewards
    3. score     each completion against its group: advantages       score              Eqs. 6-7
    4. loss      -J(R_unified, D_KL) + alpha L_seg                   backward           Eq. 12
    5. update    everything but SAM's image encoder                  update

The masks come from the same forward as the log-probabilities of the loss (Eqs. 2-4): one packed row
for each group. So steps 2 to 4 happen for a few groups at a time, a micro-batch. Behind `main`
stand validation and a faster cache for sampling.

Three copies of the MLLM take part. The policy is trained: its fp32 weights are sharded over all
processes, and it computes in bf16. The sampler is a whole bf16 copy on every process, refreshed
after every step. The reference is the frozen start of this stage, in sharded bf16, for the KL
term (`--precision fp32` makes all of this fp32).

Departures from the paper
- The loss is -J + alpha L_seg, see grpo.py.
- The paper does not give epsilon, beta, the warm-up and the optimizer's betas. They are flags.
- We sample and train with the same temperature and the same forbidden tokens, without top-p or
  top-k. The released code samples with temperature 0.9, top-p and top-k, but its loss assumes
  temperature 1. It also squares both IoUs (`--iou-power 2`), never clips, has no format reward on
  RefCOCO.
"""
import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from align import (TINY, Metrics, SharedArgs, TrainArgs, apply_update, at_least, end_of_step, flag,
                   learning_rate, load_checkpoint, make_collator, make_optimizer, open_run,
                   parse_settings, run, segmentation_loss, start_processes, watch_signals)
from data import (EvaluationRows, LensError, TrainingStream, read_records, rescale_box, select,
                  to_device, training_batches)
from grpo import (PackedGroups, completion_table, group_advantages, grpo_loss, pack_groups,
                  policy_logits, sum_of_advantages, token_log_probs)
from model import (build_lens, checkpoint_layers, context_positions, export, group_hidden,
                   load_mllm, prefill, prompt_positions, run_with_cache, set_trainable, shard,
                   use_lens_attention)
from rewards import (box_iou, find_box, format_reward, full_size_masks, mask_iou, unified_reward)

# --- 1. Sample (Eq. 1) ----------------------------------------------------------------------------

@dataclass
class Samples:
    """The G completions of each of B prompts."""
    completions: list        # B x G x (T_i,) token ids on the CPU, the end token included
    finished: list           # B x G bool; False: --max-completion cut it, so it has no end token


def draw_uniforms(seed, step, numbers, G, max_new):
    """The randomness of a step, drawn in advance: (len(numbers) * G, max_new) float64 in [0, 1). A
    row depends on the seed, the step, the prompt's number in the batch and g alone. So a sample
    does not depend on the number of processes."""
    rows = [np.random.default_rng([seed, step, number, g]).random(max_new)
            for number in numbers for g in range(G)]
    return torch.from_numpy(np.stack(rows))


def pick_tokens(logits, uniforms=None):
    """One token for each row of (n, V). Without uniforms the most likely one; with uniforms (n,) in
    [0, 1), the token at which the cumulative distribution passes that number."""
    if uniforms is None:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).double().cumsum(-1)
    total = cdf[:, -1:]  # about 1; a target that is rounded up to it would find no token
    just_below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms[:, None] * total, just_below)
    # "right" never picks a token of probability 0
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    # a row of NaN finds no token; the NaN reaches the loss, and apply_update stops the run
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(mllm, batch, positions, G, max_new, eos, forbidden, uniforms=None, temperature=1.0,
             cache=None):
    """Eq. 1: sample G completions for each of B prompts. Each prompt is read once, then all N
    completions are decoded as one batch. -> Samples

    positions: model.prompt_positions, B x (3, P_b); max_new: the longest completion; forbidden
    (V,) bool: tokens that are never sampled, see model.forbidden_tokens;
    uniforms (N, max_new) from `draw_uniforms`, None for greedy decoding; cache: a FixedCache to
    decode in, otherwise a GrowingCache is made.
    """
    training = mllm.training
    mllm.eval()  # in training mode, a model that recomputes its layers would drop the cache
    prompts = prefill(mllm, batch, positions)
    hidden = prompts.hidden.repeat_interleave(G, 0)                # (N, C)
    next_position = prompts.next_position.repeat_interleave(G, 0)  # (N,)
    if cache is None:
        cache = GrowingCache(mllm.model.language_model)
    cache.begin(prompts, G)
    N, device = len(hidden), hidden.device
    tokens = torch.full((N, max_new), eos, device=device)
    done = torch.zeros(N, dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = policy_logits(mllm.lm_head, hidden, forbidden, temperature)  # (N, V)
        token = pick_tokens(logits, None if uniforms is None else uniforms[:, t])
        token = torch.where(done, eos, token)  # what follows the end is cut off below
        tokens[:, t] = token
        done = token == eos
        # asking makes the CPU wait for the GPU, so only every eighth token
        if t + 1 == max_new or t % 8 == 7 and done.all():
            break
        position = (next_position + t)[:, None].expand(3, -1, 1)              # (3, N, 1)
        hidden = cache.step(token, position)
    mllm.train(training)
    lengths = torch.where(done, (tokens == eos).int().argmax(1) + 1, max_new).tolist()
    rows = [row[:length] for row, length in zip(tokens.cpu(), lengths)]
    finished, firsts = done.tolist(), range(0, N, G)
    return Samples([rows[i:i + G] for i in firsts], [finished[i:i + G] for i in firsts])


class GrowingCache:
    """Keys and values of N sequences, one token longer after every step: the plain way to decode,
    and the fast one on a CPU."""

    def __init__(self, language_model):
        self.language_model = language_model

    def begin(self, prompts, G):
        """Take over the cache of B prompts (model.Prefilled), G times for each."""
        self.cache = prompts.cache
        self.cache.batch_repeat_interleave(G)
        self.mask = prompts.attention_mask.repeat_interleave(G, 0)  # (N, P + t), 0 on padding

    def step(self, token, position):
        """Feed one token (N,) at its position (3, N, 1). -> last hidden states (N, C)"""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return decode_step(self.language_model, token, position, self.mask, self.cache)


def decode_step(language_model, token, position, mask, cache, **options):
    """One token for N sequences. -> last hidden states (N, C)"""
    return run_with_cache(language_model, cache, position_ids=position, attention_mask=mask,
                          inputs_embeds=language_model.embed_tokens(token[:, None]),
                          **options).last_hidden_state[:, -1]


# --- 2. Reward (Eq. 11): the text, the box and the mask of each completion ------------------------

def completion_texts(lens, samples, tokenizer):
    """The texts of all completions, B x G. Where the prompt itself opens the think block, the text
    that is scored begins with it too."""
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True)
             for group in samples.completions]
    return [[lens.opening + text for text in group] for group in texts]


def text_rewards(texts, finished, batch, power, prompt="paper"):
    """R_format and R_box of B groups of G texts -> two tensors (B, G). power: --iou-power;
    prompt: --prompt.

    A completion that was cut has no end token, so its R_format is 0; its box still counts. The
    model names its box in the MLLM frame (data.mllm_frame). The IoU is taken in the image frame.
    """
    r_format, r_box = [], []
    for b, group in enumerate(texts):
        height, width = batch["gt_masks"][b].shape
        r_format.append([format_reward(text) * ended for text, ended in zip(group, finished[b])])
        boxes = [find_box(text, prompt) for text in group]
        # without a box (None) the IoU is 0
        boxes = [box and rescale_box(box, batch["mllm_frames"][b], (width, height))
                 for box in boxes]
        r_box.append([box_iou(box, batch["gt_boxes"][b]) ** power for box in boxes])
    return torch.tensor(r_format), torch.tensor(r_box)


def mask_rewards(mask_logits, batch, power):
    """R_seg of mask logits (B * G, S/4, S/4) -> (B, G), taken at the original size of each image.
    power: --iou-power."""
    groups = mask_logits.view(len(batch["gt_masks"]), -1, *mask_logits.shape[1:])
    device, rewards = mask_logits.device, []
    for logits, gt, ignore in zip(groups, batch["gt_masks"], batch["ignore_masks"]):
        masks = full_size_masks(logits, gt.shape)                  # (G, H, W)
        rewards.append(mask_iou(masks, gt.to(device), ignore.to(device)) ** power)
    return torch.stack(rewards)


# --- 2. to 4. A micro-batch: reward, score, loss --------------------------------------------------

@dataclass
class MicroBatch:
    """B groups that go through the policy together. (Here B and N = B * G count those alone.)"""
    batch: dict                          # their prompts, images and ground truth
    packed: PackedGroups                 # prompts and completions as packed rows
    features: list                       # SAM's feature maps of the B images
    ref_log_probs: torch.Tensor | None   # (N, T) under the reference; None without a KL term
    r_format: torch.Tensor               # (B, G)
    r_box: torch.Tensor                  # (B, G)
    finished: torch.Tensor               # (B, G) bool
    # `score` adds these after the first forward, and all updates on these samples use them
    old_log_probs: torch.Tensor = None   # (N, T) under the policy before its update, pi_old
    r_mask: torch.Tensor = None          # (B, G) R_seg
    reward: torch.Tensor = None          # (B, G)
    advantages: torch.Tensor = None      # (B, G)


def make_micro_batches(lens, reference, batch, positions, samples, texts, args):
    """Split the samples of this rank into micro-batches, and compute what no update changes: packed
    rows, log-probabilities under the reference, SAM's feature maps, R_format and R_box.
    texts: B x G, see completion_texts. -> list of MicroBatch"""
    micro_batches, device = [], batch["pixel_values"].device
    for first in range(0, len(positions), args.micro_batch):
        rows = slice(first, first + args.micro_batch)
        prompts = select(batch, range(len(positions))[rows])
        packed = pack_groups(prompts["prompt_ids"],
                             context_positions(positions[rows], lens.mask_pass),
                             samples.completions[rows], lens.M, device)
        ref_log_probs = None
        if reference is not None:
            ref_log_probs = reference(prompts["pixel_values"], prompts["grid_thw"], packed,
                                      args.temperature)
        r_format, r_box = text_rewards(texts[rows], samples.finished[rows], prompts,
                                       args.iou_power, lens.prompt)
        micro_batches.append(MicroBatch(
            batch=prompts, packed=packed, features=lens.encode_images(prompts["sam_pixels"]),
            ref_log_probs=ref_log_probs, r_format=r_format.to(device), r_box=r_box.to(device),
            finished=torch.tensor(samples.finished[rows], device=device)))
    return micro_batches


def score(out, micro, args):
    """Fill in the second half of a MicroBatch: rewards and advantages, from the policy's first
    forward. out: what model.group_forward returns."""
    micro.old_log_probs = out["log_probs"].detach()
    micro.r_mask = mask_rewards(out["mask_logits"].detach(), micro.batch, args.iou_power)
    lambdas = (args.lambda_format, args.lambda_box, args.lambda_mask)
    micro.reward = unified_reward(micro.r_format, micro.r_box, micro.r_mask, lambdas)   # Eq. 11
    if args.deviation == "each":
        rewards = micro.r_format, micro.r_box, micro.r_mask
        micro.advantages = sum_of_advantages(rewards, lambdas)
    else:
        micro.advantages = group_advantages(micro.reward, args.deviation)               # Eqs. 6-7


def backward(out, micro, args, world):
    """Eq. 12 for a MicroBatch, and its gradient. Gradients add up over micro-batches and ranks to
    the gradient of the mean over the batch. -> {name: sum over the groups (scalar tensor)}"""
    mask = micro.packed.mask
    if args.skip_cut:
        mask = mask & micro.finished.flatten()[:, None]
    policy_loss, policy_stats = grpo_loss(
        out["log_probs"], micro.old_log_probs, micro.ref_log_probs, micro.advantages.flatten(),
        mask, args.clip_eps, args.beta, args.loss_length)
    gt, weights = (micro.batch[name].repeat_interleave(args.group_size, 0)
                   for name in ("low_res_masks", "low_res_weights"))     # (N, S/4, S/4)
    loss_seg = segmentation_loss(out["mask_logits"], gt, weights).mean()
    loss = policy_loss + args.alpha * loss_seg
    B = len(micro.batch["prompt_ids"])
    # `loss` is a mean over B groups, and FSDP averages gradients over the ranks
    (loss * B * world / args.batch).backward()
    means = {"loss": loss, "loss_seg": loss_seg, **policy_stats, **vital_signs(out, micro)}
    return {name: value.detach().float() * B for name, value in means.items()}


def vital_signs(out, micro):
    """What shows whether a run is healthy -> {name: mean over a MicroBatch (scalar tensor)}.

    zero_variance is the share of groups whose rewards are equal, which teach nothing; cut the share
    of completions without an end token.
    """
    lengths = micro.packed.mask.sum(1)                                   # (N,)
    equal = (micro.reward == micro.reward[:, :1]).all(1)
    return {"reward": micro.reward.mean(), "reward_format": micro.r_format.mean(),
            "reward_box": micro.r_box.mean(), "reward_mask": micro.r_mask.mean(),
            "zero_variance": equal.float().mean(),
            "entropy": (out["entropy"].sum(1) / lengths).mean(),  # it is 0 on padding
            "completion_length": lengths.float().mean(), "cut": (~micro.finished).float().mean()}


# --- 5. Update ------------------------------------------------------------------------------------

def update(lens, optimizer, micro_batches, factor, args, world, step):
    """All optimizer steps on one batch of samples, usually one. factor: share of the peak learning
    rate. -> {name: mean over the batch and the optimizer steps}, gradient norm"""
    total = 0
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
        mean = sums / args.batch  # over the batch, in the order of `stats`
        loss = dict(zip(stats, mean.tolist()))["loss"]
        norm = apply_update(lens, optimizer, factor, args, loss, step)
        total = total + mean / args.updates_per_batch
    return dict(zip(stats, total.tolist())), norm


def parameter_groups(lens, args):
    """Two groups with a peak rate each: the MLLM; the context module with SAM's decoder."""
    trained, mllm = [p for p in lens.parameters() if p.requires_grad], {*lens.mllm.parameters()}
    return [{"params": [p for p in trained if p in mllm], "peak_lr": args.lr},
            {"params": [p for p in trained if p not in mllm],
             "peak_lr": args.lr_context or args.lr}]


# --- The sampler and the reference ----------------------------------------------------------------

def copy_mllm(mllm, precision, device="cpu"):
    """The sampler: an unsharded, frozen copy in the precision that computes. Parameters are cast
    one by one, so that no second whole model in fp32 exists. Buffers keep theirs, see load_mllm."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    memo = {id(p): nn.Parameter(p.detach().to(device, dtype, copy=True), requires_grad=False)
            for p in mllm.parameters()}
    sampler = copy.deepcopy(mllm, memo)  # what is in the memo counts as copied already
    return sampler.to(device).eval()  # .to(device) for the buffers


@torch.no_grad()
def refresh(sampler, lens):
    """sampler <- the policy's weights, in place. Every rank must call this in every step: it
    gathers the shards of all."""
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
    """-> policy and reference (None without a KL term), both sharded; sampler; processor"""
    # "auto" is the dtype of the files. So the weights stay mapped to them until `shard` copies each
    # process's part (in fp32 where it trains), and the reference costs no memory until then.
    lens, processor = build_lens(shared, "" if args.init == "none" else args.init, "auto")
    frozen = set_trainable(lens.train(), "rl")  # SAM's image encoder, which stays whole
    sampler = copy_mllm(lens.mllm, shared.precision, device)  # while the weights are whole
    reference = None
    if args.beta:  # build_lens has set shared.mllm to the files that the policy starts from
        reference = Reference(load_mllm(shared.mllm, "auto")[0], lens.forbidden)
    if args.gradient_checkpointing:
        checkpoint_layers(lens.mllm)
    shard(lens, mesh, shared.precision, frozen, args.offload)
    if reference:
        shard(reference, mesh, shared.precision, (), args.offload)  # all of it, to save memory
    return lens, reference, sampler, processor


# --- The flags of this stage ----------------------------------------------------------------------

@dataclass
class RLArgs(TrainArgs):
    """The flags of stage 2. Those up to --lr are in TrainArgs too, with other defaults."""
    output: str = flag("runs/rl", "folder for metrics.jsonl, checkpoints and the finished run")
    init: str = flag("runs/align", "stage 1's folder; 'none' starts from an untrained context "
                                   "module (Table 5)")
    batch: int = flag(64, "prompts per step, over all processes")
    micro_batch: int = flag(4, "prompts per forward and backward of one process; 4 fits 48 GB")
    epochs: int = flag(16, "how often every training object is used")
    lr: float = flag(3e-6, "peak learning rate, of the MLLM alone if the next one is given")
    lr_context: float = flag(0.0, "peak learning rate of context queries, connector and SAM's "
                                  "decoder; 0 takes --lr")
    group_size: int = flag(8, "G, completions per prompt")
    temperature: float = flag(1.0, "temperature of the policy, in sampling and in the loss")
    clip_eps: float = flag(0.2, "epsilon of Eq. 8")
    beta: float = flag(0.04, "weight of the KL term (Eq. 10)")
    updates_per_batch: int = flag(1, "updates on one batch of samples; above 1 the clip acts")
    lambda_format: float = flag(1.0, "lambda_1 of Eq. 11; 0 removes R_format (Table 5)")
    lambda_box: float = flag(1.0, "lambda_2 of Eq. 11; 0 removes R_box")
    lambda_mask: float = flag(1.0, "lambda_3 of Eq. 11; 0 removes R_seg")
    iou_power: float = flag(1.0, "R_box and R_seg are IoU to this power (released code: 2)")
    deviation: Literal["population", "sample", "none", "each"] = flag(
        "population", "sigma of Eq. 6: over G; over G - 1 (released code); left out (Dr. GRPO); or "
                      "one for each reward (GDPO)")
    loss_length: int = flag(0, "divide the loss of a completion by this many tokens (Dr. GRPO); 0: "
                               "by its own length")
    skip_cut: bool = flag(False, "leave completions that --max-completion has cut out of the "
                                 "policy's loss (DAPO)")
    alpha: float = flag(1.0, "weight of the segmentation loss (Eq. 12)")
    gradient_checkpointing: bool = flag(True, "recompute the MLLM's layers in the backward")
    val_every: int = flag(0, "validate every N steps (0: never); the best model is saved in "
                             "OUTPUT/best")

    def __post_init__(self):
        super().__post_init__()
        at_least(2, self, "group_size")  # one completion has nothing to compare with
        at_least(1, self, "updates_per_batch")
        at_least(0, self, "beta", "alpha", "lr_context", "lambda_format", "lambda_box",
                 "lambda_mask", "loss_length", "val_every")
        if not (0 < self.clip_eps < 1 and self.temperature > 0 and self.iou_power > 0):
            raise LensError("--clip-eps must be between 0 and 1, --temperature and --iou-power "
                            "above 0")


# In the tiny preset alpha is 0.1, since the completions should follow the rewards more than L_seg.
# The context module and SAM hardly notice: L_seg is their only loss, and Adam divides the factor
# out. lr_context is a tenth of stage 1's rate, as in the paper.
PRESETS = {"tiny": dict(TINY, output="runs/tiny/rl", init="runs/tiny/align", batch=12,
                        micro_batch=6, steps=75, lr=2.5e-4, lr_context=1e-4, alpha=0.1, warmup=10,
                        save_every=50, gradient_checkpointing=False)}


def main():
    shared, args = parse_settings([SharedArgs, RLArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(shared, args.shard)
    val = validation_rows(shared) if args.val_every else None
    folder, records, total = open_run(shared, args, rank, world)
    lens, reference, sampler, processor = load_models(shared, args, mesh, device)
    optimizer = make_optimizer(parameter_groups(lens, args), args, device)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    refresh(sampler, lens)  # a checkpoint has changed the policy
    collate = make_collator(shared, lens, processor)
    received = watch_signals()  # stop signals so far; the loader looks at them while it waits
    loader = training_batches(TrainingStream(records, shared.seed), collate, start, total,
                              args.batch, rank, world, shared.workers, device, received)
    share = args.batch // world
    numbers = range(rank * share, (rank + 1) * share)  # of this rank's prompts in the batch
    cache = decoding_cache(sampler, shared, share * args.group_size, device)
    metrics = Metrics(folder, start, total, rank)
    best = max((row.get("val_giou", -1) for row in metrics.rows), default=-1)  # all ranks read them
    began = time.time()
    for step, batch in enumerate(loader, start):
        loaded = time.time()
        batch = to_device(batch, device)

        # 1. sample
        positions = prompt_positions(lens.mllm, batch)
        uniforms = draw_uniforms(shared.seed, step, numbers, args.group_size,
                                 shared.max_completion)
        samples = generate(sampler, batch, positions, args.group_size, shared.max_completion,
                           lens.eos, lens.forbidden, uniforms.to(device), args.temperature, cache)
        texts = completion_texts(lens, samples, processor.tokenizer)
        sampled = time.time()

        # 2. to 5. reward, score, loss, update
        micro_batches = make_micro_batches(lens, reference, batch, positions, samples, texts, args)
        factor = learning_rate(step, total, args.warmup, "linear")
        means, norm = update(lens, optimizer, micro_batches, factor, args, world, step)
        updated = time.time()
        refresh(sampler, lens)

        # validate, log, save
        row = {"step": step + 1, **means, "grad_norm": norm, "lr": args.lr * factor,
               **timing(micro_batches, samples, args, began, loaded, sampled, updated)}
        if val and (step + 1) % args.val_every == 0:
            row |= validate(lens, sampler, cache, val, collate, processor.tokenizer, shared, args,
                            rank, world, device)
            if row["val_giou"] > best:
                best = row["val_giou"]
                export(folder / "best", lens, shared, sampler, processor)
        row["seconds"] = round(time.time() - began, 3)
        began = time.time()  # writing and saving count as the next step's loading
        # the progress bar shows these four
        metrics.write(row, ("reward", "reward_format", "reward_box", "reward_mask"))
        if step % 10 == 0:
            metrics.say(f"step {step + 1}: reward {means['reward']:.3f} = format "
                        f"{means['reward_format']:.3f}, box {means['reward_box']:.3f}, mask "
                        f"{means['reward_mask']:.3f}; kl {means['kl']:.4f}\n"
                        f"  {batch['expressions'][0]!r} -> {texts[0][0]!r}")
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared, sampler, processor)
    metrics.say(f"Stage 2 is done: {folder}")


def timing(micro_batches, samples, args, began, loaded, sampled, updated):
    """Seconds of the parts of a step, tokens per second over all processes, and this GPU's peak
    memory in GB. Trained tokens are those of packed rows, padding included, and their seconds
    include the rewards and the reference."""
    new = sum(len(completion) for group in samples.completions for completion in group)
    trained = sum(micro.packed.ids.numel() for micro in micro_batches) * args.updates_per_batch
    tokens = torch.tensor([new, trained], dtype=torch.float64)
    dist.all_reduce(tokens)  # on the CPU, by gloo
    row = {"speed_sampled": round(tokens[0].item() / max(sampled - loaded, 1e-9)),
           "speed_trained": round(tokens[1].item() / max(updated - sampled, 1e-9))}
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # wait, or the next step is charged for what still runs
        row["gpu_memory"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return {**row, "seconds_loading": round(loaded - began, 3),
            "seconds_sampling": round(sampled - loaded, 3),
            "seconds_refresh": round(time.time() - updated, 3)}


# --- Validation: which model of the run is the best? ----------------------------------------------

def predict(lens, sampler, batch, tokenizer, max_new, cache=None):
    """Inference, Eqs. 1-4: a greedy completion for each of B prompts, and the mask of its queries.
    -> Samples with G = 1, texts B x 1, mask logits (B, S/4, S/4), SAM's feature maps"""
    positions = prompt_positions(lens.mllm, batch)
    samples = generate(sampler, batch, positions, 1, max_new, lens.eos, lens.forbidden, cache=cache)
    packed = pack_groups(batch["prompt_ids"], context_positions(positions, lens.mask_pass),
                         samples.completions, lens.M, batch["pixel_values"].device)
    features = lens.encode_images(batch["sam_pixels"])
    out = lens(batch["pixel_values"], batch["grid_thw"], packed, features, with_log_probs=False)
    return samples, completion_texts(lens, samples, tokenizer), out["mask_logits"], features


def validation_rows(shared, limit=200):
    """The same rows of the validation split in every validation, taken evenly."""
    return EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), limit)


@torch.no_grad()
def validate(lens, sampler, cache, rows, collate, tokenizer, shared, args, rank, world, device):
    """Greedy completions and their masks on `rows`. -> {"val_giou": mean mask IoU, "val_box_iou":
    mean box IoU, "val_acc50": share of boxes with an IoU above 0.5}

    A forward is a collective, so every process must make the same number of them. Where the rows
    do not split evenly over the processes, the last ones are left out.
    """
    sums = torch.zeros(3, device=device)
    lens.eval()
    share = len(rows) // world
    own = range(rank * share, (rank + 1) * share)
    for first in range(0, share, args.micro_batch):
        items = [rows[i] for i in own[first:first + args.micro_batch]]
        batch = to_device(collate(items), device)
        samples, texts, mask_logits, _ = predict(lens, sampler, batch, tokenizer,
                                                 shared.max_completion, cache)
        _, r_box = text_rewards(texts, samples.finished, batch, 1.0, lens.prompt)
        r_box, r_mask = r_box.to(device), mask_rewards(mask_logits, batch, 1.0)     # (B, 1) each
        sums += torch.stack([r_mask.sum(), r_box.sum(), (r_box > 0.5).sum()])
    lens.train()
    lens.reshard()  # usually the backward does it, and there was none
    dist.all_reduce(sums)
    means = (sums / max(1, share * world)).tolist()
    return dict(zip(("val_giou", "val_box_iou", "val_acc50"), means))


# --- The same samples, faster: a cache that compiles ----------------------------------------------

def decoding_cache(mllm, shared, N, device):
    """A FixedCache for N completions on a GPU; None, for a GrowingCache, on the CPU.
    TORCH_COMPILE_DISABLE=1 in the environment switches compiling off."""
    if device.type == "cpu":
        return None
    return FixedCache(mllm, N, shared.max_prompt, shared.max_completion)


class FixedCache:
    """A GrowingCache whose tensors keep their shapes and their places in memory, made once for at
    most N sequences. So one compiled step (on CUDA one captured graph) serves every token, and the
    CPU never waits for the GPU.

    A slot is an index on the length axis. All prompts end before the slot `first`, which is a
    multiple of 512, so few shapes occur. Weights that change in place (`refresh`) are seen by the
    next step.
    """

    def __init__(self, mllm, N, longest_prompt, max_new, compiled=True):
        config, weight = mllm.config.text_config, mllm.lm_head.weight
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.room = math.ceil(max_new / 8) * 8  # slots of a completion; fused kernels like eights
        length = math.ceil(longest_prompt / 512) * 512 + self.room
        shape = (config.num_hidden_layers, 2, N, config.num_key_value_heads, length, d)
        self.memory = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        # the slot that is written next, as a tensor, so that a captured graph reads it anew
        self.slot = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.language_model, self.decode_step = mllm.model.language_model, decode_step
        use_lens_attention(mllm)  # it takes the option one_token and the mask that `step` passes
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each shape
            mode = "reduce-overhead" if weight.is_cuda else "default"
            self.decode_step = torch.compile(decode_step, dynamic=False, mode=mode)

    def begin(self, prompts, G):
        """As GrowingCache.begin."""
        B, P = prompts.attention_mask.shape
        first = math.ceil(P / 512) * 512  # the slot of the first completion token
        # from now on the layers are views (B * G, key heads, first + room, d) of the memory
        self.layers = [tuple(layer[:, :B * G, :, :first + self.room]) for layer in self.memory]
        for (keys, values), layer in zip(self.layers, prompts.cache.layers):
            for tensor in (keys, values):  # else a CUDA graph would copy it at every step
                torch._dynamo.mark_static_address(tensor, guard=False)
            keys[:, :, first - P:first] = layer.keys.repeat_interleave(G, 0)
            values[:, :, first - P:first] = layer.values.repeat_interleave(G, 0)
        self.slot.fill_(first - 1)
        mask = F.pad(prompts.attention_mask.bool(), (first - P, self.room))
        self.mask = mask.repeat_interleave(G, 0)[:, None, None]  # (B * G, 1, 1, first + room)

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


if __name__ == "__main__":
    run(main)
