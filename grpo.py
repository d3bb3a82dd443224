"""GRPO as LENS trains with it: rewards become advantages (Eqs. 6-7), advantages become a loss
(Eqs. 8-10). LENS is the paper that README.md cites, and equation numbers are that paper's.

This file imports torch alone, so you can copy it into any project. One training step is two calls:

    advantages = group_advantages(rewards).flatten()          # (B, G) -> (N,)
    loss, stats = grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask,
                            clip_eps=0.2, beta=0.04)

A prompt is answered G times. The G sampled texts (completions) are its group, and each completion
has a reward. B prompts give N = B * G completions of at most T tokens.

A policy is a language model, seen as a distribution over the next token. For every sampled token
the loss needs its log-probability under three policies, each as a tensor (N, T):

    log_probs       the policy that is being trained (pi)
    old_log_probs   the policy that sampled the tokens (pi_old)
    ref_log_probs   the policy from which this training started (pi_ref)

mask (N, T) is True on the tokens of a completion, its end token included, and False on the padding
after them.

Do not look for progress in the loss. With one update per batch of samples (the default), pi equals
pi_old when the loss is computed, and the advantages of a group sum to zero. So the loss starts at
about 0, and it rises by beta times the KL, a penalty for moving away from pi_ref (Eq. 9). Its
gradient is not zero, and the gradient is what learns: it makes every token of a completion more
likely if the advantage is positive, and less likely if it is negative. Watch the rewards instead.

Two more sections follow the loss. One saves time: it lays a whole group out as one row of tokens,
so that the prompt is computed once and not G times. The other saves memory: it computes
log-probabilities without ever keeping all logits.

Departures from the paper
- Eq. 8 is written with the probability of a whole completion. We take the ratio token by token, as
  the GRPO paper does.
- We minimise -J, where J is the objective of Eq. 10. The paper's total objective (Eq. 12) as
  printed adds the loss of the segmentation mask to J, although J is maximised.
- The paper says that Eq. 9 keeps the context queries (learned vectors, see model.py) near their
  start. But it is a KL between two policies over text, so we take it on the completion tokens.
The released code divides by the sample standard deviation in Eq. 6 (here `deviation="sample"`), and
its ratio is always 1, so it never clips.

Variants of GRPO, each off by default
- Dr. GRPO (arXiv 2503.20783): no division by sigma (`deviation="none"`), and a constant in the
  place of a completion's length (`length`).
- GDPO (arXiv 2601.05242): every reward has its own advantages, which are then summed
  (`sum_of_advantages`).
- No KL: `beta=0`. Cut completions without a say, as in DAPO (arXiv 2503.14476): clear their rows
  of `mask`.
- Clip-higher (also DAPO), CISPO and GSPO change what happens once the ratio has moved away from 1.
  With one update per batch it is 1 whenever the gradient is taken, so they would change nothing.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards, deviation="population", delta=1e-4):
    """Eqs. 6 and 7: how much better each completion is than its group.

        mu    = 1/G sum_i r_i
        sigma = sqrt(1/G sum_i (r_i - mu)^2)
        A_i   = (r_i - mu) / (sigma + delta)

    Rewards (..., G) -> advantages (..., G). The rewards [1, 0, 0, 0] give
    [1.732, -0.577, -0.577, -0.577]. A group of equal rewards gives exact zeros: it teaches nothing.

    deviation "sample" divides by G - 1 instead of G in Eq. 6, as the released code does. That gives
    [1.5, -0.5, -0.5, -0.5].

    "none" is Dr. GRPO's A_i = r_i - mu. Eq. 7 makes all groups equally loud: one in which a single
    completion differs a little, and one in which half succeed and half fail. Without sigma the
    second says more. The example gives [0.75, -0.25, -0.25, -0.25].
    """
    # Subtracting the first reward changes nothing in Eq. 7, but it turns equal rewards into exact
    # zeros. Without it, the mean of three times 0.1 is not quite 0.1, and that rounding error,
    # divided by a tiny sigma, would pass for an advantage.
    rewards = rewards - rewards[..., :1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    if deviation == "none":
        return centred
    sigma = centred.std(-1, correction=int(deviation == "sample"), keepdim=True)  # (..., 1)
    return centred / (sigma + delta)


def sum_of_advantages(rewards, weights):
    """GDPO: A_i = sum_k w_k A_ki, where A_k are the advantages of the k-th reward alone.

    rewards: K tensors (..., G); weights: K numbers -> (..., G)
    The usual order, first the sum (Eq. 11) and then the advantage, lets a reward that varies much
    drown one that varies little. Here each counts by its weight, whatever its scale. (GDPO goes on
    to normalise the result over the whole batch. That is left out.)
    """
    return sum(w * group_advantages(r) for w, r in zip(weights, rewards))


def clipped_objective(log_probs, old_log_probs, advantages, clip_eps):
    """Eq. 8, for each token: O_clip = min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), where
    ratio = pi / pi_old.

    log_probs and old_log_probs (N, T); advantages broadcast, so pass (N, 1) -> (N, T). Once the
    ratio has moved by eps in the direction that the advantage asks for, the token has moved enough
    for this batch and gets no more gradient.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)


