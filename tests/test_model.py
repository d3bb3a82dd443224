"""The model: forward_one against Hugging Face and sam2, groups and stage 1 against forward_one, the
parts, what is trained, what is loaded and what is refused, the folder of a finished run."""
import copy
import json
import shutil

import pytest
import torch
from conftest import (END, FAMILIES, IMAGE, ROOT, SAM_CONFIG, SAM_SIDE, fill_blocks, random_batch,
                      random_completions, random_lens, random_mllm, random_sam)
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from sam2.build_sam import build_sam2
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

import align
import model
import train_rl
from align import SharedArgs
from data import Collator, LensError, mllm_frame, select
from grpo import pack_groups
from model import (checkpoint_layers, context_positions, forward_one, prompt_positions,
                   set_trainable)

TINY = ROOT / "tests/tiny/mllm"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
                   "chat_template.jinja")


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() < tolerance


def pixels_of(batch, b):
    """The patches of one image -> (patches, values)"""
    return batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())[b]


@torch.no_grad()
def decode(sam, pixels, prompts):
    """SAM 2 by its own calls: image (1, 3, S, S) and prompt embeddings (N, K, D) -> mask logits
    (N, S/4, S/4)"""
    maps, decoder = sam.forward_image(pixels)["backbone_fpn"], sam.sam_mask_decoder
    _, dense = sam.sam_prompt_encoder(None, None, None)
    masks = decoder(image_embeddings=maps[2] + sam.no_mem_embed.view(1, -1, 1, 1),
                    image_pe=sam.sam_prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=prompts,
                    dense_prompt_embeddings=dense.expand(len(prompts), -1, -1, -1),
                    multimask_output=False, repeat_image=True, high_res_features=maps[:2])[0]
    return masks[:, 0]


# --- One completion, a group, stage 1 -------------------------------------------------------------

