"""grpo.py and the packed group forward against a peer, TRL's own GRPOTrainer, and what a policy
pass costs in both. By hand, about ten minutes of one core:

    pip install --target SITE --no-deps trl==1.16.0 accelerate datasets pyarrow pandas \\
        python-dateutil six dill multiprocess xxhash psutil
    PYTHONPATH=SITE python tests/peers.py           # writes docs/peers.json and docs/peers.md
    PYTHONPATH=SITE python tests/peers.py --quick   # tiny sizes, a minute; prints, writes nothing
    python tests/peers.py --page                    # docs/peers.md again, from docs/peers.json

TRL is no dependency of this project. Its trainer is a real one, with its own methods for prompts,
advantages, log-probabilities and loss. Replaced are only `_generate`, so that it takes given
completions, the reward function, which returns given rewards, and in part 1
`_get_per_token_logps_and_entropies`, which returns stored log-probabilities. These are TRL's
private names: another release may move them, hence the version.

    1  stored tensors   grpo.py: advantages, loss, gradient and clipped share; then each of TRL's
                        defaults that the paper does not share, and how far it moves the gradient
    2  the stand-in     make_groups, Lens.forward, score and backward_pass as train_rl.py calls
                        them (alpha 0, nothing forbidden) against TRL on the same pictures,
                        expressions, completions and rewards
    3  the cost         forward and backward of one group of G = 8, interleaved in one process;
                        CPU time of its one thread, so that other jobs count little

Whatever differs by more than its limit below ends the script with a line that says so.

Letters: B prompts, G samples per prompt, N = B * G, P prompt tokens, T completion tokens, M context
queries, V vocabulary, C hidden size. """
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tiny")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from align import TINY, SharedArgs, flag, parse_settings, run
from data import Collator, LensError, load_item, read_records
from grpo import completion_table, group_advantages, grpo_loss, token_log_probs
from model import (build_lens, context_positions, draw_uniforms, generate, group_hidden,
                   pack_groups, prompt_positions)
from rewards import chat_messages
from train_rl import Reference, RLArgs, backward_pass, copy_mllm, make_groups, score
from world import write_shapes_world

INSTALL = ("pip install --target SITE --no-deps trl==1.16.0 accelerate datasets pyarrow pandas "
           "python-dateutil six dill multiprocess xxhash psutil")
CLIP, BETA = 0.2, 0.04
STAND_IN = str(ROOT / "tests/tiny/mllm")
# TRL's settings for what the paper does, as far as they exist: no setting gives 1/G in Eq. 6
PAPER = dict(loss_type="grpo", beta=BETA, epsilon=CLIP, scale_rewards="group",
             importance_sampling_level="token", use_bias_correction_kl=False)
LIMITS = {
    "stored": {"advantages": 1e-6, "loss": 1e-7, "gradient": 5e-9, "clip fraction": 0},
    "stored in float64": {"loss": 1e-15, "gradient": 1e-16},
    "group": {"pixel values": 0, "log-probs": 2e-5, "reference": 2e-5, "entropy": 2e-5,
              "advantages": 1e-5, "loss": 1e-7, "gradient": 1e-5},
    "float64": {"hidden states": 1e-12}, "cost": {"loss": 1e-6, "gradient": 1e-5}}


@dataclass
class PeersArgs:
    quick: bool = flag(False, "tiny sizes, to try the script; writes nothing")
    page: bool = flag(False, "only write docs/peers.md again, from docs/peers.json")
    seed: int = flag(0, "of stored tensors, rewards and completions")
    repetitions: int = flag(3, "timed runs of every way in part 3")


def load_trl():
    """-> TRL's version; LensError with the remedy where it cannot be imported"""
    try:
        import trl
        from trl import GRPOConfig, GRPOTrainer  # noqa: F401, TRL imports lazily: now or never
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise LensError(f"TRL is needed and cannot be imported ({reason}). It is no dependency; "
                        f"install it into a folder of its own: {INSTALL}; then "
                        "PYTHONPATH=SITE python tests/peers.py") from None
    return trl.__version__


def build_trainer(N, G, folder, **settings):
    """A real GRPOTrainer on the stand-in, for N completions in groups of G. What it is to sample
    and to give for it comes from hand_over."""
    import datasets.arrow_dataset
    from trl import GRPOConfig, GRPOTrainer
    given = []

    def stored_reward(completions, **kwargs):
        return list(given)
    args = GRPOConfig(output_dir=str(folder), per_device_train_batch_size=N, num_generations=G,
                      gradient_accumulation_steps=1, use_cpu=True, bf16=False,
                      gradient_checkpointing=False, report_to=[], **settings)
    prompts = [[{"role": "user", "content": "x"}]] * N
    # the name of a cache file, for which datasets pickles what cannot be pickled everywhere
    with mock.patch.object(datasets.arrow_dataset, "generate_fingerprint", lambda _: "fixed"):
        train = datasets.Dataset.from_dict({"prompt": prompts})
    trainer = GRPOTrainer(model=STAND_IN, reward_funcs=stored_reward, args=args,
                          train_dataset=train)
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer's loop, which does not run
    trainer.given_rewards = given
    trainer.model.train()
    return trainer


