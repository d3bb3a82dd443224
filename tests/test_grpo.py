"""grpo.py against numbers worked out by hand, against a loop over tokens that shares no code with
it, and the packed row against attention with a plain mask.

A ratio r is set by adding log(r) to the old log-probability. Numbers are compared in float64, and
exactly where the result is exact.
"""
import math

import pytest
import torch

from grpo import (clipped_objective, completion_mean, completion_table, group_advantages, grpo_loss,
                  kl_k3, pack_groups, packed_attention, sum_of_advantages, token_log_probs)

NAN, INF = math.nan, math.inf


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12,
                               atol=1e-12)


# --- Advantages, Eqs. 6-7 ---

def test_advantages_by_hand():
    # mu = 1/4; variance = (0.75^2 + 3 * 0.25^2) / 4 = (0.5625 + 0.1875) / 4 = 0.1875
    # sigma = 0.4330127; A_1 = 0.75 / 0.4330127 = 1.7320508 = sqrt(3),
    # the others -0.25 / 0.4330127 = -0.5773503 = -1/sqrt(3)
    close(group_advantages(f64([1, 0, 0, 0]), delta=0), [3**0.5] + [-(3**-0.5)] * 3)
    # with delta: 0.75 / 0.4331127 = 1.7316509, -0.25 / 0.4331127 = -0.5772170
    sigma = 0.1875**0.5
    close(group_advantages(f64([1, 0, 0, 0])),
          [0.75 / (sigma + 1e-4)] + [-0.25 / (sigma + 1e-4)] * 3)
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0]))
    assert advantages.tolist() == pytest.approx([1.7316509] + [-0.5772170] * 3)
    # mu = 2, variance = (1 + 0 + 1) / 3; 1 / sqrt(2/3) = 1.2247449
    close(group_advantages(f64([3, 2, 1]), delta=0), [1.5**0.5, 0, -(1.5**0.5)])


def test_the_sample_standard_deviation_by_hand():
    # 1/(G-1): variance = 0.75 / 3 = 1/4, sigma = 1/2; A = 0.75 / 0.5 and -0.25 / 0.5
    close(group_advantages(f64([1, 0, 0, 0]), "sample", delta=0), [1.5, -0.5, -0.5, -0.5])
    close(group_advantages(f64([1, 0, 0, 0]), "sample"), [0.75 / 0.5001] + [-0.25 / 0.5001] * 3)
    # [3, 2, 1]: variance = 2 / 2, sigma = 1
    two_groups = f64([[3, 2, 1], [1, 1, 1]])
    close(group_advantages(two_groups, "sample", delta=0.5), [[1 / 1.5, 0, -1 / 1.5], [0, 0, 0]])


def test_advantages_without_deviation_by_hand():
    """Dr. GRPO. mu = 1/4 and mu = 1/2. With sigma, [1, 0, 0, 0] and [0.1, 0, 0, 0] would be equally
    loud (sigma = 0.433 and 0.0433); without it, the second says a tenth."""
    rewards = f64([[1, 0, 0, 0], [0.1, 0, 0, 0], [1, 1, 0, 0]])
    close(group_advantages(rewards, "none"), [[0.75, -0.25, -0.25, -0.25],
                                              [0.075, -0.025, -0.025, -0.025],
                                              [0.5, 0.5, -0.5, -0.5]])
    assert group_advantages(torch.full((3,), 0.1), "none").tolist() == [0.0] * 3