@pytest.mark.parametrize("mask_pass", ["paper", "released"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_one_equals_hugging_face_and_sam2(family, mask_pass, float64):
    """Hugging Face reads token ids and an image, at its own positions or at 0, 1, 2, ... The
    context queries are the embeddings of five tokens, so that it can read them as well."""
    mllm, sam = random_mllm(family), float64(random_sam())
    lens = float64(random_lens(mllm, mask_pass=mask_pass))
    batch, queries = random_batch(dtype=torch.float64), torch.tensor([11, 22, 33, 44, 55])
    lens.queries.data = mllm.get_input_embeddings()(queries)
    for b, (completion, *_) in enumerate(random_completions()):
        P, T = len(batch["prompt_ids"][b]), len(completion)
        ids = torch.cat([batch["prompt_ids"][b], completion, queries])[None]
        counted = {"position_ids": torch.arange(P + T + 5).expand(3, 1, -1)}
        hidden = mllm.model(input_ids=ids, pixel_values=pixels_of(batch, b),
                            image_grid_thw=batch["grid_thw"][b:b + 1],
                            mm_token_type_ids=(ids == IMAGE).int(),
                            **(counted if mask_pass == "released" else {})).last_hidden_state[0]
        logits = mllm.lm_head(hidden[P - 1:P + T - 1])[:, :250] / 0.7  # the rest is forbidden
        ours = forward_one(lens, select(batch, [b]), completion, temperature=0.7)
        close(ours["log_probs"], logits.log_softmax(-1)[torch.arange(T), completion])
        close(ours["query_states"], hidden[P + T:])
        prompts = lens.connector(hidden[None, P + T:])
        close(ours["mask_logits"], decode(sam, batch["sam_pixels"][b:b + 1], prompts)[0])


def weighted_sum(outputs, seed=5):
    """A scalar that every output enters with its own weight, so that its gradient checks all."""
    g = torch.Generator().manual_seed(seed)
    return sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in outputs)


OUTPUTS = ("log_probs", "query_states", "mask_logits")


def one_by_one(lens, batch, completions):
    """forward_one for each completion -> for each of OUTPUTS, a list of N"""
    out = [forward_one(lens, select(batch, [b]), completion, temperature=0.7)
           for b, group in enumerate(completions) for completion in group]
    return [[each[name] for each in out] for name in OUTPUTS]


def as_groups(lens, batch, completions):
    """The same by the group forward."""
    packed = pack_groups(batch["prompt_ids"],
                         context_positions(prompt_positions(lens.mllm, batch), lens.mask_pass),
                         completions, lens.M)
    out = lens(batch["pixel_values"], batch["grid_thw"], packed,
               lens.encode_images(batch["sam_pixels"]), temperature=0.7)
    assert (out["log_probs"][~packed.mask] == 0).all()
    lengths = packed.mask.sum(1).tolist()
    log_probs = [row[:n] for row, n in zip(out["log_probs"], lengths)]
    return [log_probs, list(out["query_states"]), list(out["mask_logits"])]


def trained_gradients(lens):
    """{name: gradient} of what is trained, all of which must have one; clears them."""
    gradients = {name: p.grad for name, p in lens.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in gradients.values())
    lens.zero_grad()
    return gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_equals_its_completions_one_by_one(family, checkpointing, float64):
    """Outputs and the gradient of everything that stage 2 trains."""
    lens = float64(random_lens(random_mllm(family))).train()
    batch, completions = random_batch(dtype=torch.float64), random_completions()
    set_trainable(lens, "rl")
    expected = one_by_one(lens, batch, completions)
    weighted_sum(sum(expected, [])).backward()
    expected_gradients = trained_gradients(lens)
    if checkpointing:
        checkpoint_layers(lens.mllm)
    outputs = as_groups(lens, batch, completions)
    for theirs, ours in zip(sum(expected, []), sum(outputs, []), strict=True):
        close(ours, theirs)
    weighted_sum(sum(outputs, [])).backward()
    gradients = trained_gradients(lens)
    assert len(gradients) > 100
    for name, gradient in expected_gradients.items():
        close(gradients[name], gradient, 1e-8)


@pytest.mark.parametrize("family, mask_pass", [*((family, "paper") for family in FAMILIES),
                                               ("qwen2_5_vl", "released")])
def test_stage_1_equals_forward_one(family, mask_pass, float64):
    """Prompts and completions of different lengths, read without gradients; then the queries alone.
    Masks, query states and the gradients of queries and connector."""
    lens = float64(random_lens(random_mllm(family), mask_pass=mask_pass))
    batch, completions = random_batch(dtype=torch.float64), random_completions(G=1)
    set_trainable(lens, "align")
    assert len({len(group[0]) for group in completions}) == 2
    _, states, masks = one_by_one(lens, batch, completions)
    weighted_sum(masks).backward()
    expected_gradients = trained_gradients(lens)

    def prefilled():
        positions = context_positions(prompt_positions(lens.mllm, batch), mask_pass)
        with torch.no_grad():
            return model.prefill(lens.mllm, batch, positions, [group[0] for group in completions])
    close(model.queries_after(lens.mllm, prefilled(), lens.queries), torch.stack(states))
    outputs = lens.align_forward(prefilled(), lens.encode_images(batch["sam_pixels"]))
    close(outputs, torch.stack(masks))
    weighted_sum(outputs).backward()
    for name, gradient in trained_gradients(lens).items():
        close(gradient, expected_gradients[name], 1e-8)


# --- The parts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tokens, K", [("vit", "all", 5), ("vit", "one", 1),
                                             ("mlp", "all", 5), ("mlp", "one", 1)])
def test_connector_shapes(kind, tokens, K):
    """At the start the blocks add nothing."""
    connector, x = model.Connector(64, 5, 32, kind, tokens), torch.randn(3, 5, 64)
    assert connector(x).shape == (3, K, 32)
    assert len(connector.blocks) == (4 if kind == "vit" else 0)
    assert torch.equal(connector.blocks(x), x)


