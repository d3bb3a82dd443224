"""The group forward, sampling, the parts of Lens and what it is loaded from, against independent computations."""
import copy
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import END, IMAGE, ROOT, VOCABULARY, random_batch, random_completions, random_sam
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import AutoConfig, AutoModelForImageTextToText

import data
import model
from model import (completion_table, context_positions, generate, group_hidden, pack_groups, pick_tokens,
                   prompt_positions, set_trainable, token_log_probs)

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TIED = pytest.mark.parametrize("tied", [True, False])                        # 2B and 3B have no head of their own, 7B has


def random_family(family, tied=False, vocabulary=VOCABULARY, image=IMAGE, video=254, start=252, end=253):
    """A real, tiny model of any family, random weights, for the same batches as conftest's."""
    torch.manual_seed(0)
    text = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=END, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    text |= {"head_dim": 16} if family == "qwen3_vl" else {}
    vision = dict(depth=2, num_heads=2, patch_size=8, initializer_range=0.2)
    vision |= {"qwen2_vl": dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
               "qwen2_5_vl": dict(hidden_size=32, out_hidden_size=64, intermediate_size=64, window_size=32,
                                  fullatt_block_indexes=[1]),
               "qwen3_vl": dict(hidden_size=32, out_hidden_size=64, intermediate_size=64, num_position_embeddings=64,
                                deepstack_visual_indexes=[0, 1])}[family]
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
                                  vision_start_token_id=start, vision_end_token_id=end, tie_word_embeddings=tied)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").float()


def lens_of(mllm, **settings):
    args = SimpleNamespace(**{**dict(num_queries=5, connector="vit", connector_heads=4, prompt_tokens="all", prompt="paper",
                                     positions="mrope", multimask=False), **settings})
    return model.Lens(mllm, random_sam(), args, torch.arange(VOCABULARY) >= 250, END)


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
        plain = lambda module, q, k, v, mask, scaling=None, group=None, **_: (F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2), None)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "lens", plain)
        leaky = packed_group(lens, batch, completions)
    assert largest_difference(leaky[0], naive[0]) > 1e-2 and largest_difference(leaky[1], naive[1]) > 1e-2
    assert largest_difference(leaky[0][:1], naive[0][:1]) < 1e-5            # the first completion has nothing before it


def hugging_faces_group(mllm, batch, completions, queries):
    """One forward of Hugging Face's per completion, token ids and pictures in: no code of ours. The context queries are
    given as tokens. -> log-probs (T,) and query states (M, C) of each."""
    cuts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    log_probs, states = [], []
    for b, group in enumerate(completions):
        for completion in group:
            ids, P, T = torch.cat([batch["ids"][b], completion, queries])[None], len(batch["ids"][b]), len(completion)
            hidden = mllm.model(input_ids=ids, pixel_values=cuts[b], image_grid_thw=batch["grid_thw"][b:b + 1],
                                mm_token_type_ids=(ids == IMAGE).int()).last_hidden_state[0]
            logits = mllm.lm_head(hidden[P - 1:P + T - 1]).masked_fill(torch.arange(VOCABULARY) >= 250, float("-inf"))
            log_probs.append(logits.log_softmax(-1)[torch.arange(T), completion])
            states.append(hidden[P + T:])
    return log_probs, states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_forward_of_every_family_equals_hugging_faces_own(family, checkpointing):
    """Log-probs, query states and every gradient, the vision tower's too; Qwen3-VL adds to its first layers in place."""
    mllm, queries = random_family(family), torch.tensor([11, 22, 33, 44, 55])
    batch, completions = random_batch(), random_completions()
    naive = hugging_faces_group(mllm, batch, completions, queries)
    weighted_sum(*naive, ()).backward()
    expected = {n: p.grad.clone() for n, p in mllm.named_parameters()}
    mllm.zero_grad()
    if checkpointing:
        mllm.train().gradient_checkpointing_enable({"use_reentrant": False})
    packed = pack_groups(batch["ids"], prompt_positions(mllm, batch), completions, len(queries))
    hidden = group_hidden(mllm, batch, packed, mllm.get_input_embeddings()(queries))
    log_probs, _ = token_log_probs(mllm.lm_head, hidden[packed["predictors"]], packed["targets"],
                                   torch.arange(VOCABULARY) >= 250)
    ours = log_probs.split([len(c) for group in completions for c in group]), hidden[packed["queries"]]
    for a, b in zip(ours, naive):
        assert largest_difference(a, b) < 1e-4
    weighted_sum(*ours, ()).backward()
    for name, parameter in mllm.named_parameters():
        scale = expected[name].abs().max().clamp(min=1e-2)
        assert (parameter.grad - expected[name]).abs().max() / scale < 1e-4, name