def hand_over(trainer, rows, completions, rewards):
    """Let TRL "sample" these completions, N lists of ids, for rows of {"prompt", "image"}, and give
    these rewards (N,). -> its batch: prompts as it tokenises them, its masks, advantages, and
    log-probabilities under its reference."""
    def sample(prompts):
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        answers = [[{"role": "assistant", "content": "x"}]] * len(completions)
        return prompt_ids, completions, None, answers, None, {}, images, None
    trainer._generate = sample
    trainer.given_rewards[:] = rewards.tolist()
    return trainer._generate_and_score_completions(rows)


def difference(a, b):
    """The largest, over all elements."""
    return (a.detach().double() - b.detach().double()).abs().max().item()


def relative_norm(found, expected):
    """|found - expected| / |expected|"""
    return ((found - expected).norm() / expected.norm()).item()


def all_gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


# --- 1. Stored tensors ----------------------------------------------------------------------------

@dataclass
class Stored:
    """Log-probabilities (N, T) under policy, sampler and reference; rewards (B, G); mask (N, T)."""
    log_probs: torch.Tensor
    old: torch.Tensor | None  # on-policy None: both take log_probs without gradient
    ref: torch.Tensor
    rewards: torch.Tensor
    mask: torch.Tensor


@dataclass
class Step:
    advantages: torch.Tensor  # (N,)
    loss: torch.Tensor
    gradient: torch.Tensor    # (N, T), of log_probs
    clipped: float


STORED_B, STORED_G, STORED_T = 6, 8, 37


def draw_stored(seed, dtype, off_policy):
    """Six groups, the second of equal rewards (0.1, whose mean is not exact), the third with one
    right answer; one completion of full length, one without any token."""
    g = torch.Generator().manual_seed(seed)
    B, G, T = STORED_B, STORED_G, STORED_T
    lengths = torch.randint(1, T + 1, (B * G,), generator=g)
    lengths[0], lengths[3] = T, 0
    shape = dict(size=(B * G, T), generator=g, dtype=torch.float64)
    log_probs = -4 * torch.rand(**shape)
    old = log_probs + 0.4 * torch.randn(**shape)
    ref = log_probs + 0.5 * torch.randn(**shape)
    rewards = 3 * torch.rand(B, G, generator=g)
    rewards[1] = 0.1
    rewards[2] = torch.eye(G)[0]
    return Stored(log_probs.to(dtype), old.to(dtype) if off_policy else None, ref.to(dtype),
                  rewards, torch.arange(T) < lengths[:, None])


def their_step(trainer, stored):
    """TRL's advantages, loss, gradient and clipped share of stored tensors. -> Step"""
    leaf = stored.log_probs.clone().requires_grad_()

    def log_probs(model, *inputs, compute_entropy=False, **kwargs):
        if model is trainer.ref_model:
            return stored.ref, None, None
        if not compute_entropy:                                  # the pass that asks for the old
            return stored.old, None, None
        return leaf, torch.zeros_like(leaf), None

    # a completion without tokens: TRL empties the mask of one that lacks the end token
    end = trainer.eos_token_ids[0]
    completions = [[20] * (n - 1) + [end] if n else [20] for n in stored.mask.sum(1).tolist()]
    rows = [{"prompt": [{"role": "user", "content": "x"}]}] * len(completions)
    trainer._get_per_token_logps_and_entropies = log_probs
    out = hand_over(trainer, rows, completions, stored.rewards.flatten())
    assert torch.equal(out["completion_mask"].bool(), stored.mask), "their mask is not ours"
    assert ("old_per_token_logps" in out) == (stored.old is not None)
    loss = trainer._compute_loss(trainer.model, out)
    loss.backward()
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    return Step(out["advantages"], loss.detach(), leaf.grad, clipped)


def our_step(stored, correction=0, advantages=None):
    """The same by grpo.py. -> Step"""
    leaf = stored.log_probs.clone().requires_grad_()
    old = leaf if stored.old is None else stored.old
    if advantages is None:
        advantages = group_advantages(stored.rewards, correction=correction).flatten()
    loss, stats = grpo_loss(leaf, old, stored.ref, advantages, stored.mask, CLIP, BETA)
    loss.backward()
    return Step(advantages, loss.detach(), leaf.grad, stats["clip_fraction"].item())


def compare_stored(trainer, seeds, dtype, off_policy):
    """-> {what: the largest difference over the seeds}, TRL set to the paper as far as it can be"""
    worst = {}
    others = torch.arange(STORED_B) != 1  # all but the group of equal rewards
    for seed in seeds:
        stored = draw_stored(seed, dtype, off_policy)
        theirs = their_step(trainer, stored)
        ours = our_step(stored, correction=1)
        same = our_step(stored, advantages=theirs.advantages)
        their_groups = theirs.advantages.view(STORED_B, STORED_G)
        our_groups = ours.advantages.view(STORED_B, STORED_G)
        found = {"advantages": difference(their_groups[others], our_groups[others]),
                 "loss": difference(theirs.loss, same.loss),
                 "gradient": difference(theirs.gradient, same.gradient),
                 "clip fraction": abs(theirs.clipped - same.clipped),
                 "loss, own advantages": difference(theirs.loss, ours.loss),
                 "gradient, own advantages": difference(theirs.gradient, ours.gradient),
                 "largest loss": theirs.loss.abs().item(),
                 "largest gradient": theirs.gradient.abs().max().item(),
                 "equal rewards, their advantages": their_groups[1].abs().max().item(),
                 "equal rewards, our advantages": our_groups[1].abs().max().item()}
        for name, value in found.items():
            worst[name] = max(value, worst.get(name, 0))
    return worst