def test_the_sum_of_advantages_by_hand():
    """GDPO. A of [1, 0, 0, 0] is [a, -b, -b, -b] with a = sqrt(3) and b = 1/sqrt(3); [0, 0, 1, 0]
    gives [-b, -b, a, -b], and ten times that reward gives the same. With weights 2 and 1: 2a - b,
    -3b, a - 2b, -3b. The order of Eq. 11 has sums [2, 0, 10, 0] instead: the second reward decides,
    and the completion that the first one likes is below the mean."""
    a, b = 3**0.5, 3**-0.5
    first, second = f64([[1, 0, 0, 0]]), f64([[0, 0, 10, 0]])
    expected = f64([[2 * a - b, -3 * b, a - 2 * b, -3 * b]])
    torch.testing.assert_close(sum_of_advantages((first, second), (2, 1)), expected, rtol=1e-3,
                               atol=0)  # delta is 1e-4, and sigma 0.43
    assert sum_of_advantages((first, second), (2, 1))[0, 0] > 2
    assert group_advantages(2 * first + second)[0, 0] < 0
    # a reward that is the same for all says nothing
    close(sum_of_advantages((first, f64([[5, 5, 5, 5]])), (1, 1)), group_advantages(first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("G", [1, 2, 3, 6, 7, 8, 11])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7, 1 / 3, -2.3, 1e-8, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(value, G, dtype):
    assert group_advantages(torch.full((G,), value, dtype=dtype)).tolist() == [0.0] * G


def test_the_mean_of_equal_floats_can_differ_from_them():
    """Otherwise the test above would prove nothing."""
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert (rewards - rewards.mean()).abs().max() > 0


def test_advantages_of_many_groups():
    rewards = random(2, 3, 4)
    rewards[1, 2] = 0.1  # one group of equal rewards among the others
    advantages = group_advantages(rewards)
    assert advantages.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            group = rewards[i, j].tolist()
            mu = sum(group) / 4
            sigma = math.sqrt(sum((r - mu) ** 2 for r in group) / 4)
            close(advantages[i, j], [(r - mu) / (sigma + 1e-4) for r in group])
    assert advantages[1, 2].tolist() == [0.0] * 4


# --- The KL estimate, Eq. 9 ---

def test_kl_by_hand():
    # pi_ref/pi = 2: 2 - log 2 - 1 = 0.3068528; 1/2: 0.5 + log 2 - 1 = 0.1931472; equal: 0
    log_probs = f64([math.log(0.25), math.log(0.5), math.log(0.3)])
    ref = f64([math.log(0.5), math.log(0.25), math.log(0.3)])
    close(kl_k3(log_probs, ref), [1 - math.log(2), math.log(2) - 0.5, 0])


def test_kl_near_zero_keeps_its_digits():
    # exp(d) - d - 1 = d^2/2 + d^3/6 + ... = 5.0001667e-9 at d = 1e-4; float32's exp(d) is off by up
    # to 6e-8. expm1(d) - d subtracts two numbers near 1e-4, where floats are 2^-37 = 7e-12 apart.
    kl = kl_k3(torch.zeros(1), torch.full((1,), 1e-4)).item()
    assert kl == pytest.approx(5.0001667e-9, abs=8e-12)


def test_kl_gradient_by_hand():
    # d/dlp (exp(ref - lp) - (ref - lp) - 1) = 1 - exp(ref - lp): for pi_ref/pi = 2 it is -1
    log_probs = f64([math.log(0.25)]).requires_grad_()
    kl_k3(log_probs, f64([math.log(0.5)])).sum().backward()
    close(log_probs.grad, [-1])


# --- The clipped objective, Eq. 8 ---

@pytest.mark.parametrize("ratio, advantage, value, gradient", [
    # eps = 0.2 clips to [0.8, 1.2]. d(ratio A)/dlp = ratio A; a clipped ratio is a constant.
    (1.5, 2.0, 2.4, 0.0),  # min(3.0, 1.2 * 2 = 2.4): has gone up enough, clipped
    (0.5, 2.0, 1.0, 1.0),  # min(1.0, 0.8 * 2 = 1.6): moved the wrong way, not clipped
    (1.5, -2.0, -3.0, -3.0),  # min(-3.0, 1.2 * -2 = -2.4): moved the wrong way, not clipped
    (0.5, -2.0, -1.6, 0.0),  # min(-1.0, 0.8 * -2 = -1.6): has gone down enough, clipped
    # within the range both sides of the min are equal; the gradient must be whole, not halved
    (1.1, 2.0, 2.2, 2.2),
    (0.9, -2.0, -1.8, -1.8),
    (1.0, 2.0, 2.0, 2.0),
    (1.5, 0.0, 0.0, 0.0),
])
def test_clip(ratio, advantage, value, gradient):
    log_probs = f64([-1 + math.log(ratio)]).requires_grad_()
    objective = clipped_objective(log_probs, f64([-1]), f64([advantage]), clip_eps=0.2)
    objective.sum().backward()
    close(objective, [value])
    close(log_probs.grad, [gradient])


def test_advantages_broadcast_over_tokens():
    # ratios 1 and 2 for both completions; A = 1: min(2, 1.2) = 1.2; A = -1: min(-2, -1.2) = -2
    log_probs = f64([[0, math.log(2)], [0, math.log(2)]])
    objective = clipped_objective(log_probs, f64([[0, 0], [0, 0]]), f64([[1], [-1]]), 0.2)
    close(objective, [[1, 1.2], [-1, -2]])


# --- The loss, minus Eq. 10 ---

# Two completions of three and two tokens. Ratios pi/pi_old and pi_ref/pi, then the terms with
# eps = 0.2:
#     completion 1, A = 2:    ratios 1, 1.5, 0.5     -> 2, 2.4 (clipped), 1     mean 5.4 / 3 = 1.8
#     completion 2, A = -1:   ratios 1.5, 0.5, pad   -> -1.5, -0.8 (clipped)   mean -2.3 / 2 = -1.15
#     KL: pi_ref/pi = 2 costs a = 1 - log 2, 1/2 costs b = log 2 - 1/2, 1 costs 0
#     completion 1: 2, 1, 1/2 -> (a + 0 + b) / 3 = 1/6;    completion 2: 1, 2 -> a / 2
# J = (1.8 - 1.15) / 2 - beta * KL with KL = (1/6 + (1 - log 2) / 2) / 2 = 0.1600465
RATIO = [[1, 1.5, 0.5], [1.5, 0.5, 1]]
REF_RATIO = [[2, 1, 0.5], [1, 2, 1]]
ADVANTAGES = f64([2.0, -1.0])
MASK = torch.tensor([[True, True, True], [True, True, False]])
KL = (1 / 6 + (1 - math.log(2)) / 2) / 2


def worked_example():
    old = f64([[-1, -2, -3], [-2, -1, -5]])
    log_probs = old + f64(RATIO).log()
    return log_probs.requires_grad_(), old, (log_probs + f64(REF_RATIO).log()).detach()


def test_loss_by_hand():
    loss, stats = grpo_loss(*worked_example(), ADVANTAGES, MASK, clip_eps=0.2, beta=0.5)
    close(loss, -0.325 + 0.5 * KL)
    close(stats["kl"], KL)
    assert stats["clip_fraction"].item() == pytest.approx(2 / 5)  # of all five tokens
    assert all(s.dim() == 0 and not s.requires_grad for s in stats.values())


def test_gradient_of_the_loss_by_hand():
    # d loss / d lp_it = -(ratio A [unclipped] - beta (1 - pi_ref/pi)) / (N len_i), with beta = 0.5:
    #     completion 1, / 6:  -(2 - 0.5 * -1) = -2.5;  clipped: -(0 - 0.5 * 0) = 0;
    #                         -(1 - 0.5 * 0.5) = -0.75
    #     completion 2, / 4:  -(-1.5 - 0.5 * 0) = 1.5;  clipped: -(0 - 0.5 * -1) = -0.5;  padding 0
    log_probs, old, ref = worked_example()
    grpo_loss(log_probs, old, ref, ADVANTAGES, MASK, clip_eps=0.2, beta=0.5)[0].backward()
    close(log_probs.grad, [[-2.5 / 6, 0, -0.75 / 6], [1.5 / 4, -0.5 / 4, 0]])


def test_beta_zero_needs_no_reference():
    log_probs, old, ref = worked_example()
    loss, stats = grpo_loss(log_probs, old, None, ADVANTAGES, MASK, 0.2, beta=0.0)
    close(loss, -0.325)
    assert stats["kl"] == 0
    # With a reference, the KL is measured all the same.
    loss, stats = grpo_loss(log_probs, old, ref, ADVANTAGES, MASK, 0.2, beta=0.0)
    close(loss, -0.325)
    close(stats["kl"], KL)
    with pytest.raises(ValueError, match="ref_log_probs"):
        grpo_loss(log_probs, old, None, ADVANTAGES, MASK, 0.2, beta=0.04)


def test_on_policy_gradient_by_hand():
    # One update per batch: every ratio is 1 and nothing is clipped, so the gradient is
    # -A_i / (N len_i) and the value -(mean of A) = 0. Advantages of a group with rewards 3, 2, 1
    # (worked above), lengths 1, 2, 4.
    advantages = group_advantages(f64([3, 2, 1]), delta=0)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    log_probs = f64([[-1.0, -2, -3, -4]] * 3).requires_grad_()
    # One tensor, not detached, is given three times. The old and the reference log-probabilities
    # must count as constants.
    loss, stats = grpo_loss(log_probs, log_probs, log_probs, advantages, mask, 0.2, beta=0.04)
    loss.backward()
    a = 1.5**0.5
    close(loss, 0)
    close(log_probs.grad, [[-a / 3, 0, 0, 0], [0, 0, 0, 0], [a / 12] * 4])
    assert (stats["kl"], stats["clip_fraction"]) == (0, 0)


def test_only_the_policy_receives_gradients():
    log_probs, old, ref = worked_example()
    inputs = log_probs, old.requires_grad_(), ref.requires_grad_(), f64([2, -1]).requires_grad_()
    grpo_loss(*inputs, MASK, clip_eps=0.2, beta=0.5)[0].backward()
    assert [x.grad is not None for x in inputs] == [True, False, False, False]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30, -1e30])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_masked_entries_are_ignored(garbage, which):
    clean, dirty = worked_example(), worked_example()
    with torch.no_grad():
        for i in which:
            dirty[i][1, 2] = garbage
    results = []
    for inputs in (clean, dirty):
        loss, stats = grpo_loss(*inputs, ADVANTAGES, MASK, clip_eps=0.2, beta=0.5)
        loss.backward()
        stats = {name: value.item() for name, value in stats.items()}
        results.append((loss.item(), inputs[0].grad.tolist(), stats))
    assert results[0] == results[1]


