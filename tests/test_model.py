"""The group forward, sampling, the parts of Lens and what it is loaded from, against independent
computations."""
import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (END, IMAGE, ROOT, SAM_SIDE, VOCABULARY, random_batch, random_completions,
                      random_sam)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import AutoConfig, AutoModelForImageTextToText

import align
import data
import model
import train_rl
from align import set_trainable
from data import LensError
from model import (completion_table, generate, group_hidden, pack_groups, pick_tokens,
                   prompt_positions, token_log_probs)

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
# 2B and 3B have no head of their own, 7B has
TIED = pytest.mark.parametrize("tied", [True, False])


def random_family(family, tied=False, vocabulary=VOCABULARY, image=IMAGE, video=254, start=252,
                  end=253):
    """A real, tiny model of any family, random weights, for the same batches as conftest's."""
    torch.manual_seed(0)
    text = dict(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
                bos_token_id=None, eos_token_id=END, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    text |= {"head_dim": 16} if family == "qwen3_vl" else {}
    vision = dict(depth=2, num_heads=2, patch_size=8, initializer_range=0.2)
    vision |= {"qwen2_vl": dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
               "qwen2_5_vl": dict(hidden_size=32, out_hidden_size=64, intermediate_size=64,
                                  window_size=32, fullatt_block_indexes=[1]),
               "qwen3_vl": dict(hidden_size=32, out_hidden_size=64, intermediate_size=64,
                                num_position_embeddings=64,
                                deepstack_visual_indexes=[0, 1])}[family]
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision,
                                  image_token_id=image, video_token_id=video,
                                  vision_start_token_id=start, vision_end_token_id=end,
                                  tie_word_embeddings=tied)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").float()


def lens_of(mllm, **settings):
    defaults = dict(num_queries=5, precision="fp32", connector="vit", connector_heads=4, prompt_tokens="all",
                    prompt="paper", positions="mrope", multimask=False)
    args = SimpleNamespace(**{**defaults, **settings})
    return model.Lens(mllm, random_sam(), args, torch.arange(VOCABULARY) >= 250, END)


def naive_sample(lens, batch, b, patches, completion):
    """One completion alone, without any packing: prompt + completion + queries through the MLLM,
    one picture through SAM's encoder, one prompt through its decoder. -> log-probs (T,), query
    states (M, C), mask logits (S/4, S/4)."""
    mllm, ids, M = lens.mllm, batch["ids"][b], len(lens.queries)
    whole = torch.cat([ids, completion])
    embeds = mllm.get_input_embeddings()(whole)[None].clone()
    grid = batch["grid_thw"][b:b + 1]
    features = torch.cat(mllm.model.get_image_features(patches, grid).pooler_output)
    embeds = embeds.masked_scatter((whole == mllm.config.image_token_id)[None, :, None], features)
    embeds = torch.cat([embeds, lens.queries[None]], 1)
    positions, _ = mllm.model.get_rope_index(ids[None], mm_token_type_ids=batch["types"][b][None],
                                             image_grid_thw=grid)
    tail = positions.max() + 1 + torch.arange(len(completion) + M)
    positions = torch.cat([positions, tail.expand(3, 1, -1)], -1)
    hidden = mllm.model.language_model(inputs_embeds=embeds, position_ids=positions,
                                       use_cache=False).last_hidden_state[0]
    P, T = len(ids), len(completion)
    logits = mllm.lm_head(hidden[P - 1:P + T - 1]).masked_fill(lens.forbidden, float("-inf"))
    log_probs = logits.log_softmax(-1)[torch.arange(T), completion]
    states = hidden[P + T:]
    features = lens.image_encoder(batch["sam_pixels"][b:b + 1])["backbone_fpn"]
    return log_probs, states, lens.sam(features, lens.connector(states[None])[None])[0]


def weighted_sum(log_probs, states, masks, seed=5):
    """A scalar that every output enters with its own weight, so that its gradient checks them
    all."""
    g = torch.Generator().manual_seed(seed)
    total = 0
    for x in (*log_probs, *states, *masks):
        total = total + (x * torch.randn(x.shape, generator=g)).sum()
    return total