def test_mlp_treats_every_query_on_its_own_and_vit_does_not():
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[0, 4] *= -1
    for kind, alone in (("mlp", True), ("vit", False)):
        connector = fill_blocks(model.Connector(64, 5, 32, kind))
        assert torch.allclose(connector(x)[0, :4], connector(y)[0, :4], atol=1e-7) == alone


def test_heads_that_do_not_divide_the_hidden_size():
    """144 gives 4 heads of 36, 80 gives 2 of 40, 560 would give 16 of 35 and 564 does not fit."""
    for C, heads in (144, 4), (80, 2), (560, 16):
        assert model.Connector(C, 5, 32).blocks[0].heads == heads
    with pytest.raises(LensError, match="16 heads do not divide .* 564. Take --connector mlp"):
        model.Connector(564, 5, 32)
    assert not model.Connector(564, 5, 32, "mlp").blocks


def test_sam_head_equals_sams_own_predictor_path():
    """A box as prompt, against SAM2Base's own forward_image and _forward_sam_heads."""
    sam = random_sam().eval()
    head = model.SamHead(copy.deepcopy(sam)).eval()
    pixels, box = torch.randn(1, 3, SAM_SIDE, SAM_SIDE), torch.tensor([[20., 30., 90., 100.]])
    with torch.no_grad():
        ours = head(sam.image_encoder(pixels)["backbone_fpn"], head.box_prompts(box)[None])
        maps = sam.forward_image(pixels)["backbone_fpn"]
        points = {"point_coords": box.view(1, 2, 2), "point_labels": torch.tensor([[2, 3]])}
        coarse = maps[2] + sam.no_mem_embed.view(1, -1, 1, 1)
        theirs = sam._forward_sam_heads(coarse, points, None, maps[:2], multimask_output=False)[3]
    close(ours, theirs[:, 0], 1e-5)


def sam_with_post_processing(state):
    """The SAM 2 of the tiny yaml, changed as sam2.build_sam changes one with
    apply_postprocessing=True."""
    config = OmegaConf.create(OmegaConf.to_container(SAM_CONFIG))
    config.sam_mask_decoder_extra_args = {"dynamic_multimask_via_stability": True,
                                          "dynamic_multimask_stability_delta": 0.05,
                                          "dynamic_multimask_stability_thresh": 0.98}
    sam = instantiate(config, _recursive_=True).eval()
    sam.load_state_dict(state)
    return sam


def test_mask_pass_released_is_sams_own_choice_among_four_masks():
    """Prompts with a stable mask keep it, others get another one. In training mode, and with
    --mask-pass paper, all keep it."""
    g, mllm = torch.Generator().manual_seed(0), random_mllm()
    pixels = torch.randn(1, 3, SAM_SIDE, SAM_SIDE, generator=g)
    prompts, sam = torch.randn(40, 2, 64, generator=g), random_sam()
    with torch.no_grad():  # large logits are stable ones
        sam.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(100)
    chosen = decode(sam_with_post_processing(sam.state_dict()), pixels, prompts)
    single = decode(sam.eval(), pixels, prompts)
    assert 5 < (chosen != single).flatten(1).any(1).sum() < 35
    for mask_pass, training, expected in (("released", False, chosen), ("released", True, single),
                                          ("paper", False, single)):
        lens = random_lens(mllm, mask_pass=mask_pass).train(training)
        lens.sam.load_state_dict(model.SamHead(sam).state_dict())
        lens.image_encoder.load_state_dict(sam.image_encoder.state_dict())
        with torch.no_grad():
            close(lens.sam(lens.encode_images(pixels), prompts[None]), expected, 1e-4)


# --- What is trained ------------------------------------------------------------------------------

@pytest.mark.parametrize("stage, moving", [("align", ("queries", "connector.")),
                                           ("rl", ("queries", "connector.", "mllm.", "sam."))])