def test_a_completion_without_tokens():
    # It adds 0 and still counts: J = (2 + 0) / 2 = 1; the other's token has gradient
    # -2 / (2 * 1) = -1.
    log_probs = f64([[-1, NAN], [NAN, NAN]]).requires_grad_()
    inputs = log_probs, log_probs, log_probs, f64([2, 5])
    mask = torch.tensor([[True, False], [False, False]])
    loss, _ = grpo_loss(*inputs, mask, clip_eps=0.2, beta=0.5)
    loss.backward()
    close(loss, -1)
    close(log_probs.grad, [[-1, 0], [0, 0]])
    loss, stats = grpo_loss(*inputs, mask & False, clip_eps=0.2, beta=0.5)
    assert [loss.item()] + [s.item() for s in stats.values()] == [0, 0, 0]


def test_long_completions_weigh_no_more_than_short_ones():
    # (1 + (2 + 4 + 6) / 3) / 2 = 2.5; the mean over all tokens would be 13 / 4 = 3.25
    mask = torch.tensor([[True, False, False], [True, True, True]])
    close(completion_mean(f64([[1, NAN, 9], [2, 4, 6]]), mask), 2.5)


def test_a_constant_length_by_hand():
    """Dr. GRPO: sums over the constant 4, and the mean over two completions: (1 + 12) / 4 / 2."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    close(completion_mean(f64([[1, NAN, 9], [2, 4, 6]]), mask, 4), 13 / 8)
    # the worked example: 5.4 / 4 and -2.3 / 4, the mean 0.3875; the KL (a + b + a) / 4 / 2 with
    # a + b = 1/2
    loss, stats = grpo_loss(*worked_example(), ADVANTAGES, MASK, 0.2, beta=0.5, length=4)
    close(stats["kl"], (1.5 - math.log(2)) / 8)
    close(loss, -0.3875 + 0.5 * (1.5 - math.log(2)) / 8)


def loss_token_by_token(log_probs, old, ref, advantages, mask, eps, beta):
    """Eqs. 8-10 as the paper writes them, with floats. A token is clipped if its clipped term is
    the smaller one."""
    total, total_kl, clipped, tokens = 0.0, 0.0, 0, 0
    for i, advantage in enumerate(advantages):
        length = max(sum(mask[i]), 1)
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            ratio = math.exp(log_probs[i][t]) / math.exp(old[i][t])
            bounded = min(max(ratio, 1 - eps), 1 + eps)
            kl = math.exp(ref[i][t]) / math.exp(log_probs[i][t]) - (ref[i][t] - log_probs[i][t]) - 1
            total += (min(ratio * advantage, bounded * advantage) - beta * kl) / length
            total_kl += kl / length
            clipped += bounded * advantage < ratio * advantage
            tokens += 1
    n = len(advantages)
    return -total / n, {"kl": total_kl / n, "clip_fraction": clipped / max(tokens, 1)}


@pytest.mark.parametrize("seed", range(20))
def test_against_a_loop_over_tokens(seed):
    N, T = 1 + seed % 6, 1 + seed % 5
    old = -random(N, T, seed=seed).abs()
    log_probs, ref = (old + 0.4 * random(N, T, seed=seed + 100 * k) for k in (1, 2))
    advantages = random(N, seed=seed + 300)
    lengths = torch.randint(0, T + 1, (N, 1), generator=torch.Generator().manual_seed(seed))
    inputs = log_probs, old, ref, advantages, torch.arange(T) < lengths
    loss, stats = grpo_loss(*inputs, clip_eps=0.2, beta=0.3)
    expected, expected_stats = loss_token_by_token(*(x.tolist() for x in inputs), 0.2, 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert stats.keys() == expected_stats.keys()
    for name, value in expected_stats.items():
        rel = 1e-7 if name == "clip_fraction" else 1e-12  # a quotient of integers is float32
        assert stats[name].item() == pytest.approx(value, rel=rel, abs=1e-12)


# --- The packed row ---

def test_packed_layout_by_hand():
    """Two groups of two completions, M = 2. Prompt [7, 8] has the positions 0 and 4, prompt [3] has
    the position 1. q is a context query, . is padding, and the second row starts at flat index 9.

        index      0 1  2 3 4  5 6 7 8         index      9  10 11 12 13  14 15 16  17
        token      7 8  5 q q  6 9 q q         token      3   1  2  q  q   4  q  q   .
        position   0 4  5 6 7  5 6 7 8         position   1   2  3  4  5   2  3  4   .
    """
    tensor = torch.tensor
    packed = pack_groups([tensor([7, 8]), tensor([3])], [tensor([[0, 4]] * 3), tensor([[1]] * 3)],
                         [[tensor([5]), tensor([6, 9])], [tensor([1, 2]), tensor([4])]], M=2)
    assert packed.ids.tolist() == [[7, 8, 5, 0, 0, 6, 9, 0, 0], [3, 1, 2, 0, 0, 4, 0, 0, 0]]
    assert packed.positions.tolist() == 3 * [[[0, 4, 5, 6, 7, 5, 6, 7, 8],
                                              [1, 2, 3, 4, 5, 2, 3, 4, 0]]]
    assert packed.query_places.tolist() == [[3, 4], [7, 8], [12, 13], [15, 16]]
    # 5 and 6 are predicted by the last token of the first prompt, 1 and 4 by that of the second
    assert packed.targets.tolist() == [5, 6, 9, 1, 2, 4]
    assert packed.target_places.tolist() == [1, 1, 5, 9, 10, 9]
    assert packed.mask.tolist() == [[True, False], [True, True], [True, True], [True, False]]
    table = completion_table(f64([1, 2, 3, 4, 5, 6]), packed.mask)
    assert table.tolist() == [[1, 0], [2, 3], [4, 5], [6, 0]]
    # four segments of at most T + M = 4 places; the first and the last one are one place shorter
    assert packed.P == 2
    assert packed.segment_places.tolist() == [[2, 3, 4, 0], [5, 6, 7, 8], [10, 11, 12, 13],
                                              [14, 15, 16, 0]]
    assert packed.no_padding.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    # columns: P of the prompt, of which the second has only one, then the segment itself
    itself = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert packed.segment_mask.int().tolist() == (2 * [[[[1, 1, *row] for row in itself]]]
                                                  + 2 * [[[[1, 0, *row] for row in itself]]])


def plain_attention(query, key, value, allowed, scaling):
    """softmax(scaling Q K^T) V with every head on its own; allowed (B, L, L) bool."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = (scaling * query @ key.transpose(2, 3)).masked_fill(~allowed[:, None], -INF)
    return (scores.softmax(-1) @ value).transpose(1, 2)  # (B, L, heads, d)


