"""tests/tools/convert_released.py: random checkpoints with the names and keys of the released code,
converted, loaded like any run, and compared with its mask pass, which is written here anew. And the
sizes of the real models."""
import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import (END, IMAGE, ROOT, SAM_SIDE, call, random_batch, random_completions,
                      random_sam, refused)
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from test_model import decode, sam_with_post_processing
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import convert_released
import data
import model
import parameters
import plan
from align import SharedArgs, start_processes
from grpo import pack_groups
from model import context_positions, prompt_positions

C, M = 512, 6                                    # with less than 512, ours has not 16 heads
VIDEO_MEMORY = ["memory_attention.layers.0.linear1.weight", "memory_encoder.out_proj.weight",
                "mask_downsample.weight", "no_obj_ptr", "no_obj_embed_spatial",
                "obj_ptr_proj.layers.0.weight", "obj_ptr_tpos_proj.bias"]
PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
             "chat_template.jinja")


def write_released(folder, family="qwen2_5_vl", tied=True, told_by="architectures", files=1,
                   connector=True, change=None, vocabulary=0):
    """A random LENS with a SAM like the stand-in. told_by: what says that it is a Qwen2.5-VL;
    change(tensors) changes what goes into the file. -> the MLLM, SAM's state, the tensors"""
    config, text, vision = released_config(family, tied, told_by, connector)
    text["vocab_size"] = config["vocab_size"] = vocabulary or text["vocab_size"]
    torch.manual_seed(0)
    mllm = AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        family, **copy.deepcopy({**text, "vision_config": vision}))).float().eval()
    sam = random_sam()
    with torch.no_grad():
        sam.sam_mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(30)
    tensors = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."):
               tensor for name, tensor in mllm.state_dict().items()
               if not (tied and name == "lm_head.weight")}
    tensors |= {f"sam.{name}": tensor for name, tensor in sam.state_dict().items()}
    tensors |= {f"sam.{name}": torch.randn(3) for name in VIDEO_MEMORY}
    tensors |= context_tensors(connector)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if change:
        change(tensors)
    folder.mkdir()
    names = list(tensors)
    for i in range(files):
        save_file({name: tensors[name] for name in names[i::files]},
                  folder / f"model-{i + 1:05d}-of-{files:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for file in PROCESSOR:
        shutil.copy(ROOT / "tests/tiny/mllm" / file, folder)
    (folder / "sam").mkdir()                     # for --sam, without weights
    shutil.copy(ROOT / "tests/tiny/sam/config.yaml", folder / "sam")
    return mllm, sam.state_dict(), tensors


def released_config(family, tied, told_by, connector):
    """-> config.json as the released code writes it; what of it makes the MLLM; its vision tower"""
    stand_in = json.loads((ROOT / "tests/tiny/mllm/config.json").read_text())
    text = {name: number for name, number in stand_in.items() if name.endswith("token_id")}
    text |= dict(hidden_size=C, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=stand_in["text_config"]["vocab_size"],
                 rope_theta=1e4, initializer_range=0.1, bos_token_id=None, eos_token_id=END,
                 pad_token_id=0, tie_word_embeddings=tied,
                 rope_scaling=dict(mrope_section=[16, 24, 24], rope_type="default", type="default"))
    vision = dict(depth=2, num_heads=2, patch_size=8, in_chans=3, initializer_range=0.2)
    if family == "qwen2_5_vl":
        vision |= dict(hidden_size=32, out_hidden_size=C, intermediate_size=64)
        vision |= {"window_size": {"window_size": 32},
                   "fullatt_block_indexes": {"fullatt_block_indexes": [1]}}.get(told_by, {})
    else:
        vision |= dict(embed_dim=32, hidden_size=C, mlp_ratio=2)
    name = "SAMR1ForConditionalGeneration" + "_qwen2p5" * (told_by == "architectures")
    config = {**text, "vision_config": vision | {"model_type": "qwen2_vl"}, "num_of_query": M,
              "model_type": "qwen2_vl", "architectures": [name], "if_use_qwen_connector": connector,
              "torch_dtype": "float32", "transformers_version": "4.51.3"}
    return config, text, vision


def context_tensors(connector):
    """Queries and connector under the released names."""
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=g) * 0.05
    tensors = {"learnable_query": draw(1, M, C),
               "conv_1d.weight": draw(C, C, M), "conv_1d.bias": draw(C),
               "proj_to_sam.0.weight": draw(C, C), "proj_to_sam.0.bias": draw(C),
               "proj_to_sam.2.weight": draw(64, C), "proj_to_sam.2.bias": draw(64)}
    if not connector:
        return tensors
    block = {"norm1.weight": [C], "norm1.bias": [C], "norm2.weight": [C], "norm2.bias": [C],
             "attn.qkv.weight": [3 * C, C], "attn.qkv.bias": [3 * C],
             "attn.proj.weight": [C, C], "attn.proj.bias": [C],
             "mlp.fc1.weight": [4 * C, C], "mlp.fc1.bias": [4 * C],
             "mlp.fc2.weight": [C, 4 * C], "mlp.fc2.bias": [C]}
    for i in range(4):
        tensors |= {f"connector.blocks.{i}.{name}": draw(*size) for name, size in block.items()}
    return tensors | {"connector.pos_embed": draw(1, M, C)}