def naive_group(lens, batch, completions):
    cuts = batch["grid_thw"].prod(-1).tolist()
    patches = batch["pixel_values"].split(cuts)
    samples = [naive_sample(lens, batch, b, patches[b], completion)
               for b, group in enumerate(completions) for completion in group]
    return tuple(zip(*samples))


def whole_pass(lens, batch, packed, **options):
    features = lens.encode_pictures(batch["sam_pixels"])
    return lens(batch["pixel_values"], batch["grid_thw"], packed, features, **options)


def packed_group(lens, batch, completions):
    packed = pack_groups(batch["ids"], prompt_positions(lens.mllm, batch), completions,
                         len(lens.queries))
    out = whole_pass(lens, batch, packed)
    lengths = [len(c) for group in completions for c in group]
    assert (out["log_probs"][~packed.mask] == 0).all()
    log_probs = [row[:n] for row, n in zip(out["log_probs"], lengths)]
    return log_probs, out["query_states"], out["mask_logits"]


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


def plainly_causal(module, query, key, value, mask, scaling=None, group=None, **_):
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                         enable_gqa=True)
    return out.transpose(1, 2), None


def test_a_completion_that_sees_another_is_caught(lens, monkeypatch):
    """The oracle above must notice a leak: here every completion sees those before it."""
    batch, completions = random_batch(), random_completions()
    with torch.no_grad():
        naive = naive_group(lens, batch, completions)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "lens", plainly_causal)
        leaky = packed_group(lens, batch, completions)
    assert largest_difference(leaky[0], naive[0]) > 1e-2
    assert largest_difference(leaky[1], naive[1]) > 1e-2
    # the first completion has nothing before it
    assert largest_difference(leaky[0][:1], naive[0][:1]) < 1e-5


def hugging_faces_group(mllm, batch, completions, queries):
    """One forward of Hugging Face's per completion, token ids and pictures in: no code of ours. The
    context queries are given as tokens. -> log-probs (T,) and query states (M, C) of each."""
    cuts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    log_probs, states = [], []
    for b, group in enumerate(completions):
        for completion in group:
            P, T = len(batch["ids"][b]), len(completion)
            ids = torch.cat([batch["ids"][b], completion, queries])[None]
            hidden = mllm.model(input_ids=ids, pixel_values=cuts[b],
                                image_grid_thw=batch["grid_thw"][b:b + 1],
                                mm_token_type_ids=(ids == IMAGE).int()).last_hidden_state[0]
            logits = mllm.lm_head(hidden[P - 1:P + T - 1])
            logits[:, torch.arange(VOCABULARY) >= 250] = float("-inf")
            log_probs.append(logits.log_softmax(-1)[torch.arange(T), completion])
            states.append(hidden[P + T:])
    return log_probs, states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_forward_of_every_family_equals_hugging_faces_own(family, checkpointing):
    """Log-probs, query states and every gradient, the vision tower's too; Qwen3-VL adds to its
    first layers in place."""
    mllm, queries = random_family(family), torch.tensor([11, 22, 33, 44, 55])
    batch, completions = random_batch(), random_completions()
    naive = hugging_faces_group(mllm, batch, completions, queries)
    weighted_sum(*naive, ()).backward()
    expected = {n: p.grad.clone() for n, p in mllm.named_parameters()}
    mllm.zero_grad()
    if checkpointing:
        mllm.train().gradient_checkpointing_enable({"use_reentrant": False})
    packed = pack_groups(batch["ids"], prompt_positions(mllm, batch), completions, len(queries))
    hidden = group_hidden(mllm, batch["pixel_values"], batch["grid_thw"], packed,
                          mllm.get_input_embeddings()(queries))
    log_probs, _ = token_log_probs(mllm.lm_head, hidden[packed.predictors], packed.targets,
                                   torch.arange(VOCABULARY) >= 250)
    lengths = [len(completion) for group in completions for completion in group]
    ours = log_probs.split(lengths), hidden[packed.queries]
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
    assert packed.ids.tolist() == [[7, 8, 5, 0, 0, 6, 9, 0, 0]]
    assert packed.positions[0].tolist() == [[0, 4, 5, 6, 7, 5, 6, 7, 8]]
    layout = packed.group
    assert layout.P == 2
    assert layout.places.tolist() == [[2, 3, 4, 0], [5, 6, 7, 8]]
    assert layout.slots.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert layout.mask.tolist() == 2 * [[[[True] * (3 + i) + [False] * (3 - i) for i in range(4)]]]
    assert packed.queries.tolist() == [[3, 4], [7, 8]]
    assert packed.predictors.tolist() == [1, 1, 5]
    assert packed.targets.tolist() == [5, 6, 9]
    assert packed.mask.tolist() == [[True, False], [True, True]]


