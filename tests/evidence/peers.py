"""GRPO and the packed group forward beside a peer, TRL's own GRPOTrainer: numbers and costs.

    pip install --target SITE --no-deps trl==1.16.0 accelerate datasets pyarrow pandas \\
        python-dateutil six dill multiprocess xxhash psutil
    PYTHONPATH=SITE python tests/evidence/peers.py           # about half an hour of one core
    PYTHONPATH=SITE python tests/evidence/peers.py --quick   # tiny sizes, a minute; writes nothing
    python tests/evidence/peers.py --page                    # only peers.md, from peers.json

TRL is no dependency of this project. Its trainer is a real one, with its own methods for prompts,
advantages, log-probabilities and loss. Three things are replaced: `_generate`, so that it takes
given completions; the reward function, which returns given rewards; and, for the stored tensors,
`_get_per_token_logps_and_entropies`, which returns stored log-probabilities. These are private
names of TRL, and another release may move them, hence the version.

    1  stored tensors   grpo.py: advantages, loss, gradient, clipped share; then each of TRL's
                        defaults that the paper does not share, and how far it moves the gradient
    2  the stand-in     make_micro_batches, Lens.forward, score and backward as train_rl.py calls
                        them (alpha 0, nothing forbidden), against TRL with the same images,
                        expressions, completions and rewards
    3  the cost         forward and backward of one group of G = 8, in interleaved runs of one
                        process; the CPU time of its one thread

Writes docs/evidence/peers.json and peers.md.

Letters: B prompts, G completions per prompt, N = B * G, P prompt tokens, T completion tokens,
M context queries, V vocabulary, C hidden size.
"""
import argparse
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from benchmark import EVEN, MIXED, M, V, build_mllm, machine, random_prompt, random_words
from tiny_runs import EVIDENCE, ROOT, markdown_table, read_json, write_json
from torch.nn.utils.rnn import pad_sequence
from world import write_shapes_world

from align import TINY, SharedArgs
from data import Collator, load_item, read_records
from grpo import completion_table, group_advantages, grpo_loss, pack_groups, token_log_probs
from model import build_lens, context_positions, group_hidden, prompt_positions
from rewards import chat_messages
from train_rl import (Reference, RLArgs, backward, completion_texts, copy_mllm, draw_uniforms,
                      generate, make_micro_batches, score)

INSTALL = ("pip install --target SITE --no-deps trl==1.16.0 accelerate datasets pyarrow pandas "
           "python-dateutil six dill multiprocess xxhash psutil")
CLIP, BETA, SEED, REPETITIONS = 0.2, 0.04, 0, 3
STAND_IN = str(ROOT / "tests/tiny/mllm")
# TRL's settings for what the paper does, as far as they exist: none gives the 1/G of Eq. 6
PAPER = dict(loss_type="grpo", beta=BETA, epsilon=CLIP, scale_rewards="group",
             importance_sampling_level="token", use_bias_correction_kl=False)


def build_trainer(N, G, folder, **settings):
    """A real GRPOTrainer on the stand-in, for N completions in groups of G. What it "samples" and
    the rewards come from hand_over."""
    import datasets.arrow_dataset
    from trl import GRPOConfig, GRPOTrainer
    rewards = []

    def stored_reward(completions, **kwargs):
        return list(rewards)
    args = GRPOConfig(output_dir=str(folder), per_device_train_batch_size=N, num_generations=G,
                      gradient_accumulation_steps=1, use_cpu=True, bf16=False,
                      gradient_checkpointing=False, report_to=[], **settings)
    prompts = [[{"role": "user", "content": "x"}]] * N
    # datasets pickles everything for the name of a cache file, and not everything can be pickled
    with mock.patch.object(datasets.arrow_dataset, "generate_fingerprint", lambda _: "fixed"):
        train = datasets.Dataset.from_dict({"prompt": prompts})
    trainer = GRPOTrainer(model=STAND_IN, reward_funcs=stored_reward, args=args,
                          train_dataset=train)
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer's loop, which does not run
    trainer.stored_rewards = rewards
    trainer.model.train()
    return trainer