def kl_k3(log_probs, ref_log_probs):
    """Eq. 9, for each token: D_KL = pi_ref / pi - log(pi_ref / pi) - 1.

    With d = ref_log_probs - log_probs this is exp(d) - d - 1. It is never negative, and zero where
    the two policies agree. Its mean over tokens sampled from pi estimates KL(pi || pi_ref). Two
    tensors of one shape -> a tensor of that shape.
    """
    d = ref_log_probs - log_probs
    return torch.expm1(d) - d  # expm1(d) is exp(d) - 1, without losing digits near d = 0


def completion_mean(values, mask, length=None):
    """The mean over the tokens of each completion, then the mean over the completions.

    values (N, T) and boolean mask (N, T) -> scalar tensor. So a long completion weighs no more than
    a short one. A completion without tokens adds 0 and still counts among the N.

    With `length`, the sum over a completion's tokens is divided by that number instead (Dr. GRPO).
    Then every token weighs the same. With its own length, a token of a long completion weighs less,
    so a long wrong completion is punished less, token by token, than a short one.
    """
    # (N,); 1 where there are no tokens, to avoid 0 / 0
    lengths = length or mask.sum(-1).clamp(min=1)
    return (values.masked_fill(~mask, 0).sum(-1) / lengths).mean()


def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip_eps, beta,
              length=None):
    """Minus Eq. 10: J = E[1/G sum_i (O_clip_i - beta * D_KL_i)]. -> loss (scalar tensor), stats

    O_clip_i and D_KL_i are means over the tokens of completion i, and E is the mean over the B
    groups. So the loss is a mean over all N completions. (length: see completion_mean)

    log_probs, old_log_probs and ref_log_probs (N, T); advantages (N,); boolean mask (N, T). Only
    log_probs receives gradients. Entries where mask is False are ignored, even if they are NaN.
    ref_log_probs may be None if beta is 0; otherwise None raises ValueError.

    stats holds two detached scalar tensors. "kl" is the mean that the loss contains (0 without
    ref_log_probs). "clip_fraction" is the share of all tokens whose gradient the clip removed.
    """
    if ref_log_probs is None and beta != 0:
        raise ValueError("beta is not 0, so the KL needs ref_log_probs")
    mask = mask.bool()
    # completion_mean keeps ignored entries out of the loss. But the backward through exp turns
    # their zero gradient into NaN if any of the three tensors holds NaN there (0 * NaN). The
    # backward of this masked_fill makes it 0 again.
    log_probs = log_probs.masked_fill(~mask, 0)
    old_log_probs = old_log_probs.detach()
    advantages = advantages.detach()[:, None]  # (N, 1)
    gain = clipped_objective(log_probs, old_log_probs, advantages, clip_eps)
    loss = -completion_mean(gain, mask, length)
    kl = torch.zeros_like(loss.detach())
    if ref_log_probs is not None:
        kl = completion_mean(kl_k3(log_probs, ref_log_probs.detach()), mask, length)
        loss = loss + beta * kl
    ratio = torch.exp(log_probs.detach() - old_log_probs)  # (N, T)
    clipped = (gain < ratio * advantages) & mask  # the minimum of Eq. 8 is the clipped side
    return loss, {"kl": kl.detach(), "clip_fraction": clipped.sum() / mask.sum().clamp(min=1)}