@pytest.mark.parametrize("M, key_heads", [(3, 2), (0, 4), (2, 1)])
def test_packed_attention_equals_a_plain_mask(M, key_heads):
    """Outputs and gradients. The plain mask comes from one rule: a place attends to those before it
    and to itself, as far as they belong to its prompt or to its own segment."""
    prompts, lengths, heads, d = [5, 2], [[3, 1, 4], [2, 6, 1]], 4, 8
    packed = pack_groups([torch.ones(P, dtype=torch.long) for P in prompts],
                         [torch.arange(P).expand(3, -1) for P in prompts],
                         [[torch.ones(T, dtype=torch.long) for T in row] for row in lengths], M)
    B, L = packed.ids.shape
    segment = torch.full((B, L), -1)  # 0 in the prompt, then 1 ... G, and -1 on padding
    for b, (P, row) in enumerate(zip(prompts, lengths)):
        names = [0] * P + [g for g, T in enumerate(row, start=1) for _ in range(T + M)]
        segment[b, :len(names)] = torch.tensor(names)
    causal = torch.ones(B, L, L, dtype=torch.bool).tril()
    one_segment = segment[:, :, None] == segment[:, None, :]
    allowed = causal & ((segment == 0)[:, None, :] | one_segment)

    inputs = [random(B, h, L, d, seed=h + i).requires_grad_()
              for i, h in enumerate((heads, key_heads, key_heads))]
    used = (segment >= 0)[:, :, None, None]
    weights = random(B, L, heads, d) * used  # each output has its own, so gradients check them all
    expected = plain_attention(*inputs, allowed, 0.3)
    actual = packed_attention(*inputs, packed, 0.3)
    close(actual * used, expected * used)
    for ours, theirs in zip(torch.autograd.grad((actual * weights).sum(), inputs),
                            torch.autograd.grad((expected * weights).sum(), inputs)):
        close(ours, theirs)
    # The comparison would notice a segment that sees the segments before it.
    assert ((plain_attention(*inputs, causal, 0.3) - expected) * used).abs().max() > 0.1


def test_token_log_probs_equal_a_plain_log_softmax():
    """Values and gradients, in chunks of 8 of 37 states; the last 10 of 50 tokens are forbidden."""
    head = torch.nn.Linear(16, 50, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    hidden = random(37, 16).requires_grad_()
    targets = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(2))
    log_probs, entropy = token_log_probs(head, hidden, targets, torch.arange(50) >= 40,
                                         temperature=0.7, chunk=8)
    table = (hidden @ head.weight.T / 0.7)[:, :40].log_softmax(-1)
    expected = table[torch.arange(37), targets]
    close(log_probs, expected)
    close(entropy, -(table.exp() * table).sum(-1).detach())
    assert not entropy.requires_grad
    weights = random(37, seed=3)
    for ours, theirs in zip(torch.autograd.grad((log_probs * weights).sum(), (hidden, head.weight)),
                            torch.autograd.grad((expected * weights).sum(), (hidden, head.weight))):
        close(ours, theirs)