def hand_over(trainer, rows, completions, rewards):
    """Let TRL "sample" these completions, N lists of ids, for rows of {"prompt", "image"}, with
    these rewards (N,). -> its batch"""
    def sample(prompts):
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        texts = [[{"role": "assistant", "content": "x"}]] * len(completions)
        return prompt_ids, completions, None, texts, None, {}, images, None
    trainer._generate = sample
    trainer.stored_rewards[:] = rewards.tolist()
    return trainer._generate_and_score_completions(rows)


def difference(a, b):
    """The largest, over all elements."""
    return (a.detach().double() - b.detach().double()).abs().max().item()


def relative_norm(gradient, expected):
    """|gradient - expected| / |expected|"""
    return ((gradient - expected).norm() / expected.norm()).item()


def all_gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


# --- 1. Stored tensors ----------------------------------------------------------------------------

STORED_B, STORED_G, STORED_T = 6, 8, 37


def draw_stored(seed, dtype, off_policy):
    """Log-probabilities (N, T) of six groups, their rewards (B, G) and their mask (N, T).

    The second group has equal rewards (0.1, whose mean is not exact), the third one right
    completion; one completion has full length, one no token. On-policy, `old` is None, and both
    sides take log_probs without gradient."""
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
    return SimpleNamespace(log_probs=log_probs.to(dtype), old=old.to(dtype) if off_policy else None,
                           ref=ref.to(dtype), rewards=rewards,
                           mask=torch.arange(T) < lengths[:, None])


def their_step(trainer, stored):
    """TRL on stored tensors -> advantages (N,), loss, its gradient (N, T), clipped share"""
    leaf = stored.log_probs.clone().requires_grad_()

    def log_probs(model, *inputs, compute_entropy=False, **kwargs):
        if model is trainer.ref_model:
            return stored.ref, None, None
        if not compute_entropy:                              # this forward asks for the old ones
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
    return SimpleNamespace(advantages=out["advantages"], loss=loss.detach(), gradient=leaf.grad,
                           clipped=clipped)


def our_step(stored, deviation="population", advantages=None):
    """grpo.py on stored tensors -> the same four"""
    leaf = stored.log_probs.clone().requires_grad_()
    old = leaf if stored.old is None else stored.old
    if advantages is None:
        advantages = group_advantages(stored.rewards, deviation).flatten()
    loss, stats = grpo_loss(leaf, old, stored.ref, advantages, stored.mask, CLIP, BETA)
    loss.backward()
    return SimpleNamespace(advantages=advantages, loss=loss.detach(), gradient=leaf.grad,
                           clipped=stats["clip_fraction"].item())


def compare_stored(trainer, seeds, dtype, off_policy):
    """-> {what: the largest difference over the seeds}, with TRL set to the paper"""
    largest = {}
    others = torch.arange(STORED_B) != 1  # all but the group of equal rewards
    for seed in seeds:
        stored = draw_stored(seed, dtype, off_policy)
        theirs = their_step(trainer, stored)
        ours = our_step(stored, "sample")
        same = our_step(stored, advantages=theirs.advantages)
        their_groups = theirs.advantages.view(STORED_B, STORED_G)
        our_groups = ours.advantages.view(STORED_B, STORED_G)
        values = {"advantages": difference(their_groups[others], our_groups[others]),
                  "loss": difference(theirs.loss, same.loss),
                  "gradient": difference(theirs.gradient, same.gradient),
                  "clip fraction": abs(theirs.clipped - same.clipped),
                  "loss, own advantages": difference(theirs.loss, ours.loss),
                  "gradient, own advantages": difference(theirs.gradient, ours.gradient),
                  "largest loss": theirs.loss.abs().item(),
                  "largest gradient": theirs.gradient.abs().max().item()}
        largest = {name: max(value, largest.get(name, 0)) for name, value in values.items()}
    return largest