# name -> the settings of PAPER that are left at TRL's default, and the correction of Eq. 6 in ours
DEFAULTS = {
    "sample deviation, 1/(G-1); Eq. 6 has 1/G": ([], 0),
    "`loss_type`: a mean over all tokens; Eq. 10 means every completion first": (["loss_type"], 1),
    "`beta`: no KL": (["beta"], 1),
    "`use_bias_correction_kl`: the KL times the ratio": (["use_bias_correction_kl"], 1),
    "all of them, TRL as it comes": (list(PAPER), 0)}


def as_it_comes():
    """-> TRL's own defaults of what PAPER sets"""
    from trl import GRPOConfig
    fields = GRPOConfig.__dataclass_fields__
    return {name: fields[name].default for name in PAPER}


def compare_defaults(build, seeds):
    """-> {TRL's default: {policy: its gradient's distance from the paper's over the paper's norm,
    the largest over the seeds}}"""
    table = {}
    for name, (left, correction) in DEFAULTS.items():
        table[name] = {}
        settings = {field: as_it_comes()[field] for field in left}
        for policy, off_policy in (("on-policy", False), ("off-policy", True)):
            trainer, worst = build(off_policy, settings), 0
            for seed in seeds:
                stored = draw_stored(seed, torch.float32, off_policy)
                theirs, ours = their_step(trainer, stored), our_step(stored, correction)
                worst = max(worst, relative_norm(theirs.gradient, ours.gradient))
            table[name][policy] = worst
    return table


def nan_behind_mask(trainer, seed):
    """What a NaN outside the mask does. -> {"theirs", "ours": NaN gradients}"""
    stored = draw_stored(seed, torch.float32, True)
    for name in ("log_probs", "old", "ref"):
        table = getattr(stored, name)
        setattr(stored, name, torch.where(stored.mask, table, torch.nan))
    theirs, ours = their_step(trainer, stored), our_step(stored)
    return {"theirs": theirs.gradient.isnan().sum().item(),
            "ours": ours.gradient.isnan().sum().item()}


def part_stored(args, folder):
    """-> {"compared": {dtype: {policy: {what: difference}}}, "defaults", "trl_defaults", "nan"}"""
    N, G = STORED_B * STORED_G, STORED_G
    seeds = range(args.seed, args.seed + (2 if args.quick else 20))

    def build(off_policy, settings):
        # two iterations over a batch make TRL ask for the old log-probabilities
        return build_trainer(N, G, folder, num_iterations=1 + off_policy,
                             mask_truncated_completions=True, **{**PAPER, **settings})
    trainers = {"on-policy": build(False, {}), "off-policy": build(True, {})}
    compared = {str(dtype): {policy: compare_stored(trainer, seeds, dtype, policy == "off-policy")
                             for policy, trainer in trainers.items()}
                for dtype in (torch.float32, torch.float64)}
    nan = nan_behind_mask(trainers["off-policy"], args.seed)
    return {"seeds": len(seeds), "compared": compared, "defaults": compare_defaults(build, seeds),
            "trl_defaults": as_it_comes(), "nan": nan}


# --- 2. The group forward on the stand-in ---------------------------------------------------------

SIZES = [(128, 128), (200, 96), (72, 160), (256, 256)]           # of the pictures
CASES = {
    "one size": dict(sizes=SIZES[:1] * 4),
    "four sizes": dict(sizes=SIZES),
    "four sizes, their attention eager": dict(sizes=SIZES, attention="eager"),
    "four sizes, temperature 0.7": dict(sizes=SIZES, temperature=0.7)}
GROUP_G, LONGEST = 4, 48


def load_items(folder, sizes):
    """Expressions of the shapes world, and its pictures, which have any size, resized to these."""
    records = read_records(folder, ["shapes"], ["train"])
    items = []
    for record, size in zip(records, sizes):
        item = load_item(record, 0)
        item["image"] = item["image"].resize(size)
        items.append(item)
    return items


def perturb(mllm, seed, scale=0.02):
    """So that the policy is not the reference: every weight moves by 2 % of its tensor's
    deviation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mllm.parameters():
            noise = torch.randn(parameter.shape, generator=g)
            parameter += scale * parameter.std() * noise


def their_rows(items, G):
    """What a user of TRL would write: system and user message, and the picture beside them."""
    rows = []
    for item in items:
        system, user = chat_messages(item["text"])
        prompt = [{"role": "system", "content": system["content"][0]["text"]},
                  {"role": "user", "content": user["content"][1]["text"]}]
        rows += [{"prompt": prompt, "image": item["image"]}] * G
    return rows


def their_log_probs(trainer, out):
    """TRL's policy pass over its padded batch. -> log-probabilities and entropy (N, T)"""
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")
    log_probs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, torch.cat([out["prompt_ids"], out["completion_ids"]], 1),
        torch.cat([out["prompt_mask"], out["completion_mask"]], 1), out["completion_ids"].shape[1],
        compute_entropy=True, **{name: out[name] for name in names})
    return log_probs, entropy


