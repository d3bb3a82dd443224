"""Our numbers beside those of the paper's released code, for one image and one completion.

    python tests/evidence/against_released.py FOLDER     # docs/evidence/against_released.json

FOLDER holds a checkpoint that the released code (hustvl/LENS, 28cf510) wrote at toy size with
random weights, and what that code computed with it: with its own 1-D positions (_a) and with 3-D
ones (_b). The checkpoint is converted, loaded like any run, and compared. Another attention kernel
alone changes the released code's logits by 4.5e-6 and its mask logits by 4e-5. The folder is not
published; its README names its tensors.
"""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import numpy as np
import sam2
import torch
from convert_released import convert
from omegaconf import OmegaConf

from align import SharedArgs
from grpo import pack_groups
from model import build_lens, context_positions, group_hidden, prompt_positions, read_run


@torch.no_grad()
def largest_differences(folder):
    """-> {positions: {tensor: largest difference}}"""
    lens, case = load_toy(folder / "checkpoint"), np.load(folder / "case_single.npz")
    batch, completion = toy_batch(folder, case, lens.mllm)
    pixel_values, grid_thw = batch["pixel_values"], batch["grid_thw"]
    positions = prompt_positions(lens.mllm, batch)
    features = lens.encode_images(batch["sam_pixels"])
    differences = {}
    for name, mask_pass, tag in (("1-D", "released", "a"), ("3-D", "paper", "b")):
        packed = pack_groups(batch["prompt_ids"], context_positions(positions, mask_pass),
                             [[completion]], lens.M)
        out = lens(pixel_values, grid_thw, packed, features, with_log_probs=False)
        hidden = group_hidden(lens.mllm, pixel_values, grid_thw, packed, lens.queries)
        ours = {"logits": lens.mllm.lm_head(hidden), "query_hidden": out["query_states"],
                "sam_embedding": lens.connector(out["query_states"]),
                "low_res_masks": out["mask_logits"]}
        differences[name] = {}
        for key, tensor in ours.items():
            theirs = case[f"{key}_{tag}"].reshape(tensor.shape)
            differences[name][key] = float(np.abs(tensor.numpy() - theirs).max())
    return differences


def load_toy(folder):
    """The toy checkpoint through the converter. It has no tokenizer, so it gets the stand-in's,
    cut to its vocabulary; no text is read here. -> Lens"""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_toy_sam(place / "toy_sam")
        convert(folder, place / "run", str(place / "toy_sam"))
        for name in ("processor_config.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(ROOT / "tests/tiny/mllm" / name, place / "run/mllm")
        V = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokenizer = json.loads((ROOT / "tests/tiny/mllm/tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        # the last id remains for <unk>, which the tokenizer adds
        tokenizer["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < V - 1}
        (place / "run/mllm/tokenizer.json").write_text(json.dumps(tokenizer))
        settings = {**read_run(place / "run"), "precision": "fp32"}  # SAM's encoder follows it
        lens, _ = build_lens(SharedArgs(**settings), place / "run")
    for block in lens.connector.blocks:      # the released code has 16 heads even at this toy size
        block.heads = 16
    return lens.eval()


def write_toy_sam(folder):
    """--sam of the toy checkpoint: SAM 2-Large's configuration with a small trunk, no weights."""
    config = OmegaConf.load(Path(sam2.__path__[0]) / "configs/sam2/sam2_hiera_l.yaml")
    config.model.image_encoder.trunk.update(
        embed_dim=16, num_heads=1, stages=[1, 2, 3, 1], global_att_blocks=[4],
        window_spec=[8, 4, 16, 8], window_pos_embed_bkg_spatial_size=[7, 7])
    config.model.image_encoder.neck.backbone_channel_list = [128, 64, 32, 16]
    folder.mkdir()
    OmegaConf.save(config, folder / "config.yaml")


def toy_batch(folder, case, mllm):
    """Its one image and prompt as data.Collator lays them out, and the completion."""
    ids, grid_thw = torch.from_numpy(case["input_ids"])[0], torch.from_numpy(case["image_grid_thw"])
    prompt, completion = ids.tensor_split([int(case["prompt_length"])])
    pixel_values = np.load(folder / "vision.npz")["pixel_values"][:int(grid_thw.prod())]
    small = torch.from_numpy(np.load(folder / "sam_images_u8.npz")["u8_128"][:1]).float()
    pixels = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    mean, deviation = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    batch = {"prompt_ids": [prompt], "token_types": [(prompt == mllm.config.image_token_id).long()],
             "grid_thw": grid_thw, "pixel_values": torch.from_numpy(pixel_values),
             "sam_pixels": (pixels - mean[:, None, None]) / deviation[:, None, None]}
    return batch, completion


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    torch.set_num_threads(1)
    text = json.dumps(largest_differences(parser.parse_args().folder), indent=1) + "\n"
    (ROOT / "docs/evidence/against_released.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