# name -> the settings of PAPER that are left at TRL's default, and the deviation of Eq. 6 in ours
DEFAULTS = {
    "sample deviation, 1/(G-1); Eq. 6 has 1/G": ([], "population"),
    "`loss_type`: a mean over all tokens; Eq. 10 means every completion first": (
        ["loss_type"], "sample"),
    "`beta`: no KL": (["beta"], "sample"),
    "`use_bias_correction_kl`: the KL times the ratio": (["use_bias_correction_kl"], "sample"),
    "all of them, TRL as it comes": (list(PAPER), "population")}


def trl_defaults():
    """-> TRL's own defaults of what PAPER sets"""
    from trl import GRPOConfig
    return {name: GRPOConfig.__dataclass_fields__[name].default for name in PAPER}


def compare_defaults(build, seeds):
    """-> {TRL's default: {policy: the largest distance of its gradient from the paper's, over the
    paper's norm}}"""
    table = {}
    for name, (left, deviation) in DEFAULTS.items():
        table[name] = {}
        settings = {field: trl_defaults()[field] for field in left}
        for policy, off_policy in (("on-policy", False), ("off-policy", True)):
            trainer, largest = build(off_policy, settings), 0
            for seed in seeds:
                stored = draw_stored(seed, torch.float32, off_policy)
                theirs, ours = their_step(trainer, stored), our_step(stored, deviation)
                largest = max(largest, relative_norm(theirs.gradient, ours.gradient))
            table[name][policy] = largest
    return table


def compare_on_stored_tensors(quick, folder):
    seeds = range(SEED, SEED + (2 if quick else 20))

    def build(off_policy, settings):
        # two iterations over a batch make TRL ask for the old log-probabilities
        return build_trainer(STORED_B * STORED_G, STORED_G, folder, num_iterations=1 + off_policy,
                             mask_truncated_completions=True, **{**PAPER, **settings})
    trainers = {"on-policy": build(False, {}), "off-policy": build(True, {})}
    compared = {str(dtype): {policy: compare_stored(trainer, seeds, dtype, policy == "off-policy")
                             for policy, trainer in trainers.items()}
                for dtype in (torch.float32, torch.float64)}
    return {"seeds": len(seeds), "compared": compared, "defaults": compare_defaults(build, seeds),
            "trl_defaults": trl_defaults()}


# --- 2. The group forward on the stand-in ---------------------------------------------------------

SIZES = [(128, 128), (200, 96), (72, 160), (256, 256)]       # of the images
CASES = {"one size": dict(sizes=SIZES[:1] * 4),
         "four sizes": dict(sizes=SIZES),
         "four sizes, their attention eager": dict(sizes=SIZES, attention="eager"),
         "four sizes, temperature 0.7": dict(sizes=SIZES, temperature=0.7)}
GROUP_G, LONGEST = 4, 48