# --- The same numbers, faster: a group as one packed row ------------------------------------------
#
# The G completions of a group share one prompt. Instead of G rows [prompt, completion], a group is
# one row:
#
#     [prompt] [completion 1, M queries] [completion 2, M queries] ... [completion G, M queries]
#
# The context queries are M learned vectors that follow every completion (model.py). With
# M = 0 this is a packed row for GRPO on any language model. Positions have three axes (time, y,
# x), as in Qwen's vision-language models; if a model's have one, repeat them three times. A
# completion together with its queries is called a segment. Two things make the row equal to G
# separate rows: every segment attends to the prompt and to itself only, and its positions continue
# from the end of the prompt, as if the other segments were not there.
#
# B groups are B rows, padded to one length L. Token l of row b has the flat index b * L + l. Names
# that end in `places` hold flat indices. To get the states (B, L, C), run the model on packed.ids
# and packed.positions, with the queries written into the embeddings at packed.query_places, and
# with packed_attention in every layer (model.py does this). From there to `grpo_loss`:
#
#     hidden = states.flatten(0, 1)[packed.target_places]                    # (tokens, C)
#     log_probs, _ = token_log_probs(lm_head, hidden, packed.targets, forbidden)
#     log_probs = completion_table(log_probs, packed.mask)                   # (N, T)

@dataclass
class PackedGroups:
    """B groups as B packed rows. `pack_groups` makes it."""
    ids: torch.Tensor            # (B, L) tokens of prompts and completions; 0 for queries, padding
    positions: torch.Tensor      # (3, B, L) positions; those of Qwen have three axes: time, y, x
    query_places: torch.Tensor   # (N, M) flat index of every context query
    targets: torch.Tensor        # (tokens,) the tokens of all completions, one after another
    target_places: torch.Tensor  # (tokens,) flat index of the state that predicts each target
    mask: torch.Tensor           # (N, T) bool: True on the tokens of each completion, False on the
    #                              padding after them; the `mask` of grpo_loss
    # the rest is for packed_attention
    P: int                         # the length of the longest prompt
    segment_places: torch.Tensor   # (N, T + M) flat index of every token and query; 0 for padding
    segment_mask: torch.Tensor     # (N, 1, T + M, P + T + M) bool: what each of them attends to
    no_padding: torch.Tensor       # indices into segment_places.flatten(), all that are no padding


def pack_groups(prompt_ids, positions, completions, M, device="cpu"):
    """Lay B groups out as B packed rows on `device`. -> PackedGroups

    prompt_ids: B x (P_b,); positions: B x (3, P_b), those of the prompt tokens; completions:
    B x G x (T_i,) with T_i >= 1. All hold integer tensors on the CPU. M: queries per completion.
    """
    B, G = len(prompt_ids), len(completions[0])
    P = max(len(ids) for ids in prompt_ids)
    T = max(len(completion) for group in completions for completion in group)
    L = max(len(ids) + sum(len(completion) + M for completion in group)
            for ids, group in zip(prompt_ids, completions))
    row_ids = torch.zeros(B, L, dtype=torch.long)
    row_positions = torch.zeros(3, B, L, dtype=torch.long)
    segment_places = torch.full((B * G, T + M), -1)  # -1 marks padding
    query_places = torch.empty(B * G, M, dtype=torch.long)
    targets, target_places = [], []
    for b, (ids, position, group) in enumerate(zip(prompt_ids, positions, completions)):
        row_ids[b, :len(ids)] = ids
        row_positions[:, b, :len(ids)] = position
        next_position = int(position.max()) + 1  # an image takes fewer positions than tokens
        end_of_prompt = torch.tensor([b * L + len(ids) - 1])
        start = len(ids)  # where the next segment begins in its row
        for g, completion in enumerate(group):
            tokens, length = len(completion), len(completion) + M
            n, places = b * G + g, b * L + start + torch.arange(length)
            row_ids[b, start:start + tokens] = completion
            row_positions[:, b, start:start + length] = next_position + torch.arange(length)
            segment_places[n, :length] = places
            query_places[n] = places[tokens:]
            targets.append(completion)
            # the prompt's last state predicts the first token, each token's state the next one
            target_places += [end_of_prompt, places[:tokens - 1]]
            start += length

    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids]).repeat_interleave(G)
    lengths = torch.tensor([len(completion) for group in completions for completion in group])

    def move(tensor):
        return tensor.to(device, non_blocking=True)
    return PackedGroups(
        ids=move(row_ids), positions=move(row_positions), query_places=move(query_places),
        targets=move(torch.cat(targets)), target_places=move(torch.cat(target_places)),
        mask=move(torch.arange(T) < lengths[:, None]), P=P,
        segment_places=move(segment_places.clamp(min=0)),
        segment_mask=segment_attention_mask(move(prompt_lengths), P, T + M),
        no_padding=move((segment_places >= 0).flatten().nonzero()[:, 0]))