def test_token_log_probs_chunked_equals_whole():
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False)
    hidden = torch.randn(37, 16, generator=g, requires_grad=True)
    targets = torch.randint(0, 40, (37,), generator=g)
    forbidden = torch.arange(50) >= 40
    log_probs, entropy = token_log_probs(head, hidden, targets, forbidden, temperature=0.7, chunk=8)
    table = (F.linear(hidden, head.weight)[:, :40] / 0.7).log_softmax(-1)
    assert torch.allclose(log_probs, table[torch.arange(37), targets], atol=1e-6)
    assert torch.allclose(entropy, -(table.exp() * table).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    grads = [torch.autograd.grad(x.sum(), (hidden, head.weight))
             for x in (log_probs, table[torch.arange(37), targets])]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_completion_table():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert completion_table(torch.tensor([1., 2., 3.]), mask).tolist() == [[1, 2, 0], [3, 0, 0]]


# Sampling


def test_inverse_cdf_by_hand():
    """p = [.1, 0, .2, .7]: the token is the first whose cumulative sum exceeds u; a token of
    probability 0 never comes."""
    logits = torch.tensor([.1, 0., .2, .7], dtype=torch.float64).log().expand(7, 4)
    u = torch.tensor([0., .05, .0999, .1001, .2999, .3001, 1 - 2 ** -53], dtype=torch.float64)
    assert pick_tokens(logits, u).tolist() == [0, 0, 0, 2, 2, 3, 3]
    assert pick_tokens(logits).tolist() == [3] * 7


def test_sampled_frequencies_follow_the_probabilities():
    p = torch.tensor([.5, .25, .125, .125])
    u = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(pick_tokens(p.log().expand(40_000, 4), u), minlength=4) / 40_000
    assert (share - p).abs().max() < 0.01                        # four standard deviations


def sample(lens, batch, G, uniforms=None, longest=12, **options):
    positions = prompt_positions(lens.mllm, batch)
    samples = generate(lens.mllm, batch, positions, G, longest, END, lens.forbidden, uniforms,
                       **options)
    return samples.completions, samples.finished


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_faces_generate(family):
    """For every family; pictures and prompts are run once, however many samples are asked for."""
    lens, batch, seen = lens_of(random_family(family)), random_batch(), []

    def saw_pictures(*_):
        seen.append("pictures")

    def saw_tokens(_, args, kwargs):
        seen.append(kwargs["inputs_embeds"].shape[:2])

    watched = lens.mllm.model
    watched.visual.register_forward_hook(saw_pictures)
    hook = watched.language_model.register_forward_pre_hook(saw_tokens, with_kwargs=True)
    ours, finished = sample(lens, batch, G=2, longest=20)
    hook.remove()
    assert seen[:2] == ["pictures", (2, max(map(len, batch["ids"])))]
    assert set(seen[2:]) <= {(n, 1) for n in range(5)}
    cuts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    banned = [[i] for i in range(VOCABULARY) if lens.forbidden[i]]
    for b, ids in enumerate(batch["ids"]):
        out = lens.mllm.generate(input_ids=ids[None], pixel_values=cuts[b],
                                 image_grid_thw=batch["grid_thw"][b:b + 1],
                                 mm_token_type_ids=batch["types"][b][None].int(),
                                 attention_mask=torch.ones_like(ids)[None],
                                 do_sample=False, max_new_tokens=20, bad_words_ids=banned,
                                 eos_token_id=END, pad_token_id=0)
        expected = out[0, len(ids):]
        assert torch.equal(ours[b][0], expected) and torch.equal(ours[b][1], expected)
        assert finished[b][0] == (expected[-1] == END)


def test_a_sample_does_not_depend_on_its_batch(lens):
    """The same uniforms give the same completion alone, in a batch, beside other samples, and
    through compaction."""
    lens.mllm.lm_head.weight.data[END] *= 1.5        # ends come often: the batch is compacted
    batch, G, longest = random_batch(), 6, 40
    uniforms = torch.rand(2 * G, longest, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(3))
    together, finished = sample(lens, batch, G, uniforms, longest)
    lengths = [len(c) for group in together for c in group]
    assert min(lengths) < 8 and max(lengths) > 16 and any(f for group in finished for f in group)
    first, second = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    for b, pixels in enumerate((first, second)):
        alone = {"ids": batch["ids"][b:b + 1], "types": batch["types"][b:b + 1],
                 "pixel_values": pixels, "grid_thw": batch["grid_thw"][b:b + 1]}
        for g in range(G):
            again, done = sample(lens, alone, 1, uniforms[b * G + g:b * G + g + 1], longest)
            assert torch.equal(again[0][0], together[b][g]) and done[0][0] == finished[b][g]


def test_sampled_log_probs_are_those_of_the_loss(lens):
    """The policy that samples is the policy that is trained: with temperature 2 and forbidden
    tokens, the frequency of a first token is exp of the log-prob that the packed forward gives
    it."""
    batch, n = random_batch(((1, 4, 4),), (5,)), 4000
    # a fine comb instead of chance
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    completions, _ = sample(lens, batch, n, uniforms, longest=1, temperature=2.0)
    tokens = torch.cat(completions[0])
    assert not lens.forbidden[tokens].any()
    packed = pack_groups(batch["ids"], prompt_positions(lens.mllm, batch),
                         [[t[None] for t in tokens.unique()]], 5)
    with torch.no_grad():
        out = whole_pass(lens, batch, packed, temperature=2.0)
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
    """After one step, nothing outside the stage's parts has moved, and every part that trains
    has."""
    set_trainable(lens, stage)
    before = {n: p.detach().clone() for n, p in lens.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in lens.parameters() if p.requires_grad], lr=1e-2,
                                  weight_decay=0.0)
    weighted_sum(*packed_group(lens, random_batch(), random_completions())).backward()
    optimizer.step()
    moved = {n for n, p in lens.named_parameters() if not torch.equal(p, before[n])}
    assert all(n.startswith(moving) for n in moved)
    assert all(p.grad is None for n, p in lens.named_parameters() if not n.startswith(moving))
    wanted = {"queries", "connector.position", "connector.blocks.0.qkv.weight",
              "connector.to_sam.2.weight"}
    if stage == "rl":
        wanted |= {"mllm.model.visual.blocks.0.attn.qkv.weight",
                   "mllm.model.language_model.layers.0.mlp.up_proj.weight",
                   "mllm.lm_head.weight", "sam.sam_mask_decoder.conv_s0.weight",
                   "sam.sam_mask_decoder.mask_tokens.weight", "sam.no_mem_embed",
                   "sam.sam_prompt_encoder.no_mask_embed.weight"}
    assert wanted <= moved