def perturb(mllm, seed):
    """Move every weight by 2 % of its tensor's deviation: policy and reference differ."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mllm.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=g)


class GroupWorld:
    """The stand-in, B images with an expression each, and G sampled completions of each prompt."""

    def __init__(self, folder, sizes, temperature, G):
        records = read_records(folder, ["shapes"], ["train"])
        self.items, self.G = [load_item(record, 0) for record in records[:len(sizes)]], G
        for item, size in zip(self.items, sizes):
            item["image"] = item["image"].resize(size)
        settings = {**TINY, "mllm": STAND_IN, "sam": str(ROOT / "tests/tiny/sam")}
        self.lens, processor = build_lens(SharedArgs(**settings))
        lens = self.lens.train()
        self.forbidden = lens.forbidden
        lens.forbidden = torch.zeros_like(self.forbidden)    # TRL has none in its softmax
        self.reference = Reference(copy_mllm(lens.mllm, "fp32"), lens.forbidden)
        perturb(lens.mllm, SEED)
        self.args = RLArgs(group_size=G, batch=len(sizes), micro_batch=2, alpha=0.0, beta=BETA,
                           clip_eps=CLIP, temperature=temperature, deviation="sample")
        collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, 2048)
        self.batch = collate(self.items)
        self.positions = prompt_positions(lens.mllm, self.batch)
        uniforms = draw_uniforms(SEED, 0, range(len(sizes)), G, LONGEST)
        self.samples = generate(lens.mllm, self.batch, self.positions, G, LONGEST, lens.eos,
                                self.forbidden, uniforms, temperature)
        completions = self.samples.completions
        completions[1][1], self.samples.finished[1][1] = completions[1][1][:1], False
        self.texts = completion_texts(lens, self.samples, processor.tokenizer)


def our_update(w):
    """The batch as train_rl.update takes it, without the optimizer. -> log-probabilities, those
    under the reference, entropies (tokens,) each; rewards, advantages (B, G) each; loss. The
    gradients are in w.lens."""
    parts, loss = [], 0.0
    for micro in make_micro_batches(w.lens, w.reference, w.batch, w.positions, w.samples, w.texts,
                                    w.args):
        out = w.lens(micro.batch["pixel_values"], micro.batch["grid_thw"], micro.packed,
                     micro.features, w.args.temperature)
        score(out, micro, w.args)
        loss += backward(out, micro, w.args, world=1)["loss"].item() / w.args.batch
        mask = micro.packed.mask
        parts.append((out["log_probs"][mask], micro.ref_log_probs[mask], out["entropy"][mask],
                      micro.reward, micro.advantages))
    return *(torch.cat(part).detach() for part in zip(*parts)), loss


def their_batch(w, trainer, rewards):
    """TRL's batch of the same groups, from messages and images as a user of TRL would write them.
    Its prompts must be ours, token by token."""
    rows = []
    for item in w.items:
        system, user = chat_messages(item["expression"])
        prompt = [{"role": "system", "content": system["content"][0]["text"]},
                  {"role": "user", "content": user["content"][1]["text"]}]
        rows += [{"prompt": prompt, "image": item["image"]}] * w.G
    completions = [ids.tolist() for group in w.samples.completions for ids in group]
    trainer.model.load_state_dict(w.lens.mllm.state_dict())
    out = hand_over(trainer, rows, completions, rewards.flatten())
    for n, (ids, mask) in enumerate(zip(out["prompt_ids"], out["prompt_mask"])):
        assert torch.equal(ids[mask.bool()], w.batch["prompt_ids"][n // w.G]), "not our prompt"
    return out


def their_log_probs(trainer, out):
    """TRL's policy forward over its padded batch. -> log-probabilities and entropies (N, T)"""
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")
    log_probs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, torch.cat([out["prompt_ids"], out["completion_ids"]], 1),
        torch.cat([out["prompt_mask"], out["completion_mask"]], 1), out["completion_ids"].shape[1],
        compute_entropy=True, **{name: out[name] for name in names})
    return log_probs, entropy


