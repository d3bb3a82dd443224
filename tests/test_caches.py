"""Sampling in a cache of fixed shape, compiled or not, gives what the growing cache gives."""
import pytest
import torch
from conftest import END, FAMILIES, VOCABULARY, random_batch, random_lens, random_mllm
from torch._dynamo.testing import CompileCounter

from grpo import pack_groups, policy_logits
from model import group_hidden, prompt_positions
from train_rl import FixedCache, GrowingCache, generate, pick_tokens

# the end token comes often among so few
FORBIDDEN = torch.tensor([token not in (END, *range(20, 40)) for token in range(VOCABULARY)])
MAX_NEW = 26


@pytest.fixture
def shrinks(monkeypatch):
    """-> [(cache, sequences that were kept)] of every shrink() that dropped some"""
    seen = []
    for cache in (GrowingCache, FixedCache):
        def shrink(self, unfinished, original=cache.shrink):
            kept = original(self, unfinished)
            if kept is not None:
                seen.append((type(self), len(kept)))
            return kept
        monkeypatch.setattr(cache, "shrink", shrink)
    return seen


@pytest.fixture
def graphs(monkeypatch):
    """FixedCache compiles with the eager backend: no code is generated, but a graph break is an
    error, and so is a host sync. -> its counter of graphs"""
    counter, compile = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, mode: compile(
        function, dynamic=dynamic, backend=counter, fullgraph=True))
    yield counter
    torch._dynamo.reset()


def small_lens(family="qwen2_5_vl"):
    lens = random_lens(random_mllm(family))
    lens.forbidden = FORBIDDEN
    return lens


def sample(lens, batch, G, eos=END, uniforms=None, cache=None, max_new=MAX_NEW):
    """-> B x G completions as lists, and which of them are finished"""
    samples = generate(lens.mllm, batch, prompt_positions(lens.mllm, batch), G, max_new, eos,
                       lens.forbidden, uniforms, 0.8, cache)
    return [[ids.tolist() for ids in group] for group in samples.completions], samples.finished


def uniforms_for(N, max_new=MAX_NEW):
    return torch.rand(N, max_new, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def early_end(completions):
    """A token that has ended half of the completions, but not all, when the caches may shrink."""
    tokens = [row for group in completions for row in group]
    return next(token for token in range(VOCABULARY) if any(
        len(tokens) // 2 <= sum(token in row[:t] for row in tokens) < len(tokens)
        for t in (8, 16, 24)))


@pytest.mark.parametrize("family, compiled", [*((family, False) for family in FAMILIES),
                                              ("qwen2_5_vl", True)])
def test_a_fixed_cache_samples_what_a_growing_one_does(family, compiled, shrinks, graphs):
    """Greedily and from the same uniforms, through shrinks, one fixed cache for all: eight prompts
    of different lengths, then two with eight completions each, one of more than 512 tokens. In
    float64, since in float32 attention over another length rounds differently. The forward that
    trains has the same policy: with its logits, the uniforms pick the same tokens."""
    lens = small_lens(family)
    eight = random_batch(((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)) * 2,
                         (7, 11, 5, 9, 30, 3, 14, 8), dtype=torch.float64)
    two = random_batch(texts=(7, 530), dtype=torch.float64)
    lens.mllm.double()
    fixed = FixedCache(lens.mllm, 16, 600, MAX_NEW, compiled)
    for batch, G, uniforms in (eight, 1, None), (two, 8, uniforms_for(16)):
        eos = early_end(sample(lens, batch, G, 255, uniforms)[0])
        completions, finished = sample(lens, batch, G, eos, uniforms)
        assert (completions, finished) == sample(lens, batch, G, eos, uniforms, fixed)
        sizes = {cache: {kept for which, kept in shrinks if which is cache}
                 for cache in (GrowingCache, FixedCache)}
        assert sizes[GrowingCache] and sizes[FixedCache]
        assert sizes[FixedCache] <= {8, 4, 2, 1}                     # few shapes
        shrinks.clear()
    assert len({len(row) for group in completions for row in group}) > 4
    assert 0 < graphs.frame_count <= 8 if compiled else graphs.frame_count == 0

    completions = [[torch.tensor(row) for row in group] for group in completions]
    packed = pack_groups(two["prompt_ids"], prompt_positions(lens.mllm, two), completions, lens.M)
    with torch.no_grad():
        hidden = group_hidden(lens.mllm, two["pixel_values"], two["grid_thw"], packed)
        logits = policy_logits(lens.mllm.lm_head, hidden[packed.target_places], lens.forbidden, 0.8)
    drawn = uniforms[:, :packed.mask.shape[1]][packed.mask]
    assert torch.equal(pick_tokens(logits, drawn), packed.targets)


def test_the_compiled_step_sees_weights_that_change_in_place(graphs):
    """As train_rl.refresh changes them, and without another graph."""
    lens, batch, uniforms = small_lens(), random_batch(), uniforms_for(8, 12)
    fixed = FixedCache(lens.mllm, 8, 64, 12)

    def by_both():
        samples = sample(lens, batch, 4, END, uniforms, fixed, 12)
        assert samples == sample(lens, batch, 4, END, uniforms, None, 12)
        return samples
    before, number = by_both(), graphs.frame_count
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lens.mllm.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    assert by_both() != before
    assert graphs.frame_count <= number + 2              # it may shrink later or sooner