def test_packed_layout_by_hand():
    """Prompt [7, 8] ends at position 4; completions [5] and [6, 9]; M = 2."""
    completions = [[torch.tensor([5]), torch.tensor([6, 9])]]
    packed = pack_groups([torch.tensor([7, 8])], [torch.tensor([[0, 4]] * 3)], completions, 2)
    assert packed["ids"].tolist() == [[7, 8, 5, 0, 0, 6, 9, 0, 0]]
    assert packed["positions"][0].tolist() == [[0, 4, 5, 6, 7, 5, 6, 7, 8]]
    P, places, mask, slots = packed["group"]
    assert P == 2 and places.tolist() == [[2, 3, 4, 0], [5, 6, 7, 8]] and slots.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert mask.tolist() == 2 * [[[[True] * (3 + i) + [False] * (3 - i) for i in range(4)]]]
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
    positions = prompt_positions(lens.mllm, batch)
    return generate(lens.mllm, batch, positions, G, longest, END, lens.forbidden, uniforms, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_faces_generate(family):
    """For every family; pictures and prompts are run once, however many samples are asked for."""
    lens, batch, seen = lens_of(random_family(family)), random_batch(), []
    with lens.mllm.model.visual.register_forward_hook(lambda *_: seen.append("pictures")), \
            lens.mllm.model.language_model.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True):
        ours, finished = sample(lens, batch, G=2, longest=20)
    assert seen[:2] == ["pictures", (2, max(map(len, batch["ids"])))] and set(seen[2:]) <= {(n, 1) for n in range(5)}
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


@pytest.mark.parametrize("stage, moving", [("align", ("queries", "connector.")),
                                           ("rl", ("queries", "connector.", "mllm.", "sam."))])
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


@pytest.mark.parametrize("family", FAMILIES)
@TIED
def test_the_head_is_trained_and_sharded_tied_or_not(family, tied):
    """A step of the sharded model moves the head, tied to the table or not, as it moves the unsharded one's, and the
    sampling copy follows. Checkpointed layers, FSDP and Qwen3-VL's in-place adding go together."""
    lens, batch, completions = lens_of(random_family(family, tied)), random_batch(), random_completions()
    alone, twin = copy.deepcopy(lens), model.copy_mllm(lens.mllm, "fp32")
    mesh = model.start_processes()[3]
    try:
        for one in (alone, lens):
            frozen = set_trainable(one, "rl")
            if one is lens:
                one.mllm.train().gradient_checkpointing_enable({"use_reentrant": False})
                model.shard(one, mesh, "fp32", frozen)
            optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
            weighted_sum(*packed_group(one, batch, completions)).backward()
            optimizer.step()
        model.refresh(twin, lens)
        head, table = lens.mllm.lm_head.weight, lens.mllm.get_input_embeddings().weight
        assert (head is table) == tied == (twin.lm_head.weight is twin.get_input_embeddings().weight)
        assert isinstance(head, DTensor) and head.requires_grad and torch.equal(twin.lm_head.weight, head.full_tensor())
        before = random_family(family, tied).state_dict()
        for name, moved in twin.named_parameters():
            expected = alone.mllm.get_parameter(name)
            assert not torch.equal(expected, before[name]), name
            assert (moved - expected).abs().max() < 1e-4 * (expected - before[name]).abs().max().clamp(min=1e-3), name
    finally:
        dist.destroy_process_group()


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