def segment_attention_mask(prompt_lengths, P, length):
    """True where a token of a segment attends to a token of its prompt (the first P columns), or to
    itself or an earlier token of its own segment (the others). prompt_lengths (N,); length = T + M.
    -> (N, 1, length, P + length) bool"""
    N, device = len(prompt_lengths), prompt_lengths.device
    to_prompt = torch.arange(P, device=device) < prompt_lengths[:, None]  # (N, P)
    to_itself = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.cat([to_prompt[:, None].expand(N, length, P),
                      to_itself.expand(N, length, length)], 2)[:, None]


def packed_attention(query, key, value, packed, scaling):
    """Attention in packed rows: the prompt attends to itself, and every segment to its prompt and
    to itself. So a segment costs its own length, not that of the row.

    query (B, heads, L, d); key and value (B, key heads, L, d) -> (B, L, heads, d)

    Every row begins with its prompt, so one causal pass over the first P columns serves all B
    prompts. Where a prompt is shorter than P, those columns already hold segments, and that pass
    computes something wrong for them. The last step overwrites it.
    """
    (B, heads, L, d), P = query.shape, packed.P
    G = len(packed.segment_places) // B

    def segments_of(x):  # (B, h, L, d) -> (N, h, T + M, d)
        states = x.transpose(1, 2).flatten(0, 1).index_select(0, packed.segment_places.flatten())
        return states.view(*packed.segment_places.shape, -1, d).transpose(1, 2)

    def prompt_and_segments_of(x):  # (B, h, L, d) -> (N, h, P + T + M, d)
        return torch.cat([x[:, :, :P].repeat_interleave(G, 0), segments_of(x)], 2)

    prompts = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P],
                                             is_causal=True, scale=scaling, enable_gqa=True)
    segments = masked_attention(segments_of(query), prompt_and_segments_of(key),
                                prompt_and_segments_of(value), packed.segment_mask, scaling)
    # put both back into rows: the prompts, zeros after them, and the segments over that
    out = F.pad(prompts, (0, 0, 0, L - P)).transpose(1, 2).flatten(0, 1)  # (B * L, heads, d)
    segments = segments.transpose(1, 2).flatten(0, 1)                     # (N * (T + M), heads, d)
    places = packed.segment_places.flatten()[packed.no_padding]
    return out.index_copy(0, places, segments[packed.no_padding]).view(B, L, heads, d)


def masked_attention(query, key, value, mask, scaling):
    """Attention with a mask and with grouped heads: query (n, heads, q, d), key and value (n, key
    heads, k, d), boolean mask (n, 1, q, k) -> (n, heads, q, d).

    Fused kernels reject a mask together with grouped key/value heads. So the query heads that share
    one key head are stacked as extra query rows of it.
    """
    n, heads, length, d = query.shape
    shared = heads // key.shape[1]
    rows = query.reshape(n, heads // shared, shared * length, d)
    mask = mask.repeat(1, 1, shared, 1) if shared > 1 else mask
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, heads, length, d)


# --- The log-probabilities of sampled tokens, without ever keeping all logits ---------------------

def policy_logits(lm_head, hidden, forbidden, temperature):
    """The logits of the policy: hidden (n, C), the last hidden states of a language model of width
    C, -> (n, V) for its vocabulary of V tokens, in fp32 or better.

    forbidden (V,) bool marks tokens that are never sampled. Sampling and training both call this,
    since the loss is only right if both mean the same policy: the same temperature and the same
    forbidden tokens."""
    logits = lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # not -inf: in the entropy, 0 * inf would be NaN
    return (logits / temperature).masked_fill(forbidden, -1e9)


def token_log_probs(lm_head, hidden, targets, forbidden, temperature=1.0, chunk=128):
    """The log-probabilities (n,) of the tokens `targets` (n,), each given the hidden state (n, C)
    that predicts it, and the entropy (n,) of the policy there, which gets no gradient.

    The logits exist for `chunk` states at a time and are computed again in the backward pass. A
    whole (n, V) tensor never exists. At V = 151,936 it would be the largest tensor of the step.
    """
    def chunk_log_probs(states, tokens):
        log_p = policy_logits(lm_head, states, forbidden, temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, tokens[:, None])[:, 0], entropy

    log_probs, entropies = [], []
    for states, tokens in zip(hidden.split(chunk), targets.split(chunk)):
        log_prob, entropy = checkpoint(chunk_log_probs, states, tokens, use_reentrant=False)
        log_probs.append(log_prob)
        entropies.append(entropy)
    return torch.cat(log_probs), torch.cat(entropies)


def completion_table(values, mask):
    """One value per token, completion after completion (tokens,) -> (N, T) with 0 where mask (N, T)
    is False."""
    table = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(mask, values)