@pytest.mark.parametrize("family", FAMILIES)
@TIED
def test_the_head_is_trained_and_sharded_tied_or_not(family, tied):
    """A step of the sharded model moves the head, tied to the table or not, as it moves the
    unsharded one's, and the sampling copy follows. Checkpointed layers, FSDP and Qwen3-VL's
    in-place adding go together."""
    lens = lens_of(random_family(family, tied))
    batch, completions = random_batch(), random_completions()
    alone, twin = copy.deepcopy(lens), train_rl.copy_mllm(lens.mllm, "fp32")
    mesh = align.start_processes(align.SharedArgs())[3]
    try:
        for one in (alone, lens):
            frozen = set_trainable(one, "rl")
            if one is lens:
                one.mllm.train().gradient_checkpointing_enable({"use_reentrant": False})
                align.shard(one, mesh, "fp32", frozen)
            optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
            weighted_sum(*packed_group(one, batch, completions)).backward()
            optimizer.step()
        train_rl.refresh(twin, lens)
        head, table = lens.mllm.lm_head.weight, lens.mllm.get_input_embeddings().weight
        assert (head is table) == tied
        assert (twin.lm_head.weight is twin.get_input_embeddings().weight) == tied
        assert isinstance(head, DTensor)
        assert head.requires_grad
        assert torch.equal(twin.lm_head.weight, head.full_tensor())
        before = random_family(family, tied).state_dict()
        for name, moved in twin.named_parameters():
            expected = alone.mllm.get_parameter(name)
            assert not torch.equal(expected, before[name]), name
            step = (expected - before[name]).abs().max().clamp(min=1e-3)
            assert (moved - expected).abs().max() < 1e-4 * step, name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind, tokens, expected",
                         [("vit", "all", 5), ("vit", "one", 1), ("mlp", "all", 5)])
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
    """Our features and decoding against SAM2Base's own forward_image and _forward_sam_heads, for a
    box prompt."""
    sam = random_sam().eval()
    head = model.SamHead(copy.deepcopy(sam)).eval()
    pixels, box = torch.randn(1, 3, SAM_SIDE, SAM_SIDE), torch.tensor([[20., 30., 90., 100.]])
    with torch.no_grad():
        ours = head(sam.image_encoder(pixels)["backbone_fpn"], head.box_prompts(box)[None])
        maps = sam.forward_image(pixels)["backbone_fpn"]
        points = {"point_coords": box.view(1, 2, 2), "point_labels": torch.tensor([[2, 3]])}
        coarse = maps[2] + sam.no_mem_embed.view(1, -1, 1, 1)
        theirs = sam._forward_sam_heads(coarse, points, None, maps[:2], multimask_output=False)[3]
    assert torch.allclose(ours, theirs[:, 0], atol=1e-5)