def convert(folder, out, **options):
    return convert_released.convert(folder, out, str(folder / "sam"), **options)


def load(out):
    settings = {**model.read_run(out), "precision": "fp32"}  # SAM's encoder follows it
    return model.build_lens(SharedArgs(**settings), out)


# --- The same numbers -----------------------------------------------------------------------------

@torch.no_grad()
def released_prompt(mllm, t, batch, completion, connector=True):
    """The mask pass of the released code from its tensors t, for one completion: Hugging Face's
    forward without position ids (so it counts 0, 1, 2, ...), four ViT blocks with 16 heads, the
    convolution over M, the MLP. -> prompt embedding (1, 1, D)"""
    ids = torch.cat([batch["prompt_ids"][0], completion])
    embeds = mllm.get_input_embeddings()(ids)
    features = mllm.model.get_image_features(batch["pixel_values"], batch["grid_thw"])
    embeds[ids == mllm.config.image_token_id] = torch.cat(features.pooler_output)
    embeds = torch.cat([embeds, t["learnable_query"][0]])[None]
    x = mllm.model(inputs_embeds=embeds).last_hidden_state[0, -M:]

    def linear(name, x):
        return F.linear(x, t[name + ".weight"], t[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, (C,), t[name + ".weight"], t[name + ".bias"], 1e-6)
    if connector:
        x = x + t["connector.pos_embed"][0]
    for name in [f"connector.blocks.{i}." for i in range(4)] if connector else []:
        qkv = linear(name + "attn.qkv", norm(name + "norm1", x))
        q, k, v = qkv.view(M, 3, 16, C // 16).permute(1, 2, 0, 3)
        attended = ((q @ k.mT) / (C // 16) ** 0.5).softmax(-1) @ v           # (16, M, C / 16)
        x = x + linear(name + "attn.proj", attended.transpose(0, 1).reshape(M, C))
        wide = linear(name + "mlp.fc1", norm(name + "norm2", x))
        x = x + linear(name + "mlp.fc2", wide * torch.sigmoid(1.702 * wide))
    one = torch.einsum("chm,mh->c", t["conv_1d.weight"], x) + t["conv_1d.bias"]
    return linear("proj_to_sam.2", F.gelu(linear("proj_to_sam.0", one)))[None, None]


@torch.no_grad()
def mask_logits(lens, batch, packed):
    features = lens.encode_images(batch["sam_pixels"])
    return lens(batch["pixel_values"], batch["grid_thw"], packed, features)["mask_logits"]


@pytest.mark.parametrize("family, tied, told_by, files, connector", [
    ("qwen2_5_vl", True, "architectures", 1, True),
    ("qwen2_5_vl", False, "fullatt_block_indexes", 2, True),
    ("qwen2_5_vl", True, "window_size", 1, True),
    ("qwen2_vl", True, "nothing", 3, True),
    ("qwen2_vl", False, "nothing", 1, False)])
def test_it_equals_the_released_mask_pass(family, tied, told_by, files, connector, tmp_path):
    mllm, sam, tensors = write_released(tmp_path / "LENS", family, tied, told_by, files, connector)
    assert convert(tmp_path / "LENS", tmp_path / "run")
    lens, processor = load(tmp_path / "run")
    lens.eval()
    assert lens.mllm.config.model_type == family
    assert (lens.mllm.lm_head.weight is lens.mllm.get_input_embeddings().weight) == tied
    assert all(torch.equal(p, mllm.get_parameter(n)) for n, p in lens.mllm.named_parameters())
    # --max-pixels never raises the processor's own limit
    assert processor.image_processor.size["longest_edge"] == 26_569
    batch = random_batch(((1, 4, 6),), (7,))
    image = torch.tensor(mllm.config.image_token_id)
    batch["prompt_ids"] = [ids.where(ids != IMAGE, image) for ids in batch["prompt_ids"]]
    completions, in_3d = random_completions(1, 3), prompt_positions(lens.mllm, batch)
    in_1d = context_positions(in_3d, lens.mask_pass)
    packed = pack_groups(batch["prompt_ids"], in_1d, completions, M)
    theirs = sam_with_post_processing(sam)
    for mask, completion in zip(mask_logits(lens, batch, packed), completions[0]):
        prompt = released_prompt(mllm, tensors, batch, completion, connector)
        expected = decode(theirs, batch["sam_pixels"], prompt)[0]
        assert expected.std() > 0.01
        assert (mask - expected).abs().max() < 1e-4 * expected.std() + 1e-5
        packed = pack_groups(batch["prompt_ids"], in_3d, [[completion]], M)
        other = mask_logits(lens, batch, packed)[0]                          # positions do matter
        assert (other - expected).abs().max() > 0.01 * expected.std()


def test_from_the_command_line_to_a_mask(world, tmp_path):
    """Converted and evaluated: prompt, greedy completion (3-D positions), mask pass (1-D) and mask,
    each computed here anew. The run folder has been moved meanwhile."""
    folder, out, rows = tmp_path / "LENS", tmp_path / "elsewhere", tmp_path / "rows.jsonl"
    mllm, sam, tensors = write_released(folder, told_by="window_size", files=2)
    call("convert_released.py", folder, tmp_path / "run", "--sam", folder / "sam", preset="")
    (tmp_path / "run").rename(out)
    processor = AutoProcessor.from_pretrained(folder)
    shutil.rmtree(folder)
    call("evaluate.py", "--checkpoint", out, "--data", world, "--datasets", "shapes", "--limit", 3,
         "--max-completion", 8, "--precision", "fp32", "--workers", 0, "--predictions", rows,
         preset="")
    theirs = sam_with_post_processing(sam)
    special = processor.tokenizer.added_tokens_decoder.items()
    banned = [[i] for i, token in special if token.special and i != END]
    val = data.EvaluationRows(data.read_records(world, ["shapes"], ["val"]), 3)
    items = {item["id"]: item for item in val}
    for row in map(json.loads, rows.read_text().splitlines()):
        item = items.pop(row["id"])
        text = ("<|im_start|>system\nYou are a helpful assistant. <|im_end|>\n<|im_start|>user\n"
                "<|vision_start|><|image_pad|><|vision_end|>Output the bounding box of the "
                f"{item['expression']} in the image.<|im_end|>\n<|im_start|>assistant\n")
        inputs = processor(text=[text], images=[item["image"]], return_tensors="pt",
                           return_mm_token_type_ids=True)
        ids = mllm.generate(**inputs, do_sample=False, max_new_tokens=8, bad_words_ids=banned,
                            eos_token_id=END, pad_token_id=0)
        completion = ids[0, inputs["input_ids"].shape[1]:]
        assert row["completion"] == processor.tokenizer.decode(completion, skip_special_tokens=True)
        batch = {"prompt_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"],
                 "grid_thw": inputs["image_grid_thw"]}
        prompt = released_prompt(mllm, tensors, batch, completion)
        logits = decode(theirs, data.sam_image(item["image"], SAM_SIDE)[None], prompt)
        expected = F.interpolate(logits[None], item["gt_mask"].shape, mode="bilinear")[0, 0] > 0
        mask = torch.from_numpy(coco_mask.decode(row["mask"])).bool()
        assert (mask == expected).float().mean() > 0.999
        assert 100 < expected.sum() < expected.numel() - 100
    assert not items


# --- The folder it writes -------------------------------------------------------------------------

def test_an_ordinary_run_folder(tmp_path):
    """The released code's settings; SAM 2 as the checkpoint holds it; the MLLM in the precision of
    the file, with its generation config. A run that starts from it is whole without it."""
    def halve(tensors):
        for name in tensors:
            if name.startswith(("model.", "visual.", "lm_head.")):
                tensors[name] = tensors[name].bfloat16()
    mllm, sam, tensors = write_released(tmp_path / "LENS", change=halve)
    generation = {"eos_token_id": 2, "do_sample": True, "top_k": 3}
    (tmp_path / "LENS/generation_config.json").write_text(json.dumps(generation))
    run = tmp_path / "run"
    (tmp_path / "run.tmp/sam").mkdir(parents=True)                   # of a call that was killed
    convert(tmp_path / "LENS", run, prompt="released-cot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LENS", "run"]
    names = ["context.safetensors", "lens.json", "mllm", "sam", "sam.safetensors"]
    assert sorted(path.name for path in run.iterdir()) == names
    settings = model.read_run(run)
    assert settings.keys() == SharedArgs.__dataclass_fields__.keys()
    expected = {"profile": "released", "prompt": "released-cot", "mask_pass": "released",
                "num_queries": M, "sam_tokens": "one", "max_pixels": 1_000_000, "connector": "vit",
                "mllm": str(run / "mllm"), "sam": str(run / "sam")}
    assert {name: settings[name] for name in expected} == expected
    loaded = model.load_sam(str(run / "sam")).state_dict()
    assert loaded.keys() == sam.keys() and all(torch.equal(loaded[name], sam[name]) for name in sam)
    weights = load_file(run / "mllm/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config = json.loads((run / "mllm/config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and "num_of_query" not in json.dumps(config)
    assert '"top_k": 3' in (run / "mllm/generation_config.json").read_text()
    lens, processor = load(run)
    assert lens.prompt == "released-cot" and lens.queries.dtype == torch.float32
    assert torch.equal(lens.queries, tensors["learnable_query"][0])

    start_processes(SharedArgs())
    try:
        model.export(tmp_path / "next", lens, SharedArgs(**settings), lens.mllm, processor)
    finally:
        torch.distributed.destroy_process_group()
    shutil.rmtree(run)
    again, _ = load(tmp_path / "next")
    for name, tensor in lens.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_video_memory_that_the_checkpoint_does_not_hold_is_zeros():
    """SAM2-Large is built with its memory; a checkpoint may hold all else of it."""
    sam = random_sam()
    tensors = sam.state_dict()
    tensors.pop("no_mem_pos_enc")
    assert sam.no_mem_pos_enc.any()
    assert convert_released.fill_sam(sam, tensors) == [] and not sam.no_mem_pos_enc.any()


def test_without_a_processor(tmp_path):
    """It says where one belongs, and then the run is complete."""
    folder, out = tmp_path / "LENS", tmp_path / "run"
    write_released(folder)
    for file in PROCESSOR:
        (folder / file).unlink()
    said = call("convert_released.py", folder, out, "--sam", folder / "sam", preset="")
    assert f"Copy those of the MLLM it was trained from into {out / 'mllm'}" in said
    with pytest.raises(data.LensError, match="run/mllm: could not be loaded"):
        load(out)
    for file in PROCESSOR:
        shutil.copy(ROOT / "tests/tiny/mllm" / file, out / "mllm")
    assert load(out)


# --- What is wrong is named, and nothing is written -----------------------------------------------

@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "LENS"
    write_released(folder, tied=False)
    return folder


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *size):
    return lambda tensors: tensors.update({name: torch.zeros(size)})


@pytest.mark.parametrize("change, named", [
    (drop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    (drop("visual.merger.mlp.0.bias"), "merger.mlp.0.bias"),
    (drop("lm_head.weight"), "lm_head.weight"),
    (drop("connector.blocks.2.mlp.fc1.bias"), "blocks.2.fc1.bias"),
    (drop("learnable_query"), "queries"),
    (drop("sam.no_mem_embed"), "no_mem_embed"),
    (put("stranger", 3), "stranger"),
    (put("model.layers.2.mlp.up_proj.weight", 128, C), "layers.2.mlp.up_proj"),
    (put("visual.stranger", 3), "visual.stranger"),
    (put("connector.stranger", 3), "stranger"),
    (put("sam.stranger", 3), "stranger"),
    (put("model.norm.weight", C + 1), "norm.weight"),
    (put("learnable_query", 1, M + 1, C), "queries"),
    (put("proj_to_sam.2.bias", 65), "to_sam.2.bias"),
    (put("sam.sam_mask_decoder.mask_tokens.weight", 4, 65), "mask_tokens")])
def test_a_wrong_tensor(change, named, untied, tmp_path, monkeypatch):
    tensors = convert_released.read_tensors(untied)
    change(tensors)
    monkeypatch.setattr(convert_released, "read_tensors", lambda folder: tensors)
    with pytest.raises(data.LensError) as error:
        convert(untied, tmp_path / "run")
    assert all(part in str(error.value) for part in (str(untied), named, "--sam"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "config.json",
                                  "tokenizer.json"])
def test_a_download_that_broke_off(file, untied, tmp_path):
    folder = tmp_path / "LENS"
    shutil.copytree(untied, folder)
    (folder / file).write_bytes((untied / file).read_bytes()[:500])
    with pytest.raises(data.LensError, match="LENS.*Download it again"):
        convert(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["LENS"]


def test_what_is_no_published_checkpoint(untied, tmp_path):
    write_released(tmp_path / "small", vocabulary=700)
    for folder, sam, message in (
            (ROOT / "tests/tiny/mllm", "tests/tiny/sam",
             "no num_of_query: this is a plain MLLM (--mllm)"),
            (tmp_path, "tests/tiny/sam", "config.json is missing"),
            (untied, "none.pt", "--sam none.pt: not a folder"),
            (tmp_path / "small", tmp_path / "small/sam", "the tokenizer has ")):
        said = refused("convert_released.py", folder, tmp_path / "run", "--sam", sam, preset="")
        assert message in said and not (tmp_path / "run").exists()
    with pytest.raises(data.LensError, match="no finished run here.*tests/tools/convert_released"):
        model.read_run(untied)
    (tmp_path / "run").mkdir()
    with pytest.raises(data.LensError, match="run exists already"):
        convert(untied, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


# --- The real sizes -------------------------------------------------------------------------------

# in their safetensors, by the metadata of the hub
PUBLISHED = {"Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
             "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
             "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656}


def test_parameters_are_those_published(monkeypatch):
    """On the meta device: each MLLM's total; SAM2-Large's 224.4 M with its video memory, of which
    VIDEO_MEMORY names all that Lens leaves out; and the page is what its script writes."""
    counts = {name: plan.count(plan.build_mllm(plan.mllm_config(name))) for name in PUBLISHED}
    assert counts == PUBLISHED and counts.keys() == plan.MLLMS.keys()
    assert parameters.page() == (ROOT / "docs/evidence/parameters.md").read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)    # sam2 must not see a GPU
    sam = plan.build_sam()
    assert sam.no_mem_embed.is_meta and torch.cuda.is_available()
    assert round(plan.count(sam) / 1e6, 1) == 224.4
    used = {f"image_encoder.{name}" for name, _ in sam.image_encoder.named_parameters()}
    used |= {name for name, _ in model.SamHead(sam).named_parameters()}
    assert used == {name for name, _ in sam.named_parameters()
                    if not name.startswith(convert_released.VIDEO_MEMORY)}
