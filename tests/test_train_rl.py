"""Stage 2, in the order of its step: sampling, rewards, losses, updates; one process against two;
then whole runs, with validation."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (END, FAMILIES, ROOT, SAM_SIDE, VOCABULARY, call, contents, in_two,
                      largest_move, numbers, random_batch, random_lens, random_mllm, refused, rows)
from test_align import within
from test_model import TINY, close, pixels_of, save_mllm
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import align
import data
import model
import rewards
import train_rl
import training_worker as worker
from align import SharedArgs
from data import LensError, read_records, select
from model import forward_one, prompt_positions
from train_rl import FixedCache, MicroBatch, RLArgs, draw_uniforms, generate

# --- 1. Sample ------------------------------------------------------------------------------------

def test_inverse_cdf_by_hand():
    """p = [0, .1, 0, .2, .7]: the token is the first one whose cumulative sum exceeds u, so a token
    of probability 0 never comes. NaN gives a token, and training ends at its loss."""
    logits = torch.tensor([0., .1, 0., .2, .7], dtype=torch.float64).log().expand(7, 5)
    u = torch.tensor([0., .05, .0999, .1001, .2999, .3001, 1 - 2 ** -53], dtype=torch.float64)
    assert train_rl.pick_tokens(logits, u).tolist() == [1, 1, 1, 3, 3, 4, 4]
    assert train_rl.pick_tokens(logits).tolist() == [4] * 7
    assert train_rl.pick_tokens(logits * float("nan"), u).max() < 5


def test_the_randomness_of_a_sample_is_its_own():
    """It depends on seed, step, place in the batch and g, and not on which rank draws it."""
    drawn = draw_uniforms(42, 3, range(4), 2, 6)
    assert drawn.shape == (8, 6) and drawn.dtype == torch.float64
    assert torch.equal(draw_uniforms(42, 3, range(2, 4), 2, 6), drawn[4:])
    others = [draw_uniforms(43, 3, range(4), 2, 6), draw_uniforms(42, 4, range(4), 2, 6)]
    assert torch.stack([drawn, *others]).unique().numel() == 3 * 8 * 6


def sample(lens, batch, G, uniforms=None, longest=12, temperature=1.0, eos=END, cache=None):
    return generate(lens.mllm, batch, prompt_positions(lens.mllm, batch), G, longest, eos,
                    lens.forbidden, uniforms, temperature, cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_faces_generate(family, float64):
    """Images and prompts are read once, however many samples are asked for."""
    lens, batch, seen = float64(random_lens(random_mllm(family))), random_batch(), []
    batch["pixel_values"] = batch["pixel_values"].double()
    language_model = lens.mllm.model.language_model
    hooks = [lens.mllm.model.visual.register_forward_hook(lambda *_: seen.append("images")),
             language_model.register_forward_pre_hook(
                 lambda _, args, inputs: seen.append(inputs["inputs_embeds"].shape[:2]),
                 with_kwargs=True)]
    ours = sample(lens, batch, 2, longest=20)
    for hook in hooks:
        hook.remove()
    assert seen[:2] == ["images", (2, max(map(len, batch["prompt_ids"])))]
    assert len(seen) > 9 and set(seen[2:]) <= {(n, 1) for n in range(5)}
    forbidden = lens.forbidden.nonzero().tolist()
    for b, ids in enumerate(batch["prompt_ids"]):
        out = lens.mllm.generate(input_ids=ids[None], pixel_values=pixels_of(batch, b),
                                 image_grid_thw=batch["grid_thw"][b:b + 1],
                                 mm_token_type_ids=batch["token_types"][b][None].int(),
                                 attention_mask=torch.ones_like(ids)[None],
                                 do_sample=False, max_new_tokens=20, bad_words_ids=forbidden,
                                 eos_token_id=END, pad_token_id=0)
        for completion, finished in zip(ours.completions[b], ours.finished[b]):
            assert torch.equal(completion, out[0, len(ids):])
            assert finished == (completion[-1] == END)


def test_a_sample_does_not_depend_on_its_batch(lens):
    """The same uniforms give the same completion alone, in a batch, beside other samples, and when
    the batch shrinks: eight of twelve end within 16 tokens, the others later."""
    lens.mllm.lm_head.weight.data[END] *= 3  # so that ends come often
    batch, G, longest = random_batch(), 6, 30
    uniforms = draw_uniforms(5, 0, range(2), G, longest)
    together = sample(lens, batch, G, uniforms, longest)
    lengths = sorted(len(completion) for group in together.completions for completion in group)
    assert lengths[7] < 16 < lengths[8] < 24 < lengths[-1] == 30
    for b in range(2):
        for g in range(G):
            n = b * G + g
            alone = sample(lens, select(batch, [b]), 1, uniforms[n:n + 1], longest)
            assert torch.equal(alone.completions[0][0], together.completions[b][g])
            assert alone.finished[0][0] == together.finished[b][g]


def test_what_samples_is_what_is_trained(lens):
    """Temperature 2 and forbidden tokens: the frequency of a first token, over a fine comb of
    uniforms, is exp of the log-probability that forward_one gives it."""
    batch, n = random_batch(((1, 4, 4),), (5,)), 4000
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    samples = sample(lens, batch, n, uniforms, longest=1, temperature=2.0)
    tokens = torch.cat(samples.completions[0])
    assert not lens.forbidden[tokens].any() and len(tokens.unique()) > 20
    for token in tokens.unique()[::9]:
        with torch.no_grad():
            log_prob = forward_one(lens, batch, token[None], temperature=2.0)["log_probs"]
        assert abs(log_prob.exp() - (tokens == token).float().mean()) < 1.5 / n


# eight prompts; an end comes often among so few tokens
EIGHT = ((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)) * 2, (7, 11, 5, 9, 30, 3, 14, 8)
FEW = torch.tensor([token not in (END, *range(20, 40)) for token in range(VOCABULARY)])


@pytest.fixture
def graphs(monkeypatch):
    """FixedCache compiles with the eager backend: no code is generated, but a graph break is an
    error, and so is waiting for the device. -> its counter of graphs"""
    counter, compile = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, mode: compile(
        function, dynamic=dynamic, backend=counter, fullgraph=True))
    yield counter
    torch._dynamo.reset()


def early_end(completions):
    """A token that ends some of the completions early, but not all."""
    tokens = [row.tolist() for group in completions for row in group]
    return next(token for token in range(VOCABULARY)
                if len(tokens) // 2 <= sum(token in row[:16] for row in tokens) < len(tokens))


def same(a, b):
    pairs = zip(sum(a.completions, []), sum(b.completions, []), strict=True)
    return a.finished == b.finished and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("family, compiled", [*((family, False) for family in FAMILIES),
                                              ("qwen2_5_vl", True)])
def test_a_fixed_cache_samples_what_a_growing_one_does(family, compiled, float64, graphs):
    """Greedily and from the same uniforms, one cache for all: eight prompts of different lengths,
    then two with eight samples each, one of more than 512 tokens. Completions end at different
    lengths."""
    lens, longest = float64(random_lens(random_mllm(family))), 26
    lens.forbidden = FEW
    fixed = FixedCache(lens.mllm, 16, 600, longest, compiled)
    eight = random_batch(*EIGHT, dtype=torch.float64)
    two = random_batch(texts=(7, 530), dtype=torch.float64)
    for batch, G, uniforms in (eight, 1, None), (two, 8, draw_uniforms(4, 0, range(2), 8, longest)):
        eos = early_end(sample(lens, batch, G, uniforms, longest, 0.8, eos=255).completions)
        growing = sample(lens, batch, G, uniforms, longest, 0.8, eos)
        assert same(growing, sample(lens, batch, G, uniforms, longest, 0.8, eos, fixed))
        assert len({len(row) for group in growing.completions for row in group}) > 2
    assert 0 < graphs.frame_count <= 2 if compiled else graphs.frame_count == 0


def test_the_compiled_step_sees_weights_that_change_in_place(lens, graphs):
    """As train_rl.refresh changes them, and without another graph."""
    batch, uniforms = random_batch(), draw_uniforms(4, 0, range(2), 4, 12)
    fixed, g = FixedCache(lens.mllm, 8, 64, 12), torch.Generator().manual_seed(5)
    before, number = sample(lens, batch, 4, uniforms, cache=fixed), graphs.frame_count
    with torch.no_grad():
        for parameter in lens.mllm.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    after = sample(lens, batch, 4, uniforms, cache=fixed)
    assert same(after, sample(lens, batch, 4, uniforms)) and not same(after, before)
    assert graphs.frame_count == number


# --- 2. to 4. Rewards, advantages, losses, by hand ------------------------------------------------

def test_text_rewards_by_hand():
    """The MLLM speaks in a frame of 100 x 100 of an image of 50 x 200, so its box (20, 20, 60, 40)
    is (10, 40, 30, 80): half of the true (10, 40, 30, 120). A completion that was cut has no
    format, but its box counts."""
    text = worker.BOX.replace("%d, 20, 80, 100", "20, 20, 60, 40")
    batch = {"gt_masks": [torch.zeros(200, 50)] * 2, "mllm_frames": [(100, 100)] * 2,
             "gt_boxes": [(10, 40, 30, 120), None]}
    texts, finished = [[text, text, "no box"], [text] * 3], [[True, False, True], [True] * 3]
    r_format, r_box = train_rl.text_rewards(texts, finished, batch, power=2.0)
    assert r_format.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert r_box.tolist() == [[pytest.approx(0.25), pytest.approx(0.25), 0], [0, 0, 0]]
    theirs = [["(20,20),(60,40)"] * 3] * 2
    _, r_box = train_rl.text_rewards(theirs, finished, batch, 1.0, prompt="released")
    assert r_box[0].tolist() == [pytest.approx(0.5)] * 3


def test_a_think_block_that_the_prompt_opened_counts_as_the_completions():
    tokenizer = SimpleNamespace(batch_decode=lambda group, skip_special_tokens: list(group))
    samples = train_rl.Samples([["a</think>"]], [[True]])
    texts = train_rl.completion_texts(SimpleNamespace(opening="<think>\n"), samples, tokenizer)
    assert texts == [["<think>\na</think>"]]


def test_mask_rewards_by_hand():
    """Logits above 0 in the left half of a 4 x 4 image, ground truth in its upper half: 4 / 12.
    Without the lower rows 4 / 8, squared 1 / 4."""
    logits = torch.tensor([[[9., 9., -9., -9.]] * 4])
    gt = torch.arange(4)[:, None].expand(4, 4) < 2
    for ignore, power, expected in ((gt & False, 1.0, 4 / 12), (~gt, 1.0, 0.5), (~gt, 2.0, 0.25)):
        batch = {"gt_masks": [gt], "ignore_masks": [ignore]}
        reward = train_rl.mask_rewards(torch.cat([logits, -logits]), batch, power)
        assert reward.tolist() == [[pytest.approx(expected)] * 2]


def test_score_backward_and_vital_signs_by_hand():
    """A group of two completions, of 2 and 1 tokens, and a 2 x 2 image whose upper row is meant.

    R_seg is 1 and 1/3, so R = 1 + 2 * 0.5 + 3 * 1 = 5 and 0 + 2 * 0.25 + 3 / 3 = 1.5, which is
    3.25 +- 1.75, and A = +-1.75 / (1.75 + 1e-4). Ratios are 1, so the clipped objectives cancel.
    pi_ref / pi = 2 everywhere: the KL is 2 - ln 2 - 1, and its derivative by a log-probability
    1 - 2. The loss enters the gradient with B * world / batch = 1 * 3 / 6."""
    log_probs = torch.tensor([[-1., -2.], [-3., 0.]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    mask_logits = torch.tensor([[[9., 9.], [-9., -9.]], [[9., -9.], [9., -9.]]], requires_grad=True)
    gt = torch.tensor([[True, True], [False, False]])
    batch = {"prompt_ids": [torch.tensor([5])], "gt_masks": [gt], "ignore_masks": [gt & False],
             "low_res_masks": gt[None].float(), "low_res_weights": torch.ones(1, 2, 2)}
    micro = MicroBatch(
        batch, SimpleNamespace(mask=mask), [], log_probs.detach() + torch.tensor(2.).log(),
        r_format=torch.tensor([[1., 0.]]), r_box=torch.tensor([[.5, .25]]),
        finished=torch.tensor([[True, False]]))
    args = RLArgs(batch=6, group_size=2, beta=0.5, alpha=1.5, lambda_box=2.0, lambda_mask=3.0)
    out = {"log_probs": log_probs, "mask_logits": mask_logits,
           "entropy": torch.tensor([[.2, .4], [.5, 0.]])}
    train_rl.score(out, micro, args)
    A = 1.75 / (1.75 + 1e-4)
    assert micro.reward.tolist() == [[pytest.approx(5), pytest.approx(1.5)]]
    assert micro.advantages.tolist() == [[pytest.approx(A), pytest.approx(-A)]]
    stats = {name: value.item() for name, value in train_rl.backward(out, micro, args, 3).items()}
    seg = align.segmentation_loss(mask_logits, gt.expand(2, 2, 2).float())
    kl = 1 - torch.tensor(2.).log().item()
    assert stats == pytest.approx({
        "loss": 0.5 * kl + 1.5 * seg.mean().item(), "loss_seg": seg.mean().item(), "kl": kl,
        "clip_fraction": 0, "reward": 3.25, "reward_format": 0.5, "reward_box": 0.375,
        "reward_mask": 2 / 3, "zero_variance": 0, "entropy": (0.3 + 0.5) / 2,
        "completion_length": 1.5, "cut": 0.5}, abs=1e-6)
    expected = [[(-A - .5) / 4 / 2] * 2, [(A - .5) / 2 / 2, 0]]
    assert log_probs.grad.tolist() == [[pytest.approx(x) for x in row] for row in expected]
    by_masks, = torch.autograd.grad(1.5 * seg.mean() / 2, mask_logits)
    close(mask_logits.grad, by_masks, 1e-6)
    micro.reward[:] = 1.0
    assert train_rl.vital_signs(out, micro)["zero_variance"] == 1
    train_rl.score(out, micro, RLArgs(group_size=2, deviation="sample", iou_power=2.0))
    assert micro.advantages[0, 0].item() == pytest.approx(2 ** -0.5, abs=1e-3)  # / (G - 1)
    assert micro.r_mask.tolist() == [[1, pytest.approx(1 / 9)]]
    # variants: R - mu; one advantage for each reward, each +-1 here, by their weights 1 + 2 + 3
    args.deviation = "none"
    train_rl.score(out, micro, args)
    assert micro.advantages.tolist() == [[pytest.approx(1.75), pytest.approx(-1.75)]]
    args.deviation = "each"
    train_rl.score(out, micro, args)
    assert micro.advantages.tolist() == [[pytest.approx(6, rel=2e-3), pytest.approx(-6, rel=2e-3)]]
    # a cut completion, the second, says nothing about the policy; divided by 4 instead of 2 tokens
    log_probs.grad, args.skip_cut, args.loss_length = None, True, 4
    train_rl.backward(out, micro, args, 3)
    expected = (-micro.advantages[0, 0].item() - .5) / 4 / 2 / 2
    assert log_probs.grad.tolist() == [[pytest.approx(expected)] * 2, [0, 0]]


def test_timing_by_hand(mesh):
    """6 tokens sampled in 2 s; two updates on rows of 10 tokens in 4 s."""
    samples = train_rl.Samples([[[1] * 4, [1] * 2]], [[True] * 2])
    micro = SimpleNamespace(packed=SimpleNamespace(ids=torch.zeros(1, 10)))
    timing = train_rl.timing([micro], samples, RLArgs(updates_per_batch=2), began=1.0, loaded=1.5,
                             sampled=3.5, updated=7.5)
    assert timing.pop("seconds_refresh") > 0
    assert timing == {"speed_sampled": 3, "speed_trained": 5, "seconds_loading": 0.5,
                      "seconds_sampling": 2.0}


@pytest.mark.parametrize("mask_pass", ["paper", "released"])
def test_policy_and_reference_equal_forward_one(mask_pass, float64):
    """Both at the positions that --mask-pass asks for."""
    lens = float64(random_lens(mask_pass=mask_pass))
    other = float64(random_lens(random_mllm(seed=1), mask_pass=mask_pass))
    reference = train_rl.Reference(other.mllm, other.forbidden)
    whole = worker.whole_batch(torch.float64)
    micro, = worker.micro_batches(lens, reference, worker.settings(4), whole=whole)
    worker.forward_backward(lens, micro, worker.settings(4))
    for n, completion in enumerate(sum(whole[1], [])):
        for one, ours in (lens, micro.old_log_probs), (other, micro.ref_log_probs):
            with torch.no_grad():
                theirs = forward_one(one, select(whole[0], [n // 3]), completion, 0.8)
            close(ours[n, :len(completion)], theirs["log_probs"])


def test_what_is_ignored_counts_nowhere():
    """The upper half of every image is ignored: another ground truth there changes neither loss,
    reward, IoU nor gradient, in either stage. Another one below it does."""
    results = []
    for above, below in ((0, 0), (1, 0), (0, 1)):
        batch, completions, texts, finished = worker.whole_batch()
        for b in range(4):
            ignored = torch.arange(40)[:, None].expand(40, 50) < 20
            batch["ignore_masks"][b] = ignored
            batch["gt_masks"][b] ^= torch.where(ignored, bool(above), bool(below))
        side = SAM_SIDE // 4
        weights = (torch.arange(side)[:, None] >= side // 2).expand(4, side, side).float()
        gt = batch["low_res_masks"]
        batch["low_res_masks"] = torch.where(weights == 0, (gt + above) % 1.5, (gt + below) % 1.5)
        batch["low_res_weights"] = weights
        lens, args = random_lens(), worker.settings(4, beta=0.0)
        model.set_trainable(lens, "rl")
        micro, = worker.micro_batches(lens, None, args, whole=(batch, completions, texts, finished))
        _, sums = worker.forward_backward(lens, micro, args)
        grads = [p.grad for p in lens.parameters() if p.grad is not None]
        stage_1 = random_lens()
        model.set_trainable(stage_1, "align")
        first = [group[0] for group in completions]
        sums["stage 1"] = align.align_step(stage_1, batch, first, 1, args)
        grads += [p.grad for p in stage_1.parameters() if p.grad is not None]
        results.append((sums, grads))
    (sums, grads), (sums_above, grads_above), (sums_below, _) = results
    assert all(torch.equal(sums[name], sums_above[name]) for name in sums)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_above)) and len(grads) > 100
    assert sums["reward_mask"] != sums_below["reward_mask"]
    assert sums["loss_seg"] != sums_below["loss_seg"]
    assert (sums["stage 1"][:2] != sums_below["stage 1"][:2]).all()


# --- 5. Update, on one process and on two ---------------------------------------------------------

def test_the_size_of_micro_batches_does_not_matter(float64):
    """One of four groups gives the gradients of four of one group."""
    whole, grads = worker.whole_batch(torch.float64), []
    for size in (1, 4):
        lens, args = float64(random_lens()), worker.settings(size)
        model.set_trainable(lens, "rl")
        reference = train_rl.Reference(float64(random_mllm(seed=1)), lens.forbidden)
        micro_batches = worker.micro_batches(lens, reference, args, whole=whole)
        assert len(micro_batches) == 4 // size
        for micro in micro_batches:
            worker.forward_backward(lens, micro, args)
        grads.append([p.grad for p in lens.parameters() if p.requires_grad])
    assert len(grads[0]) > 100
    for a, b in zip(*grads):
        close(a, b, 1e-8)


def test_two_updates_on_one_batch(mesh):
    """The second one clips, since the old policy stays the one that sampled. Of both, the mean is
    reported; rewards are those of the samples."""
    lens, reference, _ = worker.build("fp32", mesh)
    args = worker.settings(2, updates_per_batch=2, lr=0.01)
    micro_batches = worker.micro_batches(lens, reference, args)
    optimizer = align.make_optimizer(train_rl.parameter_groups(lens, args), args,
                                     torch.device("cpu"))
    first = [worker.forward_backward(lens, micro, args)[1] for micro in micro_batches]
    lens.zero_grad()
    old = [micro.old_log_probs for micro in micro_batches]
    means, _ = train_rl.update(lens, optimizer, micro_batches, 1.0, args, 1, 0)
    assert all(torch.equal(micro.old_log_probs, log_probs)
               for micro, log_probs in zip(micro_batches, old))
    loss = sum(sums["loss"] for sums in first).item() / 4
    assert means["clip_fraction"] > 0.1 and abs(means["loss"] - loss) > 0.1
    reward = torch.cat([micro.reward for micro in micro_batches])
    assert means["reward"] == pytest.approx(reward.mean().item())


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_two_processes_equal_one(kind, tmp_path):
    """Every gradient of the same four groups in fp32. A group is computed alike; only the sum over
    the groups is taken in another order. The two also compute the layers again in the backward."""
    worker.save_gradients(tmp_path / "one", "full", False)
    in_two(worker.save_gradients, tmp_path / "two", kind, True)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert torch.allclose(one["sums"], two["sums"], atol=1e-5, rtol=1e-5)
    assert one["gradients"].keys() == two["gradients"].keys() and len(one["gradients"]) > 100
    for name, expected in one["gradients"].items():
        scale = expected.abs().max().clamp(min=1.0)
        assert (two["gradients"][name] - expected).abs().max() / scale < 1e-5, name


def test_the_sampler_is_refreshed_on_every_rank(tmp_path):
    """In bf16; and what the comparison sees if one rank leaves it out."""
    for stale, expected in ((False, [True, True]), (True, [True, False])):
        in_two(worker.save_whether_refreshed, tmp_path / "out", stale)
        assert torch.load(tmp_path / "out", weights_only=True)["equal"] == expected


def mapped_at(tensor, file):
    """Does the memory of the tensor lie in the mapping of the file?"""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name.strip() == str(file)
    return False


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "fp32"), (torch.bfloat16, "bf16"),
                                              (torch.float32, "fp32")])
def test_three_models_from_one_file(dtype, precision, mesh, tmp_path, monkeypatch):
    """The file's weights are mapped, not read. Then the policy (fp32), the sampler and the
    reference (in the precision that computes) hold them each for itself."""
    saved = random_mllm(vocabulary=1000).to(dtype)
    file, load, seen = tmp_path / "model.safetensors", model.load_mllm, []

    def watched(*args):
        mllm, processor = load(*args)
        seen.extend((p.dtype, mapped_at(p, file)) for p in mllm.parameters())
        return mllm, processor
    for module in model, train_rl:  # the reference is loaded apart
        monkeypatch.setattr(module, "load_mllm", watched)
    shared = SharedArgs(**{**align.TINY, "mllm": save_mllm(saved, tmp_path), "precision": precision,
                           "sam": str(ROOT / "tests/tiny/sam")})
    content = file.read_bytes()
    lens, reference, sampler, _ = train_rl.load_models(
        shared, RLArgs(batch=2, micro_batch=2, init="none"), mesh, torch.device("cpu"))
    assert {kind for kind, _ in seen} == {dtype} and len(seen) > 100
    assert sum(mapped for _, mapped in seen) > 0.9 * len(seen)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32

    def local(parameter):
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter
    models = [{name: local(p.detach()) for name, p in mllm.named_parameters()}
              for mllm in (lens.mllm, sampler, reference.mllm)]
    for parameters, kind in zip(models, (torch.float32, compute, compute)):
        for name, stored in saved.named_parameters():
            assert parameters[name].dtype == kind and not mapped_at(parameters[name], file), name
            assert torch.equal(parameters[name], stored.to(kind)), name
    for value, parameters in enumerate(models):
        for parameter in parameters.values():
            parameter.fill_(value)
    for value, parameters in enumerate(models):
        assert all((parameter == value).all() for parameter in parameters.values())
    assert file.read_bytes() == content
    train_rl.refresh(sampler, lens)
    assert all((parameter == 0).all() for parameter in sampler.parameters())


# --- Whole runs, with validation ------------------------------------------------------------------

@pytest.fixture(scope="module")
def own_data(world, tmp_path_factory):
    """A folder of one's own with 6 training and 5 validation rows."""
    root = tmp_path_factory.mktemp("own")
    (root / "mixed").mkdir()
    for split, number in ("train", 6), ("val", 5):
        lines = [json.dumps({"image": record["image"], "text": record["expressions"][0],
                             "box": record["gt_box"], "mask": record["segmentation"]})
                 for record in read_records(world, ["shapes"], [split])[:number]]
        (root / f"mixed/{split}.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def by_two(own_data, aligned, tmp_path_factory):
    """Two steps of two processes, which share 4 of the 5 validation rows. Rewards are IoU squared,
    the numbers of the validation are not."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    in_two(call, "train_rl.py", "--data", own_data, "--datasets", "mixed", "--init", aligned,
           "--steps", 2, "--batch", 4, "--micro-batch", 2, "--group-size", 2, "--max-completion",
           64, "--val-every", 1, "--iou-power", 2, "--save-every", 1, "--output", folder)
    return folder


VALUES = ("val_giou", "val_box_iou", "val_acc50")


@pytest.mark.parametrize("earlier, rewritten", [(0.999, False), (-0.5, True)])
def test_one_process_goes_on_for_two_and_keeps_the_best(earlier, rewritten, by_two, tmp_path):
    """From step 1, whose validation was better, or worse, than that of step 2 will be. The numbers
    of step 2 are those of two processes, up to rounding; only the validation has one row more."""
    folder = tmp_path / "run"
    shutil.copytree(by_two, folder)
    shutil.rmtree(folder / "checkpoints/step_000002")
    lines = rows(by_two)
    lines[0]["val_giou"] = earlier
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "best/context.safetensors").write_bytes(b"of step 1")
    call("train_rl.py", "--output", folder, "--resume")
    first, second = numbers(folder)
    assert first["val_giou"] == earlier and abs(first["kl"]) < 1e-6 < second["kl"]
    expected = {**numbers(by_two)[1], **{name: second[name] for name in VALUES}}
    assert second == pytest.approx(expected, abs=2e-4)
    assert set(second) == {
        "step", "loss", "loss_seg", "reward", "reward_format", "reward_box", "reward_mask",
        "zero_variance", "kl", "clip_fraction", "entropy", "completion_length",
        "cut", "grad_norm", "lr", *VALUES}
    context = (folder / "best/context.safetensors").read_bytes()
    expected = (folder / "context.safetensors").read_bytes() if rewritten else b"of step 1"
    assert context == expected


def test_the_best_model_is_one_for_evaluate_and_for_transformers(by_two, own_data, tmp_path):
    """OUTPUT/best under evaluate.py gives the numbers of its validation. Its mllm/ is loaded by
    transformers, whose own generate writes the same completions."""
    best = max(rows(by_two), key=lambda row: row["val_giou"])
    root = shutil.copytree(own_data, tmp_path / "data")
    val = root / "mixed/val.jsonl"
    val.write_text("\n".join(val.read_text().splitlines()[:4]))  # the 4 that validation took
    call("evaluate.py", "--checkpoint", by_two / "best", "--data", root, "--splits", "val",
         "--json", tmp_path / "val.json", "--predictions", tmp_path / "rows.jsonl")
    metrics = json.loads((tmp_path / "val.json").read_text())["val"]
    assert metrics["n"] == 4 and metrics["box_iou"] > 0.1 and metrics["giou"] > 0
    for name in VALUES:
        assert best[name] == pytest.approx(metrics[name.removeprefix("val_")], abs=1e-4), name
    mllm = AutoModelForImageTextToText.from_pretrained(by_two / "best/mllm")
    processor = AutoProcessor.from_pretrained(by_two / "best/mllm")
    items = data.EvaluationRows(read_records(root, ["mixed"], ["val"]))
    lines = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    for item, line in zip(items, lines, strict=True):
        text = processor.apply_chat_template(rewards.chat_messages(item["expression"]),
                                             add_generation_prompt=True)
        inputs = processor(text=[text], images=[item["image"]], return_tensors="pt",
                           return_mm_token_type_ids=True)
        out = mllm.generate(**inputs, do_sample=False, max_new_tokens=64)
        out = out[0, inputs["input_ids"].shape[1]:]
        completion = processor.tokenizer.decode(out, skip_special_tokens=True)
        assert line["id"] == item["id"] and line["completion"] == completion and len(out) > 5


def test_each_part_has_its_own_learning_rate(by_two, tmp_path):
    """The rates of the parts, and a resumed run, whose flags win: the MLLM's rate is as good as 0,
    those of the context module and of SAM are as they were."""
    lens = random_lens()
    model.set_trainable(lens, "rl")
    groups = train_rl.parameter_groups(lens, RLArgs(lr=1.0, lr_context=2.0))
    assert [group["peak_lr"] for group in groups] == [1.0, 2.0]
    named = {id(p): name.split(".")[0] for name, p in lens.named_parameters()}
    assert [{named[id(p)] for p in group["params"]} for group in groups] == [
        {"mllm"}, {"sam", "queries", "connector"}]
    assert sum(len(group["params"]) for group in groups) == sum(
        p.requires_grad for p in lens.parameters())
    moved = tmp_path / "moved"
    shutil.copytree(by_two, moved)
    call("train_rl.py", "--output", moved, "--resume", "--steps", 3, "--lr", 1e-12,
         "--lr-context", 1e-3, "--val-every", 0)
    assert largest_move(by_two, moved, "mllm/model.safetensors") < 1e-9
    assert largest_move(by_two, moved, "context.safetensors") > 1e-6
    assert largest_move(by_two, moved, "sam.safetensors") > 1e-7


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_go_through_both_stages(family, world, tmp_path):
    """Random weights, layers that are computed again. Everything moves; the second step is not as
    the first."""
    mllm = random_mllm(family, True, vocabulary=1000, image=6, video=7, start=3, end=4)
    flags = ["--data", world, "--steps", 2, "--batch", 2, "--micro-batch", 1, "--max-completion", 8]
    call("align.py", *flags, "--mllm", save_mllm(mllm, tmp_path / "mllm"), "--output",
         tmp_path / "align")
    call("train_rl.py", *flags, "--output", tmp_path / "rl", "--init", tmp_path / "align",
         "--group-size", 2, "--gradient-checkpointing")
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "rl/mllm")
    assert trained.config.model_type == family
    for name in ("lm_head.weight", "model.visual.blocks.0.attn.qkv.weight",
                 "model.language_model.layers.2.mlp.up_proj.weight"):
        assert not torch.equal(trained.get_parameter(name), mllm.get_parameter(name))
    first, second = rows(tmp_path / "rl")
    assert abs(first["kl"]) < 1e-6 and second["loss_seg"] != first["loss_seg"]


RELEASED = {"profile": "released", "prompt": "released", "mask_pass": "released",
            "sam_tokens": "one"}


def test_profile_released_trains_from_a_run_with_a_sam_of_its_own(world, tmp_path):
    """As a converted checkpoint of the authors is. Stage 2 takes over its choices and its SAM."""
    flags = ["--data", world, "--steps", 1, "--batch", 2, "--micro-batch", 2]
    start, end = tmp_path / "align", tmp_path / "rl"
    call("align.py", *flags, "--profile", "released", "--output", start)
    assert within(RELEASED, json.loads((start / "lens.json").read_text()))
    shutil.copytree(ROOT / "tests/tiny/sam", start / "sam")
    call("train_rl.py", *flags, "--init", start, "--group-size", 2, "--output", end)
    assert within({**RELEASED, "sam": str(start / "sam")},
                  json.loads((end / "lens.json").read_text()))
    assert contents(end / "sam") == contents(start / "sam")
    settings = json.loads((end / "settings.json").read_text())
    assert within({"iou_power": 2.0, "deviation": "sample", "lambda_format": 0.0}, settings)
    assert abs(rows(end)[0]["kl"]) < 1e-6


@pytest.mark.parametrize("script, function, sam_trains", [
    (align, "align_step", False), (train_rl, "make_micro_batches", True)])
def test_what_a_stage_makes_of_its_settings(script, function, sam_trains, world, aligned,
                                            monkeypatch, tmp_path):
    """SAM picks among four masks in eval mode alone: stage 1, where it is frozen, has it in eval
    mode, stage 2 has not. Prompts, forced completions and forbidden tokens are the released
    ones."""
    seen, asked, forbid = [], [], model.forbidden_tokens

    def look(*given):
        seen.extend(given)
        raise LensError("enough")
    monkeypatch.setattr(script, function, look)
    monkeypatch.setattr(model, "forbidden_tokens",
                        lambda *given: asked.append(given[3]) or forbid(*given))
    own = ("--init", aligned, "--group-size", 2) if sam_trains else ()
    refused(f"{script.__name__}.py", "--data", world, "--output", tmp_path / "run", "--batch", 2,
            "--micro-batch", 2, "--mask-pass", "released", "--prompt", "released",
            "--max-completion", 8, *own)
    lens, batch = seen[0], seen[2 if sam_trains else 1]
    assert lens.sam.training == sam_trains and asked == ["released"] == [lens.prompt]
    assert lens.sam.sam_mask_decoder.dynamic_multimask_via_stability
    processor = AutoProcessor.from_pretrained(TINY)
    for ids, expression in zip(batch["prompt_ids"], batch["expressions"]):
        chat = processor.apply_chat_template(rewards.chat_messages(expression, "released"),
                                             add_generation_prompt=True)
        start, end = chat.split("<|image_pad|>")
        text = processor.tokenizer.decode(ids)
        assert text.startswith(start) and text.endswith(end)
    if not sam_trains:
        forced = align.forced_completions(lens, batch, processor.tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(seen[2], forced, strict=True))