def test_forbidden_tokens():
    from transformers import AutoProcessor
    tokenizer = AutoProcessor.from_pretrained("tests/tiny/mllm").tokenizer
    forbidden = model.forbidden_tokens(tokenizer, len(tokenizer) + 5)
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>",
                  "<|endoftext|>"):
        assert forbidden[tokenizer.convert_tokens_to_ids(token)]
    assert forbidden[len(tokenizer):].all() and not forbidden[tokenizer.eos_token_id]
    assert not forbidden[tokenizer("the red circle at [12, 34]").input_ids].any()


def test_forbidden_tokens_of_the_released_prompts():
    """Their answers may hold Qwen's marks of an object and its box, which are special tokens; no
    others."""
    from transformers import AutoProcessor
    tokenizer = AutoProcessor.from_pretrained("tests/tiny/mllm").tokenizer
    marks = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|quad_start|>"]})
    ids, size = tokenizer.convert_tokens_to_ids(marks), len(tokenizer)
    assert model.forbidden_tokens(tokenizer, size)[ids].all()
    for prompt in ("released", "released-cot"):
        theirs = model.forbidden_tokens(tokenizer, size, prompt)
        changed = theirs != model.forbidden_tokens(tokenizer, size)
        assert changed.nonzero()[:, 0].tolist() == sorted(ids)


# SAM's multi-mask fallback


def sam_with_post_processing(state):
    """SAM 2 of the tiny yaml, changed as sam2.build_sam changes one with
    apply_postprocessing=True."""
    config = OmegaConf.load(ROOT / "tests/tiny/sam/config.yaml")
    config.model.sam_mask_decoder_extra_args = {"dynamic_multimask_via_stability": True,
                                                "dynamic_multimask_stability_delta": 0.05,
                                                "dynamic_multimask_stability_thresh": 0.98}
    sam = instantiate(config.model, _recursive_=True).eval()
    sam.load_state_dict(state)
    return sam