def test_what_each_stage_trains(lens, stage, moving):
    """A step moves every parameter that is trained, and no other. Nothing is trained but the parts
    of the stage, and of SAM the parts that draw the mask."""
    frozen = set_trainable(lens, stage)
    before = {name: p.detach().clone() for name, p in lens.named_parameters()}
    trained = {name: p for name, p in lens.named_parameters() if p.requires_grad}
    torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    weighted_sum(sum(as_groups(lens, random_batch(), random_completions()), [])).backward()
    torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0).step()
    moved = {name for name, p in lens.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained) and all(name.startswith(moving) for name in moved)
    assert len(frozen) + len(trained) == len(before) and not any(p.requires_grad for p in frozen)
    expected = {"queries", "connector.position", "connector.blocks.0.qkv.weight",
                "connector.to_sam.2.weight"}
    if stage == "rl":
        expected |= {"mllm.model.visual.blocks.0.attn.qkv.weight",
                     "mllm.model.language_model.layers.0.mlp.up_proj.weight",
                     "mllm.lm_head.weight", "sam.sam_mask_decoder.conv_s0.weight",
                     "sam.sam_mask_decoder.mask_tokens.weight", "sam.no_mem_embed",
                     "sam.sam_prompt_encoder.no_mask_embed.weight"}
    assert expected <= moved


@pytest.mark.parametrize("tied", [True, False])  # 2B and 3B have no head of their own, 7B has
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_trained_and_sharded_whether_tied_or_not(family, tied, mesh):
    """A step of the sharded model moves every weight of the MLLM as it moves the unsharded one's,
    and the sampler follows. Checkpointed layers, FSDP and Qwen3-VL's in-place adding go
    together."""
    lens = random_lens(random_mllm(family, tied))
    alone, sampler = copy.deepcopy(lens), train_rl.copy_mllm(lens.mllm, "fp32")
    for one in (alone, lens):
        frozen = set_trainable(one.train(), "rl")
        if one is lens:
            checkpoint_layers(one.mllm)
            model.shard(one, mesh, "fp32", frozen)
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
        weighted_sum(sum(as_groups(one, random_batch(), random_completions()), [])).backward()
        optimizer.step()
    train_rl.refresh(sampler, lens)
    head, table = lens.mllm.lm_head.weight, lens.mllm.get_input_embeddings().weight
    assert (head is table) == tied and isinstance(head, DTensor) and head.requires_grad
    assert (sampler.lm_head.weight is sampler.get_input_embeddings().weight) == tied
    before = random_mllm(family, tied).state_dict()
    for name, moved in sampler.named_parameters():
        expected = alone.mllm.get_parameter(name)
        step = (expected - before[name]).abs().max()
        assert step > 0, name
        assert (moved - expected).abs().max() < 1e-4 * step.clamp(min=1e-3), name


# --- What is loaded -------------------------------------------------------------------------------

def test_an_official_sam_checkpoint_is_known_by_its_file_name(tmp_path):
    """As the sam2 package builds and saves its smallest model; every weight must fit."""
    theirs = build_sam2("configs/sam2/sam2_hiera_t.yaml", None, device="cpu",
                        apply_postprocessing=False)
    torch.save({"model": theirs.state_dict()}, tmp_path / "sam2_hiera_tiny.pt")
    ours = model.load_sam(tmp_path / "sam2_hiera_tiny.pt")
    state = ours.state_dict()
    assert ours.image_size == 1024 and len(state) == len(theirs.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


# Hiera's width and blocks per stage
OFFICIAL = {"tiny": (96, [1, 2, 7, 2]), "small": (96, [1, 2, 11, 2]), "base_plus": (112, None),
            "large": (144, [2, 6, 36, 4])}


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize("size", OFFICIAL)
def test_every_official_sam_takes_the_yaml_of_its_size_and_version(version, size, tmp_path,
                                                                  monkeypatch):
    configs, stored = [], torch.nn.Linear(2, 2)

    def build(config):
        configs.append(config)
        return torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "instantiate", build)
    file, name = tmp_path / f"{version}_hiera_{size}.pt", size.replace("_", "-")
    said = (f"{file} is missing. Download it: hf download facebook/{version}-hiera-{name} "
            f"{file.name} --local-dir {tmp_path}")
    with pytest.raises(LensError, match=said):
        model.load_sam(file)
    model.load_sam(file, with_weights=False)  # as for a published checkpoint, which holds its own
    torch.save({"model": stored.state_dict()}, file)
    assert torch.equal(model.load_sam(str(file)).weight, stored.weight)
    assert not torch.equal(model.load_sam(file, with_weights=False).weight, stored.weight)
    for config in configs:
        trunk = config.image_encoder.trunk
        assert (trunk.embed_dim, trunk.get("stages")) == OFFICIAL[size]
        assert bool(config.get("proj_tpos_enc_in_obj_ptrs")) == (version == "sam2.1")


