"""The group forward, sampling and the parts of Lens, against independent computations."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import END, VOCABULARY, random_batch, random_completions

import model
from model import (completion_table, generate, group_mask, pack_groups, pick_tokens, prompt_positions, set_trainable,
                   token_log_probs)


def naive_sample(lens, batch, b, patches, completion):
    """One completion alone, without any packing: prompt + completion + queries through the MLLM, one picture through
    SAM's encoder, one prompt through its decoder. -> log-probs (T,), query states (M, C), mask logits (S/4, S/4)."""
    mllm, ids, M = lens.mllm, batch["ids"][b], len(lens.queries)
    whole = torch.cat([ids, completion])
    embeds = mllm.get_input_embeddings()(whole)[None].clone()
    features = torch.cat(mllm.model.get_image_features(patches, batch["grid_thw"][b:b + 1]).pooler_output)
    embeds = embeds.masked_scatter((whole == mllm.config.image_token_id)[None, :, None], features)
    embeds = torch.cat([embeds, lens.queries[None]], 1)
    positions, _ = mllm.model.get_rope_index(ids[None], mm_token_type_ids=batch["types"][b][None],
                                             image_grid_thw=batch["grid_thw"][b:b + 1])
    tail = positions.max() + 1 + torch.arange(len(completion) + M)
    positions = torch.cat([positions, tail.expand(3, 1, -1)], -1)
    hidden = mllm.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[0]
    P, T = len(ids), len(completion)
    logits = mllm.lm_head(hidden[P - 1:P + T - 1]).masked_fill(lens.forbidden, float("-inf"))
    log_probs = logits.log_softmax(-1)[torch.arange(T), completion]
    states = hidden[P + T:]
    features = lens.image_encoder(batch["sam_pixels"][b:b + 1])["backbone_fpn"]
    return log_probs, states, lens.sam(features, lens.connector(states[None])[None])[0]


def weighted_sum(log_probs, states, masks, seed=5):
    """A scalar that every output enters with its own weight, so that its gradient checks them all."""
    g = torch.Generator().manual_seed(seed)
    return sum((x * torch.randn(x.shape, generator=g)).sum() for xs in (log_probs, states, masks) for x in xs)


def naive_group(lens, batch, completions):
    cuts = batch["grid_thw"].prod(-1).tolist()
    patches = batch["pixel_values"].split(cuts)
    samples = [naive_sample(lens, batch, b, patches[b], c) for b, group in enumerate(completions) for c in group]
    return tuple(zip(*samples))


def packed_group(lens, batch, completions):
    packed = pack_groups(batch["ids"], prompt_positions(lens.mllm, batch), completions, len(lens.queries))
    out = lens(batch, packed, lens.encode_pictures(batch["sam_pixels"]))
    lengths = [len(c) for group in completions for c in group]
    assert (out["log_probs"][~packed["mask"]] == 0).all()
    return [row[:n] for row, n in zip(out["log_probs"], lengths)], out["query_states"], out["mask_logits"]


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_forward_equals_separate_forwards(lens, checkpointing):
    set_trainable(lens, "rl")
    batch, completions = random_batch(), random_completions()
    naive = naive_group(lens, batch, completions)
    weighted_sum(*naive).backward()
    expected = {n: p.grad.clone() for n, p in lens.named_parameters() if p.grad is not None}
    lens.zero_grad()
    if checkpointing:
        lens.mllm.train()
        lens.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    ours = packed_group(lens, batch, completions)
    for a, b in zip(ours, naive):
        assert largest_difference(a, b) < 1e-5
    weighted_sum(*ours).backward()
    assert {"queries", "mllm.lm_head.weight", "connector.blocks.3.fc2.weight"} <= set(expected)
    for name, parameter in lens.named_parameters():
        if name in expected:
            scale = expected[name].abs().max().clamp(min=1e-2)
            assert (parameter.grad - expected[name]).abs().max() / scale < 1e-4, name