@torch.no_grad()
def decode(sam, pixels, prompts):
    """SAM 2 by its own calls: (1, 3, S, S) and prompt embeddings (N, K, D) -> mask logits (N, S/4,
    S/4)."""
    maps, decoder = sam.forward_image(pixels)["backbone_fpn"], sam.sam_mask_decoder
    _, dense = sam.sam_prompt_encoder(None, None, None)
    masks = decoder(image_embeddings=maps[2] + sam.no_mem_embed.view(1, -1, 1, 1),
                    image_pe=sam.sam_prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=prompts,
                    dense_prompt_embeddings=dense.expand(len(prompts), -1, -1, -1),
                    multimask_output=False, repeat_image=True, high_res_features=maps[:2])[0]
    return masks[:, 0]


def test_multimask_is_sams_own_post_processing():
    """Prompts whose mask is stable keep it, others get another; in training, and by default, nobody
    does."""
    g, mllm = torch.Generator().manual_seed(0), random_family("qwen2_5_vl")
    pixels = torch.randn(1, 3, SAM_SIDE, SAM_SIDE, generator=g)
    prompts = torch.randn(40, 2, 64, generator=g)
    sam = random_sam()
    with torch.no_grad():
        # large logits are stable ones
        sam.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(100)
    theirs = decode(sam_with_post_processing(sam.state_dict()), pixels, prompts)
    plain = decode(sam.eval(), pixels, prompts)
    changed = (theirs != plain).flatten(1).any(1)
    assert 5 < changed.sum() < 35
    cases = (True, False, theirs), (True, True, plain), (False, False, plain)
    for multimask, training, expected in cases:
        lens = lens_of(mllm, multimask=multimask).train(training)
        lens.sam.load_state_dict(model.SamHead(sam).state_dict())
        lens.image_encoder.load_state_dict(sam.image_encoder.state_dict())
        with torch.no_grad():
            ours = lens.sam(lens.encode_pictures(pixels), prompts[None])
        assert (ours - expected).abs().max() < 1e-4
    assert align.SharedArgs().multimask is False and align.PROFILES["released"]["multimask"] is True


# What it is loaded from


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
def test_official_sam_checkpoint_is_known_by_its_file_name(version, tmp_path):
    """As the sam2 package builds and saves its smallest model; ours must load the same weights,
    strictly."""
    from sam2.build_sam import build_sam2
    theirs = build_sam2(f"configs/{version}/{version}_hiera_t.yaml", None, device="cpu",
                        apply_postprocessing=False)
    torch.save({"model": theirs.state_dict()}, tmp_path / f"{version}_hiera_tiny.pt")
    ours = model.load_sam(tmp_path / f"{version}_hiera_tiny.pt")
    state = ours.state_dict()
    assert ours.image_size == 1024
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    for wrong in {"model": {}}, {}, [1]:
        torch.save(wrong, tmp_path / f"{version}_hiera_tiny.pt")
        said = f"{version}_hiera_tiny.pt: not the weights of .*{version}_hiera_t.yaml"
        with pytest.raises(LensError, match=said):
            model.load_sam(tmp_path / f"{version}_hiera_tiny.pt")