class GroupWorld:
    """The stand-in, B pictures with an expression each, and G completions of each, sampled by our
    own generate(). Policy and reference differ."""

    def __init__(self, folder, seed, sizes, temperature, G):
        B = len(sizes)
        self.items, self.G = load_items(folder, sizes), G
        settings = {**TINY, "mllm": STAND_IN, "sam": str(ROOT / "tests/tiny/sam")}
        self.lens, processor = build_lens(SharedArgs(**settings))
        lens, tokenizer = self.lens.train(), processor.tokenizer
        self.forbidden = lens.forbidden
        lens.forbidden = torch.zeros_like(self.forbidden)        # TRL has none in its softmax
        self.reference = Reference(copy_mllm(lens.mllm, "fp32"), lens.forbidden)
        perturb(lens.mllm, seed)
        self.args = RLArgs(group_size=G, batch=B, micro_batch=2, alpha=0.0, beta=BETA,
                           clip_eps=CLIP, temperature=temperature, deviation="sample")
        collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, 2048)
        self.batch = collate(self.items)
        self.positions = prompt_positions(lens.mllm, self.batch)
        uniforms = draw_uniforms(seed, 0, range(B), G, LONGEST)
        self.samples = generate(lens.mllm, self.batch, self.positions, G, LONGEST, lens.eos,
                                self.forbidden, uniforms, temperature)
        self.completions, self.finished = self.samples.completions, self.samples.finished
        self.completions[1][1] = self.completions[1][1][:1]      # one of a single token
        self.finished[1][1] = False
        self.texts = [tokenizer.batch_decode(group, skip_special_tokens=True)
                      for group in self.completions]

    def hidden(self, mllm, positions, pixel_values, queries):
        """States (tokens, C) that predict the completions, and these (tokens,)."""
        packed = pack_groups(self.batch["ids"], positions, self.completions, self.lens.M)
        states = group_hidden(mllm, pixel_values, self.batch["grid_thw"], packed, queries)
        return states[packed.predictors], packed.targets


@dataclass
class OurPass:
    log_probs: torch.Tensor      # (tokens,) of all completions, one after another
    ref_log_probs: torch.Tensor
    entropy: torch.Tensor
    rewards: torch.Tensor        # (B, G)
    advantages: torch.Tensor     # (B, G)
    loss: float


def our_passes(w):
    """The batch as train_rl.train_on takes it, without the update. -> OurPass; gradients in
    w.lens"""
    passes = make_groups(w.lens, w.reference, w.batch, w.positions, w.samples, w.texts, w.args)
    parts, loss = [], 0.0
    for groups in passes:
        out = w.lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
                     groups.features, w.args.temperature)
        scores = score(out, groups, w.args)
        sums = backward_pass(out, groups, scores, w.args, world=1)
        loss += sums["loss"].item() / w.args.batch
        mask = groups.packed.mask
        parts.append((out["log_probs"][mask], groups.ref_log_probs[mask], out["entropy"][mask],
                      scores.reward, scores.advantages))
    return OurPass(*(torch.cat(part).detach() for part in zip(*parts)), loss)