def test_a_sam_folder(tmp_path):
    sam = random_sam()
    shutil.copy(ROOT / "tests/tiny/sam/config.yaml", tmp_path)
    with pytest.raises(LensError, match="model.pt is missing. A folder needs config.yaml and"):
        model.load_sam(str(tmp_path))
    for content in {**sam.state_dict(), "stranger": torch.zeros(1)}, {}, [1]:
        torch.save({"model": content}, tmp_path / "model.pt")
        with pytest.raises(LensError, match="model.pt: not the weights of .*config.yaml"):
            model.load_sam(str(tmp_path))
    torch.save({"model": sam.state_dict()}, tmp_path / "model.pt")
    loaded = model.load_sam(str(tmp_path)).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in sam.state_dict().items())


def save_mllm(mllm, folder):
    """A checkpoint with the tiny stand-in's tokenizer -> its folder"""
    mllm.save_pretrained(folder)
    for file in PROCESSOR_FILES:
        shutil.copy(TINY / file, folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_by_its_own_config(family, tmp_path):
    """Class, weights and dtype, and the frame in which it speaks of boxes, for 4 x 6 patches of 14
    pixels."""
    saved = random_mllm(family)
    folder = save_mllm(saved, tmp_path)
    mllm, processor = model.load_mllm(folder, torch.float32)
    assert type(mllm) is type(saved) and processor.tokenizer.eos_token_id == END
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in mllm.named_parameters())
    assert model.load_mllm(folder, torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16
    expected = (6 * 14, 4 * 14) if family == "qwen2_5_vl" else (1000, 1000)
    assert mllm_frame(mllm.config.model_type, torch.tensor([1, 4, 6]), 14) == expected


@pytest.mark.parametrize("config, message", [
    ('{"model_type": "llama"}', "it is a llama, not a qwen2_vl, qwen2_5_vl or qwen3_vl"),
    ('{"model_type": "qwen3_vl_moe"}', "it is a qwen3_vl_moe"),
    ('{"model_type": "qwen9_vl"}', "qwen9_vl"),
    ("{}", "could not be loaded"), ("{", "could not be loaded"),
    ('{"model_type": "qwen2_vl"}', "could not be loaded"), (None, "could not be loaded")])
def test_an_mllm_that_cannot_be_loaded_is_one_clear_line(config, message, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(LensError) as error:
        model.load_mllm(str(tmp_path), torch.float32)
    for part in (str(tmp_path), message, "hf download", "--preset tiny"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_mllm_that_was_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(LensError, match=f"--mllm {name}: .*hf download {name}"):
        model.load_mllm(name, torch.float32)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_download_that_broke_off(file, tmp_path):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:5000])
    with pytest.raises(LensError, match="could not be loaded.*hf download"):
        model.load_mllm(str(tmp_path), torch.float32)


@pytest.mark.parametrize("tied, change, message", [
    (False, lambda name: name.replace("lm_head.weight", ""), "1 missing keys: lm_head.weight"),
    (True, lambda name: "" if ".layers.2." in name else name,
     "12 missing keys: model.language_model.layers.2.*, model.*, model.* ..."),
    (True, lambda name: f"base_model.model.{name}", r"\d+ missing keys: .* Merge an adapter"),
    (True, lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
     "3 missing keys: .*q_proj.weight, .*q_proj.weight, .*q_proj.weight"),
    (True, None, "1 unexpected keys: v_head.weight")])
def test_weights_that_do_not_fit_their_config_are_named(tied, change, message, tmp_path):
    """A head that is not tied, a whole layer, or an adapter's names, where transformers would go on
    with random weights; weights that the model does not have."""
    folder = save_mllm(random_mllm(tied=tied), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change:
        weights = {change(name): tensor for name, tensor in weights.items() if change(name)}
    else:
        weights["v_head.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LensError, match=f"--mllm {folder}: its weights do not fit .*{message}"):
        model.load_mllm(folder, torch.float32)


# --- The tokens that end a completion or never occur in one ---------------------------------------

@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(TINY)


def test_forbidden_tokens(processor):
    tokenizer = processor.tokenizer
    forbidden = model.forbidden_tokens(tokenizer, len(tokenizer) + 5, END)
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>",
                  "<|endoftext|>"):
        assert forbidden[tokenizer.convert_tokens_to_ids(token)]
    assert forbidden[len(tokenizer):].all() and not forbidden[END]
    assert not forbidden[tokenizer("the red circle at [12, 34]").input_ids].any()


def test_only_released_prompts_may_be_answered_with_qwens_marks_of_a_box(processor):
    marks = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|quad_start|>"]})
    ids, size = tokenizer.convert_tokens_to_ids(marks), len(tokenizer)
    paper = model.forbidden_tokens(tokenizer, size, END)
    assert paper[ids].all()
    for prompt in ("released", "released-cot"):
        changed = model.forbidden_tokens(tokenizer, size, END, prompt) != paper
        assert changed.nonzero()[:, 0].tolist() == sorted(ids)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    """The random MLLM has 256 tokens, the stand-in's tokenizer more."""
    folder = save_mllm(random_mllm(), tmp_path)
    shared = SharedArgs(**{**align.TINY, "mllm": folder, "sam": str(ROOT / "tests/tiny/sam")})
    with pytest.raises(LensError, match=r"the tokenizer has \d+ tokens, .* only 256: they do not"):
        model.build_lens(shared)


def test_what_the_chat_template_decides(processor):
    """The stand-in's own ends a turn with its end token and opens nothing. A model that always
    thinks has a template which opens the think block; another may end a turn with another token."""
    def read():
        return model.read_template(processor, SharedArgs(mllm="my/mllm"))
    assert read() == (END, "")
    template, im_end = processor.chat_template, processor.tokenizer.decode([END])
    processor.chat_template = template.replace("<|im_start|>assistant\n",
                                               "<|im_start|>assistant\n<think>\n")
    assert read() == (END, "<think>\n")
    processor.chat_template = template.replace(im_end, "<|endoftext|>")
    assert read() == (processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"), "")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(LensError, match="--mllm my/mllm: '</think>' are special tokens"):
        read()
    processor.chat_template = None
    with pytest.raises(LensError, match="--mllm my/mllm: it has no chat template"):
        read()


# --- build_lens, and the folder of a finished run -------------------------------------------------

@pytest.fixture
def prompt_length(tmp_path, monkeypatch):
    """-> a function: the prompt of one image (width, height), for a processor with Qwen's patches
    and its own limit of pixels, and for --max-pixels -> tokens, pixels"""
    monkeypatch.chdir(ROOT)

    def measure(own, size, **flags):
        folder = tmp_path / str(own)
        shutil.copytree(TINY, folder, dirs_exist_ok=True)
        config = json.loads((TINY / "processor_config.json").read_text())
        config["image_processor"] |= {"patch_size": 14, "size": {"longest_edge": own,
                                                                 "shortest_edge": 3136}}
        (folder / "processor_config.json").write_text(json.dumps(config))
        shared = SharedArgs(**{**align.TINY, "mllm": str(folder), **flags})
        processor = model.build_lens(shared)[1]
        nothing = torch.zeros(1, 1).numpy() > 0
        item = {"id": "x/0", "expression": "the cup " * 40, "image": Image.new("RGB", size),
                "gt_box": None, "gt_mask": nothing, "ignore_mask": nothing}
        batch = Collator(processor, "qwen2_5_vl", SAM_SIDE, shared.max_prompt)([item])
        return len(batch["prompt_ids"][0]), int(batch["grid_thw"].prod()) * 14 * 14
    return measure


def test_max_pixels(prompt_length):
    """Qwen's own limit is 12,845,056 pixels, 16,384 tokens of 28 x 28. --max-pixels lowers it and
    never raises it."""
    qwens = 12_845_056
    for size in (1600, 1200), (1200, 1600), (3000, 400):
        tokens, pixels = prompt_length(qwens, size)
        assert tokens < 2048 and 900_000 < pixels <= 1_000_000
    assert prompt_length(qwens, (560, 560))[1] == 560 * 560  # a small image stays as it is
    assert prompt_length(500_000, (1600, 1200))[1] <= 500_000
    with pytest.raises(LensError, match="the limit is 2048.*--max-prompt or .*--max-pixels"):
        prompt_length(qwens, (1600, 1200), max_pixels=0)


def tiny_settings(**changes):
    return SharedArgs(**{**align.TINY, "mllm": str(TINY), "sam": str(ROOT / "tests/tiny/sam"),
                         **changes})


def test_a_finished_run_is_loaded_as_it_was_saved(tmp_path, mesh):
    """With an MLLM and a SAM of its own, which take the place of --mllm and --sam. A run that lies
    upon another takes that one's MLLM and SAM along, so it does not need it any more."""
    shared = tiny_settings(seed=1, connector="mlp")
    lens, processor = model.build_lens(shared)
    with torch.no_grad():
        for parameter in [*lens.sam.parameters(), *lens.mllm.parameters()]:
            parameter.mul_(1.01)
    first, second = tmp_path / "first", tmp_path / "second"
    model.export(first, lens, shared, lens.mllm, processor)
    shutil.copytree(ROOT / "tests/tiny/sam", first / "sam")
    assert model.read_run(first) == vars(shared)
    again = tiny_settings(connector="mlp")
    loaded, _ = model.build_lens(again, first)
    assert (again.mllm, again.sam) == (str(first / "mllm"), str(first / "sam"))
    for name, parameter in lens.named_parameters():
        if not name.startswith("image_encoder"):
            assert torch.equal(parameter, loaded.get_parameter(name)), name
    model.export(second, loaded, again)
    shutil.rmtree(first)
    alone, _ = model.build_lens(tiny_settings(connector="mlp"), second)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), alone.parameters()))
    assert sorted(path.name for path in second.iterdir()) == [
        "context.safetensors", "lens.json", "mllm", "sam", "sam.safetensors"]


def test_a_folder_that_is_no_finished_run(tmp_path, aligned):
    with pytest.raises(LensError, match="lens.json is missing.*align.py.*convert_released.py"):
        model.read_run(tmp_path)
    for flag, value in ("num_queries", 4), ("connector", "mlp"), ("sam_tokens", "one"):
        said = f"{aligned} was trained with --{flag.replace('_', '-')} .*, not {value}"
        with pytest.raises(LensError, match=said):
            model.build_lens(tiny_settings(**{flag: value}), aligned)
    shutil.copytree(aligned, tmp_path, dirs_exist_ok=True)
    settings = json.loads((aligned / "lens.json").read_text())
    (tmp_path / "lens.json").write_text(json.dumps({**settings, "num_queries": 4}))
    with pytest.raises(LensError, match="context.safetensors does not fit .*another architecture"):
        model.build_lens(tiny_settings(num_queries=4), tmp_path)