def test_forbidden_tokens_of_the_released_prompts():
    """Their answers may hold Qwen's marks of an object and its box, which are special tokens; no others."""
    from transformers import AutoProcessor
    tokenizer = AutoProcessor.from_pretrained("tests/tiny/mllm").tokenizer
    marks = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|quad_start|>"]})
    ids, size = tokenizer.convert_tokens_to_ids(marks), len(tokenizer)
    assert model.forbidden_tokens(tokenizer, size)[ids].all()
    for prompt in ("released", "released-cot"):
        changed = model.forbidden_tokens(tokenizer, size, prompt) != model.forbidden_tokens(tokenizer, size)
        assert changed.nonzero()[:, 0].tolist() == sorted(ids)


# SAM's multi-mask fallback


def sam_with_post_processing(state):
    """SAM 2 of the tiny yaml, changed as sam2.build_sam changes one with apply_postprocessing=True."""
    config = OmegaConf.load(ROOT / "tests/tiny/sam/config.yaml")
    config.model.sam_mask_decoder_extra_args = {"dynamic_multimask_via_stability": True,
                                                "dynamic_multimask_stability_delta": 0.05,
                                                "dynamic_multimask_stability_thresh": 0.98}
    sam = instantiate(config.model, _recursive_=True).eval()
    sam.load_state_dict(state)
    return sam


@torch.no_grad()
def decode(sam, pixels, prompts):
    """SAM 2 by its own calls: (1, 3, S, S) and prompt embeddings (N, K, D) -> mask logits (N, S/4, S/4)."""
    maps, decoder = sam.forward_image(pixels)["backbone_fpn"], sam.sam_mask_decoder
    return decoder(image_embeddings=maps[2] + sam.no_mem_embed.view(1, -1, 1, 1), sparse_prompt_embeddings=prompts,
                   image_pe=sam.sam_prompt_encoder.get_dense_pe(), multimask_output=False, repeat_image=True,
                   dense_prompt_embeddings=sam.sam_prompt_encoder(None, None, None)[1].expand(len(prompts), -1, -1, -1),
                   high_res_features=maps[:2])[0][:, 0]


def test_multimask_is_sams_own_post_processing():
    """Prompts whose mask is stable keep it, others get another; in training, and by default, nobody does."""
    g, mllm = torch.Generator().manual_seed(0), random_family("qwen2_5_vl")
    pixels, prompts = torch.randn(1, 3, 128, 128, generator=g), torch.randn(40, 2, 64, generator=g)
    sam = random_sam()
    with torch.no_grad():
        sam.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(100)       # large logits are stable ones
    theirs = decode(sam_with_post_processing(sam.state_dict()), pixels, prompts)
    plain = decode(sam.eval(), pixels, prompts)
    changed = (theirs != plain).flatten(1).any(1)
    assert 5 < changed.sum() < 35
    for multimask, training, expected in (True, False, theirs), (True, True, plain), (False, False, plain):
        lens = lens_of(mllm, multimask=multimask).train(training)
        lens.sam.load_state_dict(model.SamHead(sam).state_dict())
        lens.image_encoder.load_state_dict(sam.image_encoder.state_dict())
        with torch.no_grad():
            ours = lens.sam(lens.encode_pictures(pixels), prompts[None])
        assert (ours - expected).abs().max() < 1e-4
    assert model.SharedArgs().multimask is False and model.PROFILES["released"]["multimask"] is True


# What it is loaded from


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
def test_official_sam_checkpoint_is_known_by_its_file_name(version, tmp_path):
    """As the sam2 package builds and saves its smallest model; ours must load the same weights, strictly."""
    from sam2.build_sam import build_sam2
    theirs = build_sam2(f"configs/{version}/{version}_hiera_t.yaml", None, device="cpu", apply_postprocessing=False)
    torch.save({"model": theirs.state_dict()}, tmp_path / f"{version}_hiera_tiny.pt")
    ours = model.load_sam(tmp_path / f"{version}_hiera_tiny.pt")
    state = ours.state_dict()
    assert ours.image_size == 1024 and all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    for wrong in {"model": {}}, {}, [1]:
        torch.save(wrong, tmp_path / f"{version}_hiera_tiny.pt")
        with pytest.raises(model.LensError, match=f"{version}_hiera_tiny.pt: not the weights of .*{version}_hiera_t.yaml"):
            model.load_sam(tmp_path / f"{version}_hiera_tiny.pt")