def test_a_completion_that_sees_another_is_caught(lens, monkeypatch):
    """The oracle above must notice a leak: here every completion sees those before it."""
    batch, completions = random_batch(), random_completions()
    with torch.no_grad():
        naive = naive_group(lens, batch, completions)
        monkeypatch.setattr(model, "group_mask", lambda s: (torch.ones(s.shape[1], s.shape[1]).tril().bool()
                                                            & (s[:, None] >= 0) | torch.eye(s.shape[1]).bool())[:, None])
        leaky = packed_group(lens, batch, completions)
    assert largest_difference(leaky[0], naive[0]) > 1e-2 and largest_difference(leaky[1], naive[1]) > 1e-2
    assert largest_difference(leaky[0][:1], naive[0][:1]) < 1e-5            # the first completion has nothing before it


def test_log_probs_equal_hugging_faces_own_forward(lens):
    """No code of ours in the oracle: ids in, logits out, positions and pictures by transformers."""
    batch, completions = random_batch(), random_completions()
    with torch.no_grad():
        ours, _, _ = packed_group(lens, batch, completions)
        cuts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
        for n, row in enumerate(ours):
            b, completion = n // 3, completions[n // 3][n % 3]
            ids = torch.cat([batch["ids"][b], completion])[None]
            logits = lens.mllm(input_ids=ids, pixel_values=cuts[b], image_grid_thw=batch["grid_thw"][b:b + 1],
                               mm_token_type_ids=(ids == 255).int()).logits[0]
            P = len(batch["ids"][b])
            expected = logits[P - 1:-1].masked_fill(lens.forbidden, float("-inf")).log_softmax(-1)
            assert torch.allclose(row, expected[torch.arange(len(completion)), completion], atol=1e-5)


def test_group_mask_by_hand():
    """Prompt of 2, completion 1 of 2, completion 2 of 1, one padding slot."""
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    expected = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0],
                             [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]).bool()
    assert torch.equal(group_mask(segments)[0, 0], expected)


def test_packed_layout_by_hand():
    """Prompt [7, 8] ends at position 4; completions [5] and [6, 9]; M = 2."""
    packed = pack_groups([torch.tensor([7, 8])], [torch.tensor([[0, 4]] * 3)], [[torch.tensor([5]), torch.tensor([6, 9])]], 2)
    assert packed["ids"].tolist() == [[7, 8, 5, 0, 0, 6, 9, 0, 0]]
    assert packed["positions"][0].tolist() == [[0, 4, 5, 6, 7, 5, 6, 7, 8]]
    assert packed["segments"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert packed["queries"].tolist() == [[3, 4], [7, 8]]
    assert packed["predictors"].tolist() == [1, 1, 5] and packed["targets"].tolist() == [5, 6, 9]
    assert packed["mask"].tolist() == [[True, False], [True, True]]


def test_token_log_probs_chunked_equals_whole():
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False)
    hidden, targets = torch.randn(37, 16, generator=g, requires_grad=True), torch.randint(0, 40, (37,), generator=g)
    forbidden = torch.arange(50) >= 40
    log_probs, entropy = token_log_probs(head, hidden, targets, forbidden, temperature=0.7, chunk=8)
    table = (F.linear(hidden, head.weight)[:, :40] / 0.7).log_softmax(-1)
    assert torch.allclose(log_probs, table[torch.arange(37), targets], atol=1e-6)
    assert torch.allclose(entropy, -(table.exp() * table).sum(-1), atol=1e-5) and not entropy.requires_grad
    grads = [torch.autograd.grad(x.sum(), (hidden, head.weight)) for x in (log_probs, table[torch.arange(37), targets])]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_completion_table():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert completion_table(torch.tensor([1., 2., 3.]), mask).tolist() == [[1, 2, 0], [3, 0, 0]]


# Sampling


def test_inverse_cdf_by_hand():
    """p = [.1, 0, .2, .7]: the token is the first whose cumulative sum exceeds u; a token of probability 0 never comes."""
    logits = torch.tensor([.1, 0., .2, .7], dtype=torch.float64).log().expand(7, 4)
    u = torch.tensor([0., .05, .0999, .1001, .2999, .3001, 1 - 2 ** -53], dtype=torch.float64)
    assert pick_tokens(logits, u).tolist() == [0, 0, 0, 2, 2, 3, 3]
    assert pick_tokens(logits).tolist() == [3] * 7


