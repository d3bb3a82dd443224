"""GRPO as LENS trains with it: rewards -> advantages (Eqs. 6-7) -> clipped objective, KL, loss
(Eqs. 8-10).

Pure functions of tensors; torch is all they import, so take them elsewhere. One step of training
is:

    advantages = group_advantages(rewards).flatten()  # (B, G) -> (N,), N = B * G completions
    loss, stats = grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, 0.2, 0.04)

log_probs (N, T) are those of the tokens that were sampled, under the policy being trained;
old_log_probs under the policy that sampled them; ref_log_probs under the model from which training
started. mask (N, T) is True on a completion's tokens, the end token included, and False on the
padding after it.

Paper: its Eq. 8 has the ratio of whole outputs; ours is token by token, as in GRPO's own paper. The
loss is -J, to be minimised; Eq. 12 as printed adds a loss to an objective that is maximised, so
train_rl.py minimises -J + alpha L_seg. The KL of Eq. 9 is one of the policy, so it is taken on
completion tokens. Released code: it divides by the sample standard deviation, 1/(G-1), where Eq. 6
has 1/G (correction=1 does so); and its ratio is exp(lp - stop_gradient(lp)), always 1, so that it
never clips. We take the paper's.

Do not look for progress in the loss. With one update per batch the ratio is 1 and a group's
advantages sum to zero, so the value starts at about 0, and then it rises by beta times the KL. Its
gradient is not zero, and that is what learns: it raises each token's log-probability by the
advantage of its completion. Watch the rewards."""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def policy_logits(lm_head, hidden, forbidden, temperature):
    """Logits (n, V) in fp32 of the policy that is sampled and trained: the same temperature and the
    same forbidden tokens in both places, else the objective's probabilities are not those of the
    samples."""
    return (lm_head(hidden).float() / temperature).masked_fill(forbidden, -1e9)


def pick_tokens(logits, uniforms=None):
    """One token per row of (n, V): the most likely one, or by inverse CDF from uniforms (n,) in
    [0, 1)."""
    if uniforms is None:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).double().cumsum(-1)
    total = cdf[:, -1:]
    just_below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms[:, None] * total, just_below)
    # the first interval that holds u, never one of width 0
    found = torch.searchsorted(cdf, target, right=True)[:, 0]
    # NaN finds none: training stops at its loss, not here
    return found.clamp(max=logits.shape[-1] - 1)


def token_log_probs(lm_head, hidden, targets, forbidden, temperature=1.0, chunk=128):
    """Log-probabilities (n,) of `targets` (n,) under states (n, C), and the policy's entropy (n,)
    there (no gradient). A chunk's logits are made again in the backward pass, so that no (n, V)
    table outlives it."""
    def of_chunk(states, tokens):
        log_p = policy_logits(lm_head, states, forbidden, temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, tokens[:, None])[:, 0], entropy

    log_probs, entropies = [], []
    for states, tokens in zip(hidden.split(chunk), targets.split(chunk)):
        log_prob, entropy = checkpoint(of_chunk, states, tokens, use_reentrant=False)
        log_probs.append(log_prob)
        entropies.append(entropy)
    return torch.cat(log_probs), torch.cat(entropies)


def completion_table(values, mask):
    """Values (tokens,) of all completions, one after another -> (N, T), 0 where there is no
    token."""
    table = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(mask, values)


def group_advantages(rewards, delta=1e-4, correction=0):
    """Rewards (..., G) of the samples of a group -> their advantages (..., G).

    Eq. 6: mu = 1/G sum r_i and sigma = sqrt(1/G sum (r_i - mu)^2), the population's standard
    deviation. Eq. 7: A_i = (r_i - mu) / (sigma + delta).

    [1, 0, 0, 0] gives [1.732, -0.577, -0.577, -0.577]; correction=1 is the sample standard
    deviation of the released code, 1/(G-1), and gives [1.5, -0.5, -0.5, -0.5]. A group of equal
    rewards teaches nothing: exactly 0."""
    # Taking the group's first reward off all changes nothing in Eq. 7 but makes equal rewards
    # exact zeros. The mean of three times 0.1 is not quite 0.1, and that rounding would pass for an
    # advantage.
    rewards = rewards - rewards[..., :1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (rewards.shape[-1] - correction)  # (..., 1)
    sigma = variance.sqrt()
    return centred / (sigma + delta)


def kl_k3(log_probs, ref_log_probs):
    """Eq. 9, elementwise: pi_ref/pi - log(pi_ref/pi) - 1, that is exp(d) - d - 1 with d = ref -
    log_probs.

    Never negative, zero where the two agree. Its mean over tokens sampled from pi estimates KL(pi
    || pi_ref)."""
    d = ref_log_probs - log_probs
    return torch.expm1(d) - d  # expm1(d) is exp(d) - 1 without the loss of digits near d = 0


def clipped_objective(log_probs, old_log_probs, advantages, clip_eps):
    """Eq. 8, elementwise: min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), with a token's ratio = pi
    / pi_old.

    Log-probabilities (N, T) x 2; advantages broadcast, so give (N,) as (N, 1). A token whose ratio
    has left the range in the direction that its advantage asks for has moved enough for this batch:
    no gradient."""
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)