OFFICIAL = {"tiny": (96, [1, 2, 7, 2]), "small": (96, [1, 2, 11, 2]), "base_plus": (112, None),
            "large": (144, [2, 6, 36, 4])}                                   # Hiera's width and blocks per stage


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache in tmp_path -> a function that puts a file there, as a download would have done."""
    def put(repository, file, content):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "snapshots/0123456").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0123456")
        torch.save(content, folder / "snapshots/0123456" / file)
        return folder / "snapshots/0123456" / file
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return put


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize("size", OFFICIAL)
def test_every_official_sam_by_file_name_and_by_hub_id(version, size, hub, monkeypatch):
    """Each takes the yaml of its size and version, and its weights from the hub's cache without a network."""
    configs, name = [], f"facebook/{version}-hiera-{size.replace('_', '-')}"
    monkeypatch.setattr(model, "instantiate", lambda config, **_: configs.append(config) or torch.nn.Linear(2, 2))
    stored = torch.nn.Linear(2, 2)
    with pytest.raises(model.LensError) as refused:
        model.load_sam(name)
    wanted = f"hf download {name} {version}_hiera_{size}.pt --local-dir weights"
    assert wanted in str(refused.value) and f"--sam weights/{version}_hiera_{size}.pt" in str(refused.value)
    file = hub(name, f"{version}_hiera_{size}.pt", {"model": stored.state_dict()})
    for given in name, str(file):
        assert torch.equal(model.load_sam(given).weight, stored.weight)
        assert not torch.equal(model.load_sam(given, with_weights=False).weight, stored.weight)
    file.unlink()
    with pytest.raises(model.LensError, match=f"{file} is missing. Download it: hf download {name} {file.name}"):
        model.load_sam(file)
    model.load_sam(name, with_weights=False)                                 # a published checkpoint brings its own
    for config in configs:
        trunk = config.image_encoder.trunk
        assert (trunk.embed_dim, trunk.get("stages")) == OFFICIAL[size]
        assert bool(config.get("proj_tpos_enc_in_obj_ptrs")) == (version == "sam2.1")