def test_sampled_frequencies_follow_the_probabilities():
    p = torch.tensor([.5, .25, .125, .125])
    u = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(pick_tokens(p.log().expand(40_000, 4), u), minlength=4) / 40_000
    assert (share - p).abs().max() < 0.01                                    # four standard deviations


def sample(lens, batch, G, uniforms=None, longest=12, **options):
    return generate(lens.mllm, batch, prompt_positions(lens.mllm, batch), G, longest, END, lens.forbidden, uniforms, **options)


def test_greedy_equals_hugging_faces_generate(lens):
    batch = random_batch()
    ours, finished = sample(lens, batch, G=2, longest=20)
    cuts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    banned = [[i] for i in range(VOCABULARY) if lens.forbidden[i]]
    for b, ids in enumerate(batch["ids"]):
        out = lens.mllm.generate(input_ids=ids[None], pixel_values=cuts[b], image_grid_thw=batch["grid_thw"][b:b + 1],
                                 mm_token_type_ids=batch["types"][b][None].int(), attention_mask=torch.ones_like(ids)[None],
                                 do_sample=False, max_new_tokens=20, bad_words_ids=banned, eos_token_id=END, pad_token_id=0)
        expected = out[0, len(ids):]
        assert torch.equal(ours[b][0], expected) and torch.equal(ours[b][1], expected)
        assert finished[b][0] == (expected[-1] == END)


def test_a_sample_does_not_depend_on_its_batch(lens):
    """The same uniforms give the same completion alone, in a batch, beside other samples, and through compaction."""
    lens.mllm.lm_head.weight.data[END] *= 1.5                                # ends come often: the batch is compacted
    batch, G, longest = random_batch(), 6, 40
    uniforms = torch.rand(2 * G, longest, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together, finished = sample(lens, batch, G, uniforms, longest)
    lengths = [len(c) for group in together for c in group]
    assert min(lengths) < 8 and max(lengths) > 16 and any(f for group in finished for f in group)
    first, second = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    for b, pixels in enumerate((first, second)):
        alone = {"ids": batch["ids"][b:b + 1], "types": batch["types"][b:b + 1], "pixel_values": pixels,
                 "grid_thw": batch["grid_thw"][b:b + 1]}
        for g in range(G):
            again, done = sample(lens, alone, 1, uniforms[b * G + g:b * G + g + 1], longest)
            assert torch.equal(again[0][0], together[b][g]) and done[0][0] == finished[b][g]


def test_sampled_log_probs_are_those_of_the_loss(lens):
    """The policy that samples is the policy that is trained: with temperature 2 and forbidden tokens, the frequency of a
    first token is exp of the log-prob that the packed forward gives it."""
    batch, n = random_batch(((1, 4, 4),), (5,)), 4000
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]   # a fine comb instead of chance
    completions, _ = sample(lens, batch, n, uniforms, longest=1, temperature=2.0)
    tokens = torch.cat(completions[0])
    assert not lens.forbidden[tokens].any()
    packed = pack_groups(batch["ids"], prompt_positions(lens.mllm, batch), [[t[None] for t in tokens.unique()]], 5)
    with torch.no_grad():
        out = lens(batch, packed, lens.encode_pictures(batch["sam_pixels"]), temperature=2.0)
    share = torch.bincount(tokens, minlength=VOCABULARY)[tokens.unique()] / n
    assert (out["log_probs"][:, 0].exp() - share).abs().max() < 1.5 / n


def test_uncut_completion_is_reported_unfinished(lens):
    lens.mllm.lm_head.weight.data[END] = 0
    lens.mllm.lm_head.weight.data[END, 0] = -100
    completions, finished = sample(lens, random_batch(), 2, longest=3)
    assert {len(c) for group in completions for c in group} <= {1, 2, 3}
    for group, flags in zip(completions, finished):
        for completion, flag in zip(group, flags):
            assert flag == (completion[-1] == END)


# What trains, what is saved