def their_batch(w, trainer, rewards):
    """TRL's batch of the same; its prompts' tokens must be ours, id by id."""
    trainer.model.load_state_dict(w.lens.mllm.state_dict())
    completions = [completion.tolist() for group in w.completions for completion in group]
    out = hand_over(trainer, their_rows(w.items, w.G), completions, rewards.flatten())
    for n, (ids, mask) in enumerate(zip(out["prompt_ids"], out["prompt_mask"])):
        assert torch.equal(ids[mask.bool()], w.batch["ids"][n // w.G]), "their prompt is not ours"
    return out


def compare_group(folder, seed, sizes, temperature=1.0, attention="sdpa", G=GROUP_G, extras=False):
    """One batch through train_rl.py's functions and through TRL. -> {what: difference}"""
    w = GroupWorld(folder, seed, sizes, temperature, G)
    ours = our_passes(w)
    model = dict(attn_implementation=attention, dtype="float32")
    trainer = build_trainer(len(sizes) * G, G, folder / "trl", temperature=temperature,
                            max_completion_length=LONGEST, model_init_kwargs=model, **PAPER)
    out = their_batch(w, trainer, ours.rewards)
    mask = out["completion_mask"].bool()
    log_probs, entropy = their_log_probs(trainer, out)
    their_advantages = out["advantages"]
    out["advantages"] = ours.advantages.flatten()  # their rounding aside, see the page
    their_loss = trainer._compute_loss(trainer.model, out)
    their_loss.backward()
    patches = w.batch["pixel_values"].split(w.batch["grid_thw"].prod(-1).tolist())
    pixels = torch.cat([patches[n // G] for n in range(len(mask))])
    found = {"pixel values": difference(out["pixel_values"], pixels),
             "log-probs": difference(log_probs[mask], ours.log_probs),
             "reference": difference(out["ref_per_token_logps"][mask], ours.ref_log_probs),
             "entropy": difference(entropy[mask], ours.entropy),
             "advantages": difference(their_advantages, ours.advantages.flatten()),
             "loss": abs(their_loss.item() - ours.loss),
             "gradient": relative_norm(all_gradients(w.lens.mllm), all_gradients(trainer.model)),
             "largest log-prob": log_probs[mask].abs().max().item(),
             "policy to reference": difference(ours.log_probs, ours.ref_log_probs),
             "prompts": [len(ids) for ids in w.batch["ids"]],
             "completions": sorted(mask.sum(1).tolist())}
    if extras:
        found["faults"] = faults(w, log_probs[mask])
        found["float64"] = hidden_in_float64(w, trainer, out)
    return found


@torch.no_grad()
def faults(w, theirs):
    """How far from TRL the log-probabilities would be with a fault. -> {fault: difference}"""
    late = []
    for position in w.positions:
        moved = position.clone()
        moved[:, -1] += 1  # completions go on from the prompt's end
        late.append(moved)
    flat, nothing = context_positions(w.positions, "1d"), torch.zeros_like(w.forbidden)
    found = {}
    for name, positions, forbidden in (
            ("1-D positions", flat, nothing), ("completions one position late", late, nothing),
            ("forbidden tokens left out of the softmax", w.positions, w.forbidden)):
        hidden, targets = w.hidden(w.lens.mllm, positions, w.batch["pixel_values"], w.lens.queries)
        log_probs, _ = token_log_probs(w.lens.mllm.lm_head, hidden, targets, forbidden)
        found[name] = difference(log_probs, theirs)
    return found


def plain_norm(norm, x):
    """RMSNorm without its own cast to float32."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * x * scale


@torch.no_grad()
def hidden_in_float64(w, trainer, out):
    """Both passes in float64, where no rounding hides a fault: the largest difference of the last
    hidden states that predict the completions."""
    kept = []

    def keep(module, arguments, output):
        kept.append(output.last_hidden_state)
    ours, theirs = copy.deepcopy(w.lens.mllm).double(), trainer.model.double()
    hook = theirs.model.register_forward_hook(keep)
    with mock.patch.object(Qwen2_5_VLRMSNorm, "forward", plain_norm):
        their_log_probs(trainer, {**out, "pixel_values": out["pixel_values"].double()})
        hidden, _ = w.hidden(ours, w.positions, w.batch["pixel_values"].double(),
                             w.lens.queries.double())
    hook.remove()
    P, mask = out["prompt_ids"].shape[1], out["completion_mask"].bool()
    predicting = kept[0][:, P - 1:-1][mask]
    assert predicting.dtype == hidden.dtype == torch.float64
    return difference(predicting, hidden)


def part_group(args, folder):
    """-> {case: {what: difference}}"""
    write_shapes_world(folder, splits={"train": 8})
    if args.quick:
        return {"two sizes": compare_group(folder, args.seed, SIZES[:2], G=2, extras=True)}
    results = {}
    for name, case in CASES.items():
        results[name] = compare_group(folder, args.seed, extras=name == "four sizes", **case)
    return results


# --- 3. What a policy pass costs ------------------------------------------------------------------

EVEN, MIXED = [200] * 8, [50, 93, 136, 179, 221, 264, 307, 350]  # both 1,600 tokens
# name -> picture's height and width in tokens, other tokens of the prompt, completions
SETTINGS = {"P = 1,200, completions of 200": ((25, 40), 200, EVEN),
            "P = 1,200, completions of 50 to 350": ((25, 40), 200, MIXED),
            "P = 500, completions of 200": ((15, 20), 200, EVEN)}
QUICK_SETTINGS = {"P = 84, completions of 4 to 12": ((6, 8), 36, [4, 6, 8, 12])}
V, M = 2048, 64
IMAGE, START, END = V - 1, V - 2, V - 3


def build_mllm(seed):
    """Qwen2.5-VL of few, wide layers: real code, of a size for one core, its parts' shares of the
    arithmetic near those of the 3B model (tests/benchmark.py)."""
    torch.manual_seed(seed)
    text = dict(vocab_size=V, hidden_size=256, intermediate_size=2560, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
                pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                                     mrope_section=[8, 12, 12]))
    vision = dict(depth=2, hidden_size=128, intermediate_size=1024, num_heads=2, patch_size=14,
                  window_size=224, out_hidden_size=256, fullatt_block_indexes=[])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE,
                              video_token_id=V - 4, vision_start_token_id=START,
                              vision_end_token_id=END, tie_word_embeddings=True)
    made = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return made.float().train()


class CostWorld:
    """One prompt with its picture and G completions, for both sides: equal models, equal tensors.
    Advantages and reference log-probabilities are given."""

    def __init__(self, picture, words, lengths, seed, folder):
        from trl.trainer.utils import add_fused_lm_head
        g = torch.Generator().manual_seed(seed)
        h, w = picture
        G = len(lengths)

        def draw(n):
            return torch.randint(0, V - 8, (n,), generator=g)
        image = torch.full((h * w,), IMAGE)
        ids = torch.cat([draw(20), torch.tensor([START]), image, torch.tensor([END]),
                         draw(words - 22)])
        self.types = (ids == IMAGE).long()
        self.batch = {"ids": [ids], "types": [self.types],
                      "grid_thw": torch.tensor([[1, 2 * h, 2 * w]]),
                      "pixel_values": torch.randn(4 * h * w, 1176, generator=g)}
        self.completions = [draw(n) for n in lengths]
        self.lengths = torch.tensor(lengths)
        self.mask = torch.arange(max(lengths)) < self.lengths[:, None]       # (G, T)
        self.ref = torch.full(self.mask.shape, -7.6)                         # about -log V
        self.advantages = torch.linspace(-1.5, 1.5, G)
        self.ours, self.theirs = build_mllm(seed), build_mllm(seed)
        self.positions = prompt_positions(self.ours, self.batch)
        self.queries = torch.nn.Parameter(0.02 * torch.randn(M, 256, generator=g))
        self.forbidden = torch.zeros(V, dtype=torch.bool)
        add_fused_lm_head(self.theirs, temperature=1.0, outputs=("log_probs", "entropy"))
        self.trainer = build_trainer(G, G, folder, num_iterations=1, **PAPER)

    def zero_grad(self):
        self.ours.zero_grad()
        self.theirs.zero_grad()
        self.queries.grad = None


def our_policy_pass(w, queries=None):
    """Forward and backward of the packed group. -> loss. With queries (M, C), their states get a
    gradient too."""
    packed = pack_groups(w.batch["ids"], w.positions, [w.completions],
                         0 if queries is None else M)
    hidden = group_hidden(w.ours, w.batch["pixel_values"], w.batch["grid_thw"], packed, queries)
    log_probs, _ = token_log_probs(w.ours.lm_head, hidden[packed.predictors], packed.targets,
                                   w.forbidden)
    log_probs = completion_table(log_probs, packed.mask)
    loss, _ = grpo_loss(log_probs, log_probs, w.ref, w.advantages, packed.mask, CLIP, BETA)
    states = 0.0 if queries is None else hidden[packed.queries].mean()
    (loss + states).backward()
    return loss.item()


def their_policy_pass(w, n, compact):
    """Forward and backward by TRL's _compute_loss, n samples at a time. -> loss. compact: its
    lm_head takes completion tokens alone, as on a GPU; on a CPU it takes every position."""
    from trl.trainer import utils
    G, T, P = len(w.completions), w.mask.shape[1], len(w.batch["ids"][0])
    patches = w.batch["pixel_values"]
    padded = pad_sequence(w.completions, batch_first=True)                   # (G, T)
    w.trainer.current_gradient_accumulation_steps = G // n
    total = 0.0
    for start in range(0, G, n):
        some = slice(start, start + n)
        if n < G:  # samples by themselves are as long as their longest
            T = int(w.lengths[some].max())
        types = torch.cat([w.types, torch.zeros(T, dtype=torch.long)])
        inputs = {"prompt_ids": w.batch["ids"][0].repeat(n, 1),
                  "prompt_mask": torch.ones(n, P, dtype=torch.long),
                  "completion_ids": padded[some, :T],
                  "completion_mask": w.mask[some, :T].long(), "advantages": w.advantages[some],
                  "ref_per_token_logps": w.ref[some, :T], "pixel_values": patches.repeat(n, 1),
                  "image_grid_thw": w.batch["grid_thw"].repeat(n, 1), "num_images": [1] * n,
                  "mm_token_type_ids": types.repeat(n, 1)}
        with mock.patch.object(utils, "_use_triton", lambda device: compact):
            loss = w.trainer._compute_loss(w.theirs, inputs)
        loss.backward()
        total += loss.item()
    return total


def run_way(w, way):
    """-> loss"""
    G = len(w.completions)
    if way == "ours":
        return our_policy_pass(w)
    if way == "ours, 64 queries":
        return our_policy_pass(w, w.queries)
    if way == "TRL, padded batch":
        return their_policy_pass(w, G, compact=False)
    if way == "TRL, lm_head as on a GPU":
        return their_policy_pass(w, G, compact=True)
    return their_policy_pass(w, 1, compact=True)


WAYS = ("ours", "ours, 64 queries", "TRL, padded batch", "TRL, lm_head as on a GPU",
        "TRL, one at a time")


def measure_cost(setting, repetitions, seed, folder):
    """-> {"loss", "gradient": TRL's largest difference from ours, "ways": {way: {seconds, ratio to
    ours in the same round: median, least, most}}}"""
    w = CostWorld(*setting, seed, folder)
    expected, worst = {}, {"loss": 0.0, "gradient": 0.0}
    for way in WAYS:                                             # checks, and warms up
        w.zero_grad()
        loss = run_way(w, way)
        if way == "ours":
            expected = {"loss": loss, "gradient": all_gradients(w.ours).clone()}
        if way.startswith("TRL"):
            gradient = relative_norm(all_gradients(w.theirs), expected["gradient"])
            worst["loss"] = max(worst["loss"], abs(loss - expected["loss"]))
            worst["gradient"] = max(worst["gradient"], gradient)
    seconds = {way: [] for way in WAYS}
    for _ in range(repetitions):                                 # A B C A B C: the machine drifts
        for way in WAYS:
            w.zero_grad()
            start = process_time()
            run_way(w, way)
            seconds[way].append(process_time() - start)
    ways = {}
    for way, times in seconds.items():
        ratios = [time / ours for time, ours in zip(times, seconds["ours"])]
        ways[way] = {"seconds": statistics.median(times), "ratio": statistics.median(ratios),
                     "least": min(ratios), "most": max(ratios)}
    return {**worst, "ways": ways}


def part_cost(args, folder):
    settings = QUICK_SETTINGS if args.quick else SETTINGS
    repetitions = 2 if args.quick else args.repetitions
    results = {"repetitions": repetitions}
    for name, setting in settings.items():
        results[name] = measure_cost(setting, repetitions, args.seed, folder)
        print(f"timed: {name}", flush=True)
    return results


# --- The report -----------------------------------------------------------------------------------

def over_limits(data):
    """-> lines about whatever differs by more than LIMITS allows"""
    checked = []
    for dtype, kind in (("torch.float32", "stored"), ("torch.float64", "stored in float64")):
        for policy, found in data["stored"]["compared"][dtype].items():
            checked.append((f"stored tensors, {dtype}, {policy}", LIMITS[kind], found))
    for name, found in data["group"].items():
        checked.append((name, LIMITS["group"], found))
        if "float64" in found:
            checked.append((name, LIMITS["float64"], {"hidden states": found["float64"]}))
    for name, found in data["cost"].items():
        if name != "repetitions":
            checked.append((name, LIMITS["cost"], found))
    lines = []
    for where, limits, found in checked:
        for what, limit in limits.items():
            if not found[what] <= limit:
                lines.append(f"{where}: {what} differ by {found[what]:.1e}, more than {limit:.0e}")
    return lines


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def stored_tables(stored):
    policies = ("on-policy", "off-policy")
    columns = [(dtype, policy) for dtype in stored["compared"] for policy in policies]
    rows = []
    for what in stored["compared"]["torch.float32"]["on-policy"]:
        limits = [LIMITS[kind].get(what) for kind in ("stored", "stored in float64")]
        cells = [f"{stored['compared'][dtype][policy][what]:.1e}" for dtype, policy in columns]
        rows.append([what, *cells, ", ".join(f"{x:.0e}" for x in limits if x is not None)])
    header = ["", *(f"{dtype.removeprefix('torch.')}, {policy}" for dtype, policy in columns),
              "limit (then float64)"]
    defaults = [[name, *(f"{found[policy]:.1e}" for policy in policies)]
                for name, found in stored["defaults"].items()]
    return table(header, rows), table(["TRL's default", *policies], defaults)


def group_table(results):
    rows = []
    for what, limit in LIMITS["group"].items():
        cells = [f"{found[what]:.1e}" for found in results.values()]
        rows.append([what, *cells, f"{limit:.0e}"])
    rows.append(["(largest log-prob)",
                 *(f"{found['largest log-prob']:.1f}" for found in results.values()), ""])
    rows.append(["(policy to reference)",
                 *(f"{found['policy to reference']:.2f}" for found in results.values()), ""])
    return table(["", *results, "limit"], rows)


def cost_table(results):
    rows = []
    for name, found in results.items():
        if name == "repetitions":
            continue
        for way, row in found["ways"].items():
            queries = row["ratio"] / found["ways"]["ours, 64 queries"]["ratio"]
            rows.append([name, way, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}",
                         f"{row['least']:.2f} to {row['most']:.2f}", f"{queries:.2f}"])
    return table(["setting", "way", "seconds", "to ours", "least to most",
                  "to ours with queries"], rows)


def page(data):
    """docs/peers.md"""
    stored, results = data["stored"], data["group"]
    compared, defaults = stored_tables(stored)
    special = next(found for found in results.values() if "faults" in found)
    fault_lines = [f"- {name}: {value:.2g}" for name, value in special["faults"].items()]
    own = ", ".join(f"`{name}` {value!r}" for name, value in stored["trl_defaults"].items())
    lengths = " and ".join(str(n) for n in (min(special["completions"]),
                                            max(special["completions"])))
    lines = [
        "# A peer as oracle: TRL's GRPOTrainer", "",
        f"`PYTHONPATH=SITE python tests/peers.py`, {data['minutes']:.0f} minutes, seed "
        f"{data['seed']}: {data['machine']}, one thread; TRL {data['trl']}, transformers "
        f"{data['transformers']}, torch {data['torch']}, Python {data['python']}. TRL is no "
        "dependency of this project. To make this page again, install it into a folder SITE:", "",
        "```bash", INSTALL, "PYTHONPATH=SITE python tests/peers.py", "```", "",
        "TRL's own trainer runs. It gets the same completions and rewards as our code, and for "
        "the first table the same stored log-probabilities. Everything else is its own code. Each "
        "difference is the largest of all elements.", "",
        "## Advantages, loss and gradient on stored tensors", "",
        f"{STORED_B} groups of G = {STORED_G}, T = {STORED_T}, {stored['seeds']} seeds: one group "
        "of equal rewards, one with a single right answer, one completion of full length, one "
        "without a token. TRL is set to the paper's loss; ours to the sample deviation "
        "(`correction=1`), which TRL cannot switch off. `advantages` leaves the group of equal "
        "rewards out. `loss`, `gradient` and `clip fraction` are with TRL's advantages in both; "
        "`own advantages` with each one's own.", "", *compared,
        "The two are one loss. What is left with own advantages is the group of equal rewards: "
        "the mean of equal numbers is not always that number, and TRL divides this rounding by "
        "about delta, while ours gives exactly 0. A NaN behind the mask gives TRL "
        f"{stored['nan']['theirs']} NaN gradients and ours {stored['nan']['ours']}.", "",
        "## Where TRL's defaults are not the paper", "",
        f"TRL {data['trl']} by itself: {own}. Each row takes one of its defaults and leaves the "
        "rest at the paper's: the distance of the gradient from the paper's, over the paper's "
        "norm, in log-probabilities (float32, the largest over the seeds). Lengths here are 0 to "
        f"{STORED_T}; the mean over all tokens matters the less the more equal they are.", "",
        *defaults,
        "## The packed group forward on the stand-in", "",
        f"{len(special['prompts'])} pictures of the shapes world, the stand-in's MLLM with every "
        "weight moved by 2 %, so that policy and reference differ. Ours: `make_groups`, "
        f"`Lens.forward` with M = {TINY['num_queries']} queries, `score` and `backward_pass` of "
        "train_rl.py, two prompts to a pass, alpha 0, nothing forbidden. Theirs: the G copies "
        "of each prompt, tokenised by TRL from messages and picture, padded on the left. Prompts "
        f"of {min(special['prompts'])} to {max(special['prompts'])} tokens and completions "
        f"between {lengths} in the column with pictures of different sizes. Rewards are those "
        "of our own pass, from which each makes its own advantages; loss and gradient are then "
        "taken with ours in both, because with a ratio of 1 the loss is little more than the "
        "advantages' mean. `gradient` is the norm of the difference over the norm, all of the "
        "MLLM.", "", *group_table(results),
        f"In float64 the hidden states that predict the completions differ by "
        f"{special['float64']:.1e}, so what stands in the table is rounding. What else would show "
        "in the log-probabilities (two faults, and our choice to leave forbidden tokens out of the "
        "softmax in training as in sampling, switched off above):", "", *fault_lines, "",
        "## What a policy pass costs", "",
        "Forward and backward of the policy over one group, the same random weights and tensors, "
        "no gradient checkpointing of layers, advantages and reference given: CPU time of the one "
        f"thread, median of {data['cost']['repetitions']} interleaved rounds; `to ours` is the "
        "median of the ratios within a round. The model is Qwen2.5-VL's code with few and wide "
        "layers (hidden size 256, V = 2,048). `ours` does what TRL does; `ours, 64 queries` "
        "carries the context queries of every completion as well, which TRL has no need of. On a "
        "CPU TRL's lm_head takes every position; on a GPU it takes the completions' alone, and so "
        "it does in the last two ways. Before they are timed, losses and gradients are compared: "
        f"{worst_of(data['cost'], 'loss')} and {worst_of(data['cost'], 'gradient')} (of the norm) "
        "at most.", "", *cost_table(data["cost"]),
        "TRL runs prompt and picture once for every sample, ours once for the group: with 8 "
        "completions of 200 that is 8 (P + 200) positions against P + 1,600, and 8 pictures "
        "against one. The ratio grows with P. It was not measured on a GPU."]
    return "\n".join(lines).rstrip() + "\n"


def worst_of(cost, name):
    return f"{max(found[name] for key, found in cost.items() if key != 'repetitions'):.1e}"


def machine():
    """The processor's name, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(args):
    """-> all that docs/peers.json holds"""
    began = perf_counter()
    data = {"trl": load_trl(), "transformers": transformers.__version__,
            "torch": torch.__version__, "python": platform.python_version(),
            "machine": machine(), "seed": args.seed}
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("stored", part_stored), ("group", part_group), ("cost", part_cost)):
            data[name] = part(args, Path(folder))
            print(f"{perf_counter() - began:5.0f} s  {name}", flush=True)
    data["minutes"] = (perf_counter() - began) / 60
    return data


def main():
    [args] = parse_settings([PeersArgs], {}, __doc__.splitlines()[0])
    torch.set_num_threads(1)
    path = ROOT / "docs/peers.json"
    data = json.loads(path.read_text()) if args.page else measure(args)
    text = page(data)
    print(text)
    if not args.quick:
        path.write_text(json.dumps(data, indent=1) + "\n")
        (ROOT / "docs/peers.md").write_text(text)
    missed = over_limits(data)
    if missed:
        raise LensError("; ".join(missed))


if __name__ == "__main__":
    run(main)