# Hiera's width and blocks per stage
OFFICIAL = {"tiny": (96, [1, 2, 7, 2]), "small": (96, [1, 2, 11, 2]), "base_plus": (112, None),
            "large": (144, [2, 6, 36, 4])}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache in tmp_path -> a function that puts a file there, as a download would
    have done."""
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
    """Each takes the yaml of its size and version, and its weights from the hub's cache without a
    network."""
    configs, name = [], f"facebook/{version}-hiera-{size.replace('_', '-')}"

    def instantiate(config, **_):
        configs.append(config)
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(model, "instantiate", instantiate)
    stored = torch.nn.Linear(2, 2)
    with pytest.raises(LensError) as refused:
        model.load_sam(name)
    wanted = f"hf download {name} {version}_hiera_{size}.pt --local-dir weights"
    assert wanted in str(refused.value)
    assert f"weights/{version}_hiera_{size}.pt is missing" in str(refused.value)
    file = hub(name, f"{version}_hiera_{size}.pt", {"model": stored.state_dict()})
    for given in name, str(file):
        assert torch.equal(model.load_sam(given).weight, stored.weight)
        assert not torch.equal(model.load_sam(given, with_weights=False).weight, stored.weight)
    file.unlink()
    said = f"{file} is missing. Download it: hf download {name} {file.name}"
    with pytest.raises(LensError, match=said):
        model.load_sam(file)
    model.load_sam(name, with_weights=False)         # a published checkpoint brings its own
    for config in configs:
        trunk = config.image_encoder.trunk
        assert (trunk.embed_dim, trunk.get("stages")) == OFFICIAL[size]
        assert bool(config.get("proj_tpos_enc_in_obj_ptrs")) == (version == "sam2.1")


def test_a_sam_folder(tmp_path):
    sam = random_sam()
    (tmp_path / "config.yaml").write_text((ROOT / "tests/tiny/sam/config.yaml").read_text())
    said = "model.pt is missing. A folder has config.yaml and model.pt"
    with pytest.raises(LensError, match=said):
        model.load_sam(str(tmp_path))
    torch.save({"model": sam.state_dict()}, tmp_path / "model.pt")
    loaded = model.load_sam(str(tmp_path)).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in sam.state_dict().items())
    torch.save({"model": {**sam.state_dict(), "stranger": torch.zeros(1)}}, tmp_path / "model.pt")
    with pytest.raises(LensError, match="(?s)model.pt: not the weights of .*config.yaml.*stranger"):
        model.load_sam(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_by_its_own_config(family, tmp_path):
    """Class, weights and dtype; and the frame in which the family speaks of boxes: 4 x 6 patches of
    14 pixels."""
    saved = random_family(family)
    saved.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
                 "chat_template.jinja"):
        shutil.copy(ROOT / "tests/tiny/mllm" / file, tmp_path)
    mllm, processor = model.load_mllm(str(tmp_path), torch.float32)
    assert type(mllm) is type(saved) and processor.tokenizer.eos_token_id == END
    assert all(torch.equal(p, saved.get_parameter(n)) for n, p in mllm.named_parameters())
    assert model.load_mllm(str(tmp_path), torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16
    expected = (6 * 14, 4 * 14) if family == "qwen2_5_vl" else (1000, 1000)
    assert data.mllm_frame(mllm.config.model_type, torch.tensor([1, 4, 6]), 14) == expected


@pytest.mark.parametrize("config, said", [
    ('{"model_type": "llama"}',
     "it is of llama, not of qwen2_vl, qwen2_5_vl or qwen3_vl"),
    ('{"model_type": "qwen3_vl_moe"}', "it is of qwen3_vl_moe"),
    ('{"model_type": "qwen9_vl"}', "qwen9_vl"),
    ("{}", "could not be loaded"), ("{", "could not be loaded"),
    ('{"model_type": "qwen2_vl"}', "could not be loaded"),
    (None, "could not be loaded")])
def test_an_mllm_that_cannot_be_loaded_is_one_clear_error(config, said, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(LensError) as refused:
        model.load_mllm(str(tmp_path), torch.float32)
    message = str(refused.value)
    assert all(part in message for part in (str(tmp_path), said, "hf download", "--preset tiny"))
    assert "\n" not in message


def test_an_mllm_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = r"--mllm Qwen/Qwen2.5-VL-3B-Instruct: .*hf download Qwen/Qwen2.5-VL-3B"
    with pytest.raises(LensError, match=said):
        model.load_mllm("Qwen/Qwen2.5-VL-3B-Instruct", torch.float32)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_download_that_broke_off(file, tmp_path):
    shutil.copytree(ROOT / "tests/tiny/mllm", tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:5000])
    with pytest.raises(LensError, match="could not be loaded.*hf download"):
        model.load_mllm(str(tmp_path), torch.float32)