@pytest.mark.parametrize("stage, moving", [("align", ("queries", "connector.")), ("rl", ("queries", "connector.", "mllm.", "sam."))])
def test_what_trains_in_each_stage(lens, stage, moving):
    """After one step, nothing outside the stage's parts has moved, and every part that trains has."""
    set_trainable(lens, stage)
    before = {n: p.detach().clone() for n, p in lens.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in lens.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    weighted_sum(*packed_group(lens, random_batch(), random_completions())).backward()
    optimizer.step()
    moved = {n for n, p in lens.named_parameters() if not torch.equal(p, before[n])}
    assert all(n.startswith(moving) for n in moved)
    assert all(p.grad is None for n, p in lens.named_parameters() if not n.startswith(moving))
    wanted = {"queries", "connector.position", "connector.blocks.0.qkv.weight", "connector.to_sam.2.weight"}
    if stage == "rl":
        wanted |= {"mllm.model.visual.blocks.0.attn.qkv.weight", "mllm.model.language_model.layers.0.mlp.up_proj.weight",
                   "mllm.lm_head.weight", "sam.sam_mask_decoder.conv_s0.weight", "sam.sam_mask_decoder.mask_tokens.weight",
                   "sam.no_mem_embed", "sam.sam_prompt_encoder.no_mask_embed.weight"}
    assert wanted <= moved


@pytest.mark.parametrize("kind, tokens, expected", [("vit", "all", 5), ("vit", "one", 1), ("mlp", "all", 5)])
def test_connector_shapes(kind, tokens, expected):
    connector = model.Connector(64, 5, 32, kind, 4, tokens)
    assert connector(torch.randn(3, 5, 64)).shape == (3, expected, 32)


def test_mlp_connector_treats_queries_apart_and_vit_does_not():
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[0, 4] *= -1
    for kind, apart in (("mlp", True), ("vit", False)):
        connector = model.Connector(64, 5, 32, kind, 4)
        assert torch.allclose(connector(x)[0, :4], connector(y)[0, :4], atol=1e-7) == apart


def test_sam_head_equals_sams_own_predictor_path(lens):
    """Our features and decoding against SAM2Base's own forward_image and _forward_sam_heads, for a box prompt."""
    from conftest import random_sam
    sam = random_sam().eval()
    head = model.SamHead(copy.deepcopy(sam)).eval()
    pixels, box = torch.randn(1, 3, 128, 128), torch.tensor([[20., 30., 90., 100.]])
    with torch.no_grad():
        ours = head(sam.image_encoder(pixels)["backbone_fpn"], head.box_prompts(box)[None])
        maps = sam.forward_image(pixels)["backbone_fpn"]
        points = {"point_coords": box.view(1, 2, 2), "point_labels": torch.tensor([[2, 3]])}
        theirs = sam._forward_sam_heads(maps[2] + sam.no_mem_embed.view(1, -1, 1, 1), points, None, maps[:2],
                                        multimask_output=False)[3]
    assert torch.allclose(ours, theirs[:, 0], atol=1e-5)


def test_forbidden_tokens():
    from transformers import AutoProcessor
    tokenizer = AutoProcessor.from_pretrained("tests/tiny/mllm").tokenizer
    forbidden = model.forbidden_tokens(tokenizer, len(tokenizer) + 5)
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>", "<|endoftext|>"):
        assert forbidden[tokenizer.convert_tokens_to_ids(token)]
    assert forbidden[len(tokenizer):].all() and not forbidden[tokenizer.eos_token_id]
    assert not forbidden[tokenizer("the red circle at [12, 34]").input_ids].any()


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
def test_official_sam_checkpoint_is_known_by_its_file_name(version, tmp_path):
    """As the sam2 package builds and saves its smallest model; ours must load the same weights, strictly."""
    from sam2.build_sam import build_sam2
    theirs = build_sam2(f"configs/{version}/{version}_hiera_t.yaml", None, device="cpu", apply_postprocessing=False)
    torch.save({"model": theirs.state_dict()}, tmp_path / f"{version}_hiera_tiny.pt")
    ours = model.load_sam(tmp_path / f"{version}_hiera_tiny.pt")
    state = ours.state_dict()
    assert ours.image_size == 1024 and all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    torch.save({"model": {}}, tmp_path / f"{version}_hiera_tiny.pt")
    with pytest.raises(model.LensError, match="not the weights"):
        model.load_sam(tmp_path / f"{version}_hiera_tiny.pt")