def completion_mean(values, mask):
    """Mean over each completion's tokens, then over completions: (N, T) and boolean (N, T) -> 0-dim
    tensor.

    A long completion weighs no more than a short one. One without tokens adds 0 and still counts
    among the N."""
    lengths = mask.sum(-1).clamp(min=1)  # (N,), 1 where there is nothing to divide
    return (values.masked_fill(~mask, 0).sum(-1) / lengths).mean()


def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip_eps, beta):
    """Minus Eq. 10, J = E[1/G sum_i (O_clip_i - beta KL_i)], each a token mean -> loss (0-dim),
    stats.

    log_probs, old_log_probs, ref_log_probs (N, T), of which the first alone gets a gradient;
    advantages (N,); mask (N, T), True on tokens: what stands elsewhere does not matter, be it NaN.
    ref_log_probs may be None if beta is 0, else that raises ValueError. stats are detached 0-dim
    tensors: 'kl', weighted as in the loss (0 without ref_log_probs); and over all tokens alike
    'clip_fraction', the share whose gradient the clip took away."""
    if ref_log_probs is None and beta != 0:
        raise ValueError("beta is not 0, so the KL needs ref_log_probs")
    mask = mask.bool()
    # completion_mean keeps masked values out of the loss, this out of the gradient: 0 * NaN is NaN.
    log_probs = log_probs.masked_fill(~mask, 0)
    old, advantages = old_log_probs.detach(), advantages.detach()[:, None]  # (N, T), (N, 1)
    loss = -completion_mean(clipped_objective(log_probs, old, advantages, clip_eps), mask)
    kl = torch.zeros_like(loss.detach())
    if ref_log_probs is not None:
        kl = completion_mean(kl_k3(log_probs, ref_log_probs.detach()), mask)
        loss = loss + beta * kl
    clipped = _clip_fraction(log_probs.detach(), old, advantages, mask, clip_eps)
    return loss, {"kl": kl.detach(), "clip_fraction": clipped}


def _clip_fraction(log_probs, old_log_probs, advantages, mask, clip_eps):
    """Share of tokens whose ratio has left the clip's range: (N, T) x 2, (N, 1), (N, T) -> 0-dim
    tensor."""
    ratio = torch.exp(log_probs - old_log_probs)  # (N, T)
    too_high = (ratio > 1 + clip_eps) & (advantages > 0)
    too_low = (ratio < 1 - clip_eps) & (advantages < 0)
    clipped = (too_high | too_low) & mask
    return clipped.sum() / mask.sum().clamp(min=1)


def segmentation_loss(logits, truth, focal=False, weights=None):
    """L_seg of Eqs. 5 and 12: dice + binary cross-entropy at weights 1 : 1 (the released code's;
    the paper names dice and focal as examples). logits (N, h, w) at the decoder's resolution S/4;
    truth (N, h, w) in [0, 1], area-averaged to it; weights (N, h, w) in [0, 1], the share of each
    cell that is not ignored. -> (N,), 0 where all is ignored"""
    weights = torch.ones_like(truth) if weights is None else weights
    p = logits.sigmoid()
    overlap = (weights * p * truth).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / ((weights * (p + truth)).sum((1, 2)) + 1)
    pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if focal:                                        # Lin et al. 2017, gamma 2, alpha 0.25
        pixel = pixel * (p - truth).abs() ** 2 * (0.25 * truth + 0.75 * (1 - truth))
    return dice + (weights * pixel).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)