def test_a_sam_folder(tmp_path):
    sam = random_sam()
    (tmp_path / "config.yaml").write_text((ROOT / "tests/tiny/sam/config.yaml").read_text())
    with pytest.raises(model.LensError, match="model.pt is missing. A folder has config.yaml and model.pt"):
        model.load_sam(str(tmp_path))
    torch.save({"model": sam.state_dict()}, tmp_path / "model.pt")
    loaded = model.load_sam(str(tmp_path)).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in sam.state_dict().items())
    torch.save({"model": {**sam.state_dict(), "stranger": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(model.LensError, match="(?s)model.pt: not the weights of .*config.yaml.*stranger"):
        model.load_sam(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_by_its_own_config(family, tmp_path):
    """Class, weights and dtype; and the frame in which the family speaks of boxes: 4 x 6 patches of 14 pixels."""
    saved = random_family(family)
    saved.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "tests/tiny/mllm" / file, tmp_path)
    mllm, processor = model.load_mllm(str(tmp_path), torch.float32)
    assert type(mllm) is type(saved) and processor.tokenizer.eos_token_id == END
    assert all(torch.equal(p, saved.get_parameter(n)) for n, p in mllm.named_parameters())
    assert model.load_mllm(str(tmp_path), torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16
    expected = (6 * 14, 4 * 14) if family == "qwen2_5_vl" else (1000, 1000)
    assert data.mllm_frame(mllm.config.model_type, torch.tensor([1, 4, 6]), 14) == expected


@pytest.mark.parametrize("config, said", [
    ('{"model_type": "llama"}', "its config says llama, which is none of qwen2_vl, qwen2_5_vl, qwen3_vl"),
    ('{"model_type": "qwen3_vl_moe"}', "its config says qwen3_vl_moe"), ('{"model_type": "qwen9_vl"}', "qwen9_vl"),
    ("{}", "could not be loaded"), ("{", "could not be loaded"), ('{"model_type": "qwen2_vl"}', "could not be loaded"),
    (None, "could not be loaded")])
def test_an_mllm_that_cannot_be_loaded_is_one_clear_error(config, said, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(model.LensError) as refused:
        model.load_mllm(str(tmp_path), torch.float32)
    message = str(refused.value)
    assert all(part in message for part in (str(tmp_path), said, "hf download", "--preset tiny")) and "\n" not in message


def test_an_mllm_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(model.LensError, match=r"--mllm Qwen/Qwen2.5-VL-3B-Instruct: .*hf download Qwen/Qwen2.5-VL-3B"):
        model.load_mllm("Qwen/Qwen2.5-VL-3B-Instruct", torch.float32)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_download_that_broke_off(file, tmp_path):
    shutil.copytree(ROOT / "tests/tiny/mllm", tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:5000])
    with pytest.raises(model.LensError, match="could not be loaded.*hf download"):
        model.load_mllm(str(tmp_path), torch.float32)


# A folder as the authors published it

MEMORY = ["memory_attention.layers.0.linear1.weight", "memory_encoder.out_proj.weight", "mask_downsample.weight",
          "no_obj_ptr", "no_obj_embed_spatial", "obj_ptr_proj.layers.0.weight", "obj_ptr_tpos_proj.bias"]     # for video


def write_released(folder, family="qwen2_5_vl", tied=True, told_by="architectures", files=1, connector=True, change=None):
    """A random LENS under the released code's own names and config keys (FACTS.md). M = 6, hidden size 64, picture side 128.
    `change`(tensors) damages it. -> the MLLM, SAM 2's state and the tensors that went into the file."""
    g = torch.Generator().manual_seed(0)
    shape = json.loads((ROOT / "tests/tiny/mllm/config.json").read_text())         # the tokens are those of its tokenizer
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=302, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=4096, initializer_range=0.2,
                bos_token_id=None, eos_token_id=2, pad_token_id=0, hidden_act="silu", tie_word_embeddings=tied,
                rope_scaling=dict(mrope_section=[2, 3, 3], rope_type="default", type="default"))
    vision = dict(depth=2, num_heads=2, patch_size=8, in_chans=3, spatial_patch_size=8, initializer_range=0.2)
    is_2_5 = family == "qwen2_5_vl"
    vision |= dict(hidden_size=32, out_hidden_size=64, intermediate_size=64) if is_2_5 else dict(
        embed_dim=32, hidden_size=64, mlp_ratio=2)
    vision |= {name: value for name, value in (("window_size", 32), ("fullatt_block_indexes", [1])) if name == told_by}
    tokens = {f"{name}_token_id": shape[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end")}
    torch.manual_seed(0)
    mllm = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **copy.deepcopy({**text, **tokens, "vision_config": vision}))).float().eval()
    sam = random_sam()
    with torch.no_grad():
        sam.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(30)
    tensors = {n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
               for n, t in mllm.state_dict().items() if not (tied and n == "lm_head.weight")}
    tensors |= {f"sam.{n}": t for n, t in sam.state_dict().items()} | {f"sam.{n}": torch.randn(3) for n in MEMORY}
    draw = lambda *size: torch.randn(*size, generator=g) * 0.2
    tensors |= {"learnable_query": draw(1, 6, 64), "conv_1d.weight": draw(64, 64, 6), "conv_1d.bias": draw(64),
                "proj_to_sam.0.weight": draw(64, 64), "proj_to_sam.0.bias": draw(64), "proj_to_sam.2.weight": draw(64, 64),
                "proj_to_sam.2.bias": draw(64)}
    for i in range(4 if connector else 0):
        block = {"norm1.weight": draw(64), "norm1.bias": draw(64), "norm2.weight": draw(64), "norm2.bias": draw(64),
                 "attn.qkv.weight": draw(192, 64), "attn.qkv.bias": draw(192), "attn.proj.weight": draw(64, 64),
                 "attn.proj.bias": draw(64), "mlp.fc1.weight": draw(256, 64), "mlp.fc1.bias": draw(256),
                 "mlp.fc2.weight": draw(64, 256), "mlp.fc2.bias": draw(64)}
        tensors |= {f"connector.blocks.{i}.{name}": value for name, value in block.items()}
    tensors |= {"connector.pos_embed": draw(1, 6, 64)} if connector else {}
    tensors = {name: value.detach().clone() for name, value in tensors.items()}
    if change:
        change(tensors)
    folder.mkdir()
    names = list(tensors)
    for i in range(files):
        save_file({n: tensors[n] for n in names[i::files]}, folder / f"model-{i + 1:05d}-of-{files:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps({
        **text, **tokens, "vision_config": vision | {"model_type": "qwen2_vl"}, "model_type": "qwen2_vl", "num_of_query": 6,
        "architectures": ["SAMR1ForConditionalGeneration" + "_qwen2p5" * (told_by == "architectures")],
        "if_use_qwen_connector": connector, "torch_dtype": "float32", "transformers_version": "4.51.3"}))
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "tests/tiny/mllm" / file, folder)
    (folder / "sam").mkdir()
    shutil.copy(ROOT / "tests/tiny/sam/config.yaml", folder / "sam")               # no weights: the folder's own are taken
    return mllm, sam.state_dict(), tensors