def compare_group(folder, sizes, temperature=1.0, attention="sdpa", G=GROUP_G, with_faults=False):
    """One batch through train_rl.py's functions and through TRL. -> {what: difference}"""
    w = GroupWorld(folder, sizes, temperature, G)
    log_probs, ref_log_probs, entropy, rewards, advantages, loss = our_update(w)
    trainer = build_trainer(len(sizes) * G, G, folder / "trl", temperature=temperature,
                            max_completion_length=LONGEST, model_init_kwargs=dict(
                                attn_implementation=attention, dtype="float32"), **PAPER)
    out = their_batch(w, trainer, rewards)
    mask = out["completion_mask"].bool()
    theirs, their_entropy = their_log_probs(trainer, out)
    their_advantages = out["advantages"]
    out["advantages"] = advantages.flatten()                 # their rounding aside, see the page
    their_loss = trainer._compute_loss(trainer.model, out)
    their_loss.backward()
    patches = w.batch["pixel_values"].split(w.batch["grid_thw"].prod(-1).tolist())
    pixels = torch.cat([patches[n // G] for n in range(len(mask))])
    result = {"pixel values": difference(out["pixel_values"], pixels),
              "log-probs": difference(theirs[mask], log_probs),
              "reference": difference(out["ref_per_token_logps"][mask], ref_log_probs),
              "entropy": difference(their_entropy[mask], entropy),
              "advantages": difference(their_advantages, advantages.flatten()),
              "loss": abs(their_loss.item() - loss),
              "gradient": relative_norm(all_gradients(w.lens.mllm), all_gradients(trainer.model)),
              "largest log-prob": theirs[mask].abs().max().item(),
              "policy to reference": difference(log_probs, ref_log_probs),
              "prompts": [len(ids) for ids in w.batch["prompt_ids"]],
              "completions": sorted(mask.sum(1).tolist())}
    if with_faults:
        result["faults"] = faults(w, theirs[mask])
    return result


@torch.no_grad()
def faults(w, theirs):
    """How far from TRL the log-probabilities would be with a fault. -> {fault: difference}"""
    late = []
    for position in w.positions:
        moved = position.clone()
        moved[:, -1] += 1                                    # completions count on from here
        late.append(moved)
    flat, none = context_positions(w.positions, "released"), torch.zeros_like(w.forbidden)
    result = {}
    for name, positions, forbidden in (
            ("1-D positions", flat, none), ("completions one position late", late, none),
            ("forbidden tokens left out of the softmax", w.positions, w.forbidden)):
        packed = pack_groups(w.batch["prompt_ids"], positions, w.samples.completions, w.lens.M)
        hidden = group_hidden(w.lens.mllm, w.batch["pixel_values"], w.batch["grid_thw"], packed,
                              w.lens.queries)
        log_probs, _ = token_log_probs(w.lens.mllm.lm_head, hidden[packed.target_places],
                                       packed.targets, forbidden)
        result[name] = difference(log_probs, theirs)
    return result


def compare_on_stand_in(quick, folder):
    write_shapes_world(folder, splits={"train": 8})
    if quick:
        return {"two sizes": compare_group(folder, SIZES[:2], G=2, with_faults=True)}
    return {name: compare_group(folder, with_faults=name == "four sizes", **case)
            for name, case in CASES.items()}


# --- 3. What the policy's forward and backward cost -----------------------------------------------

# name -> the image's height and width in tokens, words of the prompt, lengths of the completions
SETTINGS = {"P = 1,200, completions of 200": ((25, 40), 200, EVEN),
            "P = 1,200, completions of 50 to 350": ((25, 40), 200, MIXED),
            "P = 500, completions of 200": ((15, 20), 200, EVEN)}
QUICK_SETTINGS = {"P = 84, completions of 4 to 12": ((6, 8), 36, [4, 6, 8, 12])}
WAYS = ("ours", "ours, 64 queries", "TRL, padded batch", "TRL, lm_head as on a GPU",
        "TRL, one at a time")


class CostWorld:
    """One prompt with its image and G completions, for both sides: equal models, equal tensors.
    Advantages and reference log-probabilities are given."""

    def __init__(self, image, words, lengths, folder):
        from trl.trainer.utils import add_fused_lm_head
        g, G = torch.Generator().manual_seed(SEED), len(lengths)
        self.batch = random_prompt(image, words, g)
        self.completions = [random_words(n, g) for n in lengths]
        self.mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]      # (G, T)
        self.ref = torch.full(self.mask.shape, -7.6)                                 # about -log V
        self.advantages = torch.linspace(-1.5, 1.5, G)
        self.ours, self.theirs = build_mllm(SEED).train(), build_mllm(SEED).train()
        self.positions = prompt_positions(self.ours, self.batch)
        self.queries = torch.nn.Parameter(0.02 * torch.randn(M, 256, generator=g))
        add_fused_lm_head(self.theirs, temperature=1.0, outputs=("log_probs", "entropy"))
        self.trainer = build_trainer(G, G, folder, num_iterations=1, **PAPER)

    def zero_grad(self):
        self.ours.zero_grad()
        self.theirs.zero_grad()
        self.queries.grad = None


def our_policy(w, queries=None):
    """Forward and backward of the packed group. -> loss. With queries (M, C), their states get a
    gradient too."""
    packed = pack_groups(w.batch["prompt_ids"], w.positions, [w.completions],
                         0 if queries is None else M)
    hidden = group_hidden(w.ours, w.batch["pixel_values"], w.batch["grid_thw"], packed, queries)
    log_probs, _ = token_log_probs(w.ours.lm_head, hidden[packed.target_places], packed.targets,
                                   torch.zeros(V, dtype=torch.bool))
    log_probs = completion_table(log_probs, packed.mask)
    loss, _ = grpo_loss(log_probs, log_probs, w.ref, w.advantages, packed.mask, CLIP, BETA)
    states = 0.0 if queries is None else hidden[packed.query_places].mean()
    (loss + states).backward()
    return loss.item()


def their_policy(w, n, compact):
    """Forward and backward by TRL's _compute_loss, n samples at a time. -> loss. compact: its
    lm_head takes completion tokens alone, as on a GPU; on a CPU it takes every position."""
    from trl.trainer import utils
    G, P = len(w.completions), len(w.batch["prompt_ids"][0])
    padded = pad_sequence(w.completions, batch_first=True)                           # (G, T)
    w.trainer.current_gradient_accumulation_steps = G // n
    total = 0.0
    for start in range(0, G, n):
        rows = slice(start, start + n)
        T = max(len(ids) for ids in w.completions[rows])
        types = torch.cat([w.batch["token_types"][0], torch.zeros(T, dtype=torch.long)])
        inputs = {"prompt_ids": w.batch["prompt_ids"][0].repeat(n, 1),
                  "prompt_mask": torch.ones(n, P, dtype=torch.long),
                  "completion_ids": padded[rows, :T],
                  "completion_mask": w.mask[rows, :T].long(), "advantages": w.advantages[rows],
                  "ref_per_token_logps": w.ref[rows, :T],
                  "pixel_values": w.batch["pixel_values"].repeat(n, 1),
                  "image_grid_thw": w.batch["grid_thw"].repeat(n, 1), "num_images": [1] * n,
                  "mm_token_type_ids": types.repeat(n, 1)}
        with mock.patch.object(utils, "_use_triton", lambda device: compact):
            loss = w.trainer._compute_loss(w.theirs, inputs)
        loss.backward()
        total += loss.item()
    return total


def run_way(w, way):
    """-> loss"""
    if way.startswith("ours"):
        return our_policy(w, w.queries if "queries" in way else None)
    n = 1 if way == "TRL, one at a time" else len(w.completions)
    return their_policy(w, n, compact=way != "TRL, padded batch")


def measure_cost(setting, repetitions, folder):
    """-> {"loss", "gradient": TRL's largest difference from ours, "ways": {way: {seconds, and their
    ratio to ours in the same round: median, least, most}}}"""
    w = CostWorld(*setting, folder)
    largest = {"loss": 0.0, "gradient": 0.0}
    for way in WAYS:                                         # this also warms up
        w.zero_grad()
        loss = run_way(w, way)
        if way == "ours":
            our_loss, our_gradient = loss, all_gradients(w.ours).clone()
        if way.startswith("TRL"):
            gradient = relative_norm(all_gradients(w.theirs), our_gradient)
            largest = {"loss": max(largest["loss"], abs(loss - our_loss)),
                       "gradient": max(largest["gradient"], gradient)}
    seconds = {way: [] for way in WAYS}
    for _ in range(repetitions):                             # A B C A B C, since machines drift
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
    return {**largest, "ways": ways}


def compare_cost(quick, folder):
    settings, repetitions = (QUICK_SETTINGS, 2) if quick else (SETTINGS, REPETITIONS)
    return {"repetitions": repetitions, **{name: measure_cost(setting, repetitions, folder)
                                           for name, setting in settings.items()}}


# --- The page -------------------------------------------------------------------------------------

def cost_settings(data):
    return {name: result for name, result in data["cost"].items() if name != "repetitions"}


def stored_tables(stored):
    policies = ("on-policy", "off-policy")
    columns = [(dtype, policy) for dtype in stored["compared"] for policy in policies]
    rows = []
    for what in stored["compared"]["torch.float32"]["on-policy"]:
        rows.append([what, *(f"{stored['compared'][dtype][policy][what]:.1e}"
                             for dtype, policy in columns)])
    header = ["", *(f"{dtype.removeprefix('torch.')}, {policy}" for dtype, policy in columns)]
    defaults = [[name, *(f"{distances[policy]:.1e}" for policy in policies)]
                for name, distances in stored["defaults"].items()]
    return markdown_table(header, rows), markdown_table(["TRL's default", *policies], defaults)


def group_table(results):
    rows = [[what, *(f"{result[what]:.1e}" for result in results.values())]
            for what in ("pixel values", "log-probs", "reference", "entropy", "advantages", "loss",
                         "gradient", "largest log-prob", "policy to reference")]
    return markdown_table(["", *results], rows)


def cost_table(results):
    rows = []
    for name, result in results.items():
        for way, numbers in result["ways"].items():
            to_queries = numbers["ratio"] / result["ways"]["ours, 64 queries"]["ratio"]
            rows.append([name, way, f"{numbers['seconds']:.2f}", f"{numbers['ratio']:.2f}",
                         f"{numbers['least']:.2f} to {numbers['most']:.2f}", f"{to_queries:.2f}"])
    return markdown_table(["setting", "way", "seconds", "to ours", "least to most",
                           "to ours with queries"], rows)


def split_table(results):
    """TRL's factor as a product: sharing, times batch and padding, times lm_head."""
    rows = []
    for name, result in results.items():
        all_of_it, compact, single = (result["ways"][way]["ratio"] for way in WAYS[2:])
        (height, width), words, lengths = SETTINGS.get(name) or QUICK_SETTINGS[name]
        P = height * width + words
        tokens = len(lengths) * P + sum(lengths)
        padding = len(lengths) * (P + max(lengths)) / tokens
        cells = (all_of_it, single, padding, compact / single / padding, all_of_it / compact)
        rows.append([name, *(f"{cell:.2f}" for cell in cells)])
    return markdown_table(["setting", "TRL's factor", "sharing", "padding", "the batch itself",
                           "lm_head at every position"], rows)


def page(data):
    """-> docs/evidence/peers.md"""
    stored, results, costs = data["stored"], data["group"], cost_settings(data)
    compared, defaults = stored_tables(stored)
    special = next(result for result in results.values() if "faults" in result)
    fault_lines = "\n".join(f"- {name}: {value:.2g}" for name, value in special["faults"].items())
    own = ", ".join(f"`{name}` {value!r}" for name, value in stored["trl_defaults"].items())
    largest = {name: f"{max(result[name] for result in costs.values()):.1e}"
               for name in ("loss", "gradient")}
    return f"""# A peer as oracle: TRL's GRPOTrainer

Made by `PYTHONPATH=SITE python tests/evidence/peers.py` in {data["minutes"]:.0f} minutes with one
thread of {data["machine"]}; TRL {data["trl"]}, transformers {data["transformers"]}, torch
{data["torch"]}, Python {data["python"]}. TRL is no dependency of this project. To make this page
again, install it into a folder SITE:

```bash
{INSTALL}
PYTHONPATH=SITE python tests/evidence/peers.py
```

TRL's own trainer runs. It gets the same completions and rewards as our code, and for the first
table the same stored log-probabilities. Everything else is its own code. Each difference is the
largest of all elements.

## Advantages, loss and gradient on stored tensors

{STORED_B} groups of G = {STORED_G}, T = {STORED_T}, {stored["seeds"]} seeds. One group has equal
rewards, one has a single right completion; one completion has full length, one has no token. TRL is
set to the paper's loss. Ours is set to the sample deviation (`deviation="sample"`), which TRL
cannot switch off. `advantages` leaves the group of equal rewards out. `loss`, `gradient` and `clip
fraction` are with TRL's advantages in both; `own advantages` with each one's own.

{compared}
The two are one loss. What is left with own advantages is the group of equal rewards: the mean of
equal numbers is not always that number, and TRL divides this rounding by about delta, while ours
gives exactly 0.

## Where TRL's defaults are not the paper

TRL {data["trl"]} by itself: {own}. Each row takes one of its defaults and leaves the rest as in the
paper. The number is the distance of the gradient from the paper's, over the paper's norm, in
log-probabilities (float32, the largest over the seeds). Lengths here are 0 to {STORED_T}. The more
equal they are, the less the mean over all tokens matters.

{defaults}
## The packed group forward on the stand-in

{len(special["prompts"])} images of the shapes world, and the stand-in's MLLM with every weight
moved by 2 %, so that policy and reference differ. Ours: `make_micro_batches`, `Lens.forward` with
M = {TINY["num_queries"]} queries, `score` and `backward` of train_rl.py, two prompts to a
micro-batch, alpha 0, nothing forbidden. Theirs: the G copies of each prompt, tokenised by TRL from
messages and image, padded on the left. With images of different sizes, prompts have
{min(special["prompts"])} to {max(special["prompts"])} tokens and completions
{min(special["completions"])} to {max(special["completions"])}. Rewards are those of our own
forward, from which each makes its own advantages. Loss and gradient are then taken with ours in
both, because with a ratio of 1 the loss is little more than the advantages' mean. `gradient` is
the norm of the difference over the norm, all of the MLLM.

{group_table(results)}
What the table shows is rounding. This is how far the log-probabilities would differ with two
faults, and with our choice to leave forbidden tokens out of the softmax, in training as in
sampling, which is switched off above:

{fault_lines}

## What the policy's forward and backward cost

One group, the same random weights and tensors, no gradient checkpointing of layers, advantages and
reference given. CPU time of the one thread, median of {data["cost"]["repetitions"]} interleaved
rounds; `to ours` is the median of the ratios within a round. The model is Qwen2.5-VL's code with
few and wide layers (hidden size 256, V = 2,048). `ours` does what TRL does. `ours, 64 queries`
carries the context queries of every completion as well, which TRL does not need. On a CPU, TRL's
lm_head takes every position; on a GPU it takes those of completions alone, and so it does in the
last two ways. Before they are timed, losses and gradients are compared: they differ by at most
{largest["loss"]} and {largest["gradient"]} (of the norm).

{cost_table(costs)}
TRL's factor is a product. "Sharing" is TRL's one at a time to ours: prompt and image run once for
the group and not once for each sample. "Padding" is counted in tokens. "The batch itself" is what a
batch of eight costs more than eight single samples on a CPU, beside padding. The last column is
what TRL computes in lm_head on a CPU only.

{split_table(costs)}
TRL runs prompt and image once for every sample, ours once for the group: with 8 completions of 200
that is 8 (P + 200) positions against P + 1,600, and 8 images against one. The ratio grows with P.
It was not measured on a GPU.
"""


def measure(quick):
    """-> what peers.json holds"""
    try:
        import trl
        from trl import GRPOTrainer  # noqa: F401, TRL imports lazily
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        sys.exit(f"TRL is needed and cannot be imported ({reason}). Install it into a folder: "
                 f"{INSTALL}; then PYTHONPATH=SITE python tests/evidence/peers.py")
    began = perf_counter()
    data = {"trl": trl.__version__, "transformers": transformers.__version__,
            "torch": torch.__version__, "python": platform.python_version(),
            "machine": machine()}
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("stored", compare_on_stored_tensors), ("group", compare_on_stand_in),
                           ("cost", compare_cost)):
            data[name] = part(quick, Path(folder))
            print(f"{perf_counter() - began:5.0f} s  {name}", flush=True)
    data["minutes"] = (perf_counter() - began) / 60
    return data


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--page", action="store_true", help="only peers.md, from peers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = read_json("peers") if args.page else measure(args.quick)
    if args.quick:
        print(page(data))
    else:
        write_json("peers", data)
        (EVIDENCE / "peers.md").write_text(page(data))


if __name__ == "__main__":
    main()