def load_released(folder):
    known = {name: value for name, value in model.read_run(folder).items() if name in model.SharedArgs.__dataclass_fields__}
    return model.build_lens(model.SharedArgs(**known, sam=str(folder / "sam")), folder)


@torch.no_grad()
def released_prompt(mllm, t, batch, completion, connector=True):
    """The released code's mask pass written anew from its tensors, one completion: Hugging Face's forward without position
    ids (so it counts 0, 1, 2, ...), four ViT blocks, the convolution over M, the MLP. -> (1, 1, D)"""
    ids = torch.cat([batch["ids"][0], completion])
    embeds, (M, C) = mllm.get_input_embeddings()(ids), t["learnable_query"].shape[1:]
    embeds[ids == mllm.config.image_token_id] = torch.cat(
        mllm.model.get_image_features(batch["pixel_values"], batch["grid_thw"]).pooler_output)
    x = mllm.model(inputs_embeds=torch.cat([embeds, t["learnable_query"][0]])[None]).last_hidden_state[0, -M:]
    linear = lambda name, x: F.linear(x, t[name + ".weight"], t[name + ".bias"])
    norm = lambda name, x: F.layer_norm(x, (C,), t[name + ".weight"], t[name + ".bias"], 1e-6)
    for name in [f"connector.blocks.{i}." for i in range(4)] if connector else []:
        x = x + t["connector.pos_embed"][0] if name.endswith(".0.") else x
        q, k, v = linear(name + "attn.qkv", norm(name + "norm1", x)).view(M, 3, 16, C // 16).permute(1, 2, 0, 3)
        attended = ((q @ k.mT) / (C // 16) ** 0.5).softmax(-1) @ v                                   # (16, M, C / 16)
        x = x + linear(name + "attn.proj", attended.transpose(0, 1).reshape(M, C))
        wide = linear(name + "mlp.fc1", norm(name + "norm2", x))
        x = x + linear(name + "mlp.fc2", wide * torch.sigmoid(1.702 * wide))
    one = torch.einsum("chm,mh->c", t["conv_1d.weight"], x) + t["conv_1d.bias"]
    return linear("proj_to_sam.2", F.gelu(linear("proj_to_sam.0", one)))[None, None]


@pytest.mark.parametrize("family, tied, told_by, files, connector", [
    ("qwen2_5_vl", True, "architectures", 1, True), ("qwen2_5_vl", False, "fullatt_block_indexes", 2, True),
    ("qwen2_5_vl", True, "window_size", 1, True), ("qwen2_vl", True, "nothing", 3, True),
    ("qwen2_vl", False, "nothing", 1, False)])
def test_released_checkpoint_equals_a_plain_reimplementation(family, tied, told_by, files, connector, tmp_path):
    mllm, sam, tensors = write_released(tmp_path / "LENS", family, tied, told_by, files, connector)
    lens, processor = load_released(tmp_path / "LENS")
    lens.eval()
    assert lens.mllm.config.model_type == family
    assert (lens.mllm.lm_head.weight is lens.mllm.get_input_embeddings().weight) == tied
    assert all(torch.equal(p, mllm.get_parameter(n)) for n, p in lens.mllm.named_parameters())
    assert processor.image_processor.size["longest_edge"] == 1_000_000 and lens.prompt == "released"
    batch = random_batch(((1, 4, 6),), (7,))
    batch["ids"] = [ids.where(ids != IMAGE, torch.tensor(mllm.config.image_token_id)) for ids in batch["ids"]]
    completions = random_completions(1, 3)
    positions = context_positions(prompt_positions(lens.mllm, batch), lens.positions)
    packed = pack_groups(batch["ids"], positions, completions, lens.M)
    with torch.no_grad():
        ours = lens(batch, packed, lens.encode_pictures(batch["sam_pixels"]))["mask_logits"]
    theirs = sam_with_post_processing(sam)
    for mask, completion in zip(ours, completions[0]):
        prompt = released_prompt(mllm, tensors, batch, completion, connector)
        expected = decode(theirs, batch["sam_pixels"], prompt)[0]
        assert (mask - expected).abs().max() < 1e-4 * expected.std() + 1e-5 and expected.std() > 0.01
        in_3d = pack_groups(batch["ids"], prompt_positions(lens.mllm, batch), [[completion]], lens.M)
        with torch.no_grad():                                                # the positions do matter
            other = lens(batch, in_3d, lens.encode_pictures(batch["sam_pixels"]))["mask_logits"][0]
        assert (other - expected).abs().max() > 0.01 * expected.std()


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *size):
    return lambda tensors: tensors.update({name: torch.zeros(size)})


@pytest.mark.parametrize("change, named", [
    (drop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    (drop("model.embed_tokens.weight"), "embed_tokens"),
    (drop("visual.merger.mlp.0.bias"), "merger.mlp.0.bias"), (drop("lm_head.weight"), "lm_head.weight"),
    (drop("connector.blocks.2.mlp.fc1.bias"), "blocks.2.fc1.bias"), (drop("learnable_query"), "queries"),
    (drop("conv_1d.bias"), "squeeze.bias"), (drop("sam.no_mem_embed"), "no_mem_embed"),
    (drop("sam.sam_mask_decoder.mask_tokens.weight"), "mask_tokens"), (put("stranger", 3), "stranger"),
    (put("model.layers.2.mlp.up_proj.weight", 128, 64), "layers.2.mlp.up_proj"),
    (put("visual.stranger", 3), "visual.stranger"),
    (put("connector.stranger", 3), "stranger"), (put("sam.stranger", 3), "stranger"),
    (put("model.norm.weight", 65), "norm.weight"), (put("visual.patch_embed.proj.weight", 32, 3, 2, 8, 9), "patch_embed"),
    (put("learnable_query", 1, 7, 64), "queries"), (put("proj_to_sam.2.bias", 65), "to_sam.2.bias"),
    (put("sam.sam_mask_decoder.mask_tokens.weight", 4, 65), "mask_tokens")])
def test_what_is_wrong_in_a_released_checkpoint_is_named(change, named, tmp_path):
    write_released(tmp_path / "LENS", tied=False, change=change)
    with pytest.raises(model.LensError) as refused:
        load_released(tmp_path / "LENS")
    assert str(tmp_path / "LENS") in str(refused.value) and named in str(refused.value) and "--sam" in str(refused.value)


def test_what_is_a_released_folder(tmp_path):
    write_released(tmp_path / "LENS")
    assert model.is_released(tmp_path / "LENS") and not model.is_released("") and not model.is_released(tmp_path)
    run = model.read_run(tmp_path / "LENS")
    assert (run["num_queries"], run["connector_heads"], run["connector"], run["positions"]) == (6, 16, "vit", "1d")
    (tmp_path / "LENS/lens.json").write_text("{}")
    assert not model.is_released(tmp_path / "LENS")
    with pytest.raises(model.LensError, match=r"mllm/config.json has no num_of_query: this is a plain MLLM \(--mllm\)"):
        model.read_run(ROOT / "tests/tiny/mllm")


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "config.json"])
def test_a_released_folder_whose_download_broke_off(file, tmp_path):
    write_released(tmp_path / "LENS")
    (tmp_path / "LENS" / file).write_bytes((tmp_path / "LENS" / file).read_bytes()[:500])
    with pytest.raises(model.LensError, match="LENS.*Download it again"):
        load_released(tmp_path / "LENS")


def test_evaluating_a_released_folder(world, tmp_path, monkeypatch):
    """From the command line: prompt, greedy answer (3-D positions), mask pass (1-D) and mask, each made anew here."""
    import evaluate
    from pycocotools import mask as coco_mask
    from transformers import AutoProcessor
    folder, rows = tmp_path / "LENS", tmp_path / "rows.jsonl"
    mllm, sam, tensors = write_released(folder, told_by="window_size", files=2)
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", "--checkpoint", str(folder), "--sam", str(folder / "sam"), "--data", str(world), "--datasets",
        "shapes", "--limit", "3", "--max-completion", "8", "--precision", "fp32", "--workers", "0", "--predictions",
        str(rows)])
    try:
        evaluate.main()
    finally:
        dist.destroy_process_group()
    processor, theirs = AutoProcessor.from_pretrained(folder), sam_with_post_processing(sam)
    banned = [[i] for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special and i != END]
    items = {item["id"]: item for item in data.EvaluationRows(data.read_records(world, ["shapes"], ["val"]), 3)}
    for row in map(json.loads, rows.read_text().splitlines()):
        item = items.pop(row["key"])
        text = ("<|im_start|>system\nYou are a helpful assistant. <|im_end|>\n<|im_start|>user\n<|vision_start|>"
                f"<|image_pad|><|vision_end|>Output the bounding box of the {item['text']} in the image.<|im_end|>\n"
                "<|im_start|>assistant\n")
        inputs = processor(text=[text], images=[item["image"]], return_tensors="pt", return_mm_token_type_ids=True)
        completion = mllm.generate(**inputs, do_sample=False, max_new_tokens=8, bad_words_ids=banned, eos_token_id=END,
                                   pad_token_id=0)[0, inputs["input_ids"].shape[1]:]
        assert row["answer"] == processor.tokenizer.decode(completion, skip_special_tokens=True)
        batch = {"ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
        prompt = released_prompt(mllm, tensors, batch, completion)
        logits = decode(theirs, data.sam_picture(item["image"], 128)[None], prompt)
        expected = F.interpolate(logits[None], item["mask"].shape, mode="bilinear")[0, 0] > 0
        found = torch.from_numpy(coco_mask.decode(row["mask"])).bool()
        assert (found == expected).float().mean() > 0.999 and 100 < expected.sum() < expected.numel() - 100
    assert not items


# The real sizes


PUBLISHED = {"Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600, "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
             "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656}                   # in their safetensors, by the hub's metadata


def test_parameters_are_those_published(monkeypatch):
    """At full size on the meta device: each MLLM's total; SAM2-Large's 224.4 M with its video memory, of which `UNUSED_SAM`
    names all that Lens leaves out; and docs/parameters.md is what the script writes now."""
    import parameters
    import released
    built = {}
    build = parameters.build_mllm
    monkeypatch.setattr(parameters, "build_mllm", lambda name: built.setdefault(name, build(name)))
    assert parameters.document() == (ROOT / "docs/parameters.md").read_text()
    assert {name: parameters.count(mllm) for name, mllm in built.items()} == PUBLISHED
    sam = parameters.build_sam()
    assert round(parameters.count(sam) / 1e6, 1) == 224.4
    used = {f"image_encoder.{n}" for n, _ in sam.image_encoder.named_parameters()}
    used |= {n for n, _ in model.SamHead(sam).named_parameters()}
    assert {n for n, _ in sam.named_parameters() if not n.startswith(released.UNUSED_SAM)} == used
