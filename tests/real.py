"""What could be checked against the real thing without weights or pictures. By hand:

    python tests/real.py --suite GroundingSuite-Eval.jsonl     # github.com/hustvl/GroundingSuite
    python tests/real.py --released FOLDER

Both write docs/real.json. --suite, ten seconds, reads all records of the real annotation file
(empty files stand in for the pictures) and decodes every mask.

--released takes a checkpoint that the paper's released code (28cf510) wrote at toy size with random
weights, and what that code put out for one picture and one answer: with its own 1-D positions (a)
and with 3-D ones (b). It is converted, loaded as any run, and compared. The code's noise between
attention kernels is 4.5e-6 in logits and 4e-5 in mask logits. The folder is not published; its
README names its tensors.
"""
import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import sam2
import torch
from convert_released import convert
from omegaconf import OmegaConf

from align import SharedArgs
from data import extent, load_masks, read_records
from model import (build_lens, context_positions, group_hidden, pack_groups, prompt_positions,
                   read_run)
from rewards import box_iou


def check_suite(path):
    """-> counts, seconds, and the mean IoU of annotated boxes with the extents of their masks"""
    with tempfile.TemporaryDirectory() as root:
        pictures = Path(root) / "COCO"
        for line in path.read_text().splitlines():
            picture = pictures / json.loads(line)["image_path"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.touch()
        (Path(root) / path.name).write_bytes(path.read_bytes())
        start = time.time()
        records = read_records(root, ["groundingsuite"], ["eval"])
        parsed = time.time()
        masks = [load_masks(record, record["size"])[0] for record in records]
        decoded = time.time()
    assert all(mask.shape == record["size"] and mask.any() for mask, record in zip(masks, records))
    ious = [box_iou(record["box"], extent(mask)) for mask, record in zip(masks, records)]
    return {"records": len(records), "pictures": len({record["image"] for record in records}),
            "classes": Counter(record["class"] for record in records),
            "seconds to read": round(parsed - start, 2),
            "seconds to decode": round(decoded - parsed, 2),
            "mean IoU of box and mask extent": round(float(np.mean(ious)), 3)}


def write_toy_sam(folder):
    """--sam of the toy checkpoint: SAM 2-Large's configuration with a small trunk, no weights."""
    config = OmegaConf.load(Path(sam2.__path__[0]) / "configs/sam2/sam2_hiera_l.yaml")
    config.model.image_encoder.trunk.update(
        embed_dim=16, num_heads=1, stages=[1, 2, 3, 1], global_att_blocks=[4],
        window_spec=[8, 4, 16, 8], window_pos_embed_bkg_spatial_size=[7, 7])
    config.model.image_encoder.neck.backbone_channel_list = [128, 64, 32, 16]
    folder.mkdir()
    OmegaConf.save(config, folder / "config.yaml")


def load_toy(folder):
    """The toy checkpoint through the converter -> Lens. It has no tokenizer, so it gets the tiny
    stand-in's, which nothing here asks for a word."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_toy_sam(place / "toy_sam")
        convert(folder, place / "run", str(place / "toy_sam"))
        for path in (ROOT / "tests/tiny/mllm").iterdir():
            if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
                shutil.copy(path, place / "run/mllm")
        settings = {**read_run(place / "run"), "precision": "fp32"}  # SAM's encoder follows it
        lens, _ = build_lens(SharedArgs(**settings), place / "run")
    return lens.eval()


def toy_batch(folder, case, mllm):
    """Its one picture and prompt as Collator lays them out, and the answer."""
    ids, grid = torch.from_numpy(case["input_ids"])[0], torch.from_numpy(case["image_grid_thw"])
    length = int(case["prompt_length"])
    prompt, answer = ids[:length], ids[length:]
    pixel_values = np.load(folder / "vision.npz")["pixel_values"][:int(grid.prod())]
    small = torch.from_numpy(np.load(folder / "sam_images_u8.npz")["u8_128"][:1]).float()
    pixels = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    mean, deviation = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    batch = {"ids": [prompt], "types": [(prompt == mllm.config.image_token_id).long()],
             "grid_thw": grid, "pixel_values": torch.from_numpy(pixel_values),
             "sam_pixels": (pixels - mean[:, None, None]) / deviation[:, None, None]}
    return batch, answer


@torch.no_grad()
def check_released(folder):
    """-> largest differences to the released code's outputs, by its positions"""
    lens, case = load_toy(folder / "checkpoint"), np.load(folder / "case_single.npz")
    batch, answer = toy_batch(folder, case, lens.mllm)
    pixel_values, grid_thw = batch["pixel_values"], batch["grid_thw"]
    positions = prompt_positions(lens.mllm, batch)
    features = lens.encode_pictures(batch["sam_pixels"])
    found = {}
    for kind, tag in (("1d", "a"), ("mrope", "b")):
        packed = pack_groups(batch["ids"], context_positions(positions, kind), [[answer]], lens.M)
        out = lens(pixel_values, grid_thw, packed, features, with_log_probs=False)
        hidden = group_hidden(lens.mllm, pixel_values, grid_thw, packed, lens.queries)
        ours = {"logits": lens.mllm.lm_head(hidden), "query_hidden": out["query_states"],
                "sam_embedding": lens.connector(out["query_states"]),
                "low_res_masks": out["mask_logits"]}
        found[kind] = {}
        for name, tensor in ours.items():
            theirs = case[f"{name}_{tag}"].reshape(tensor.shape)
            found[kind][name] = float(np.abs(tensor.numpy() - theirs).max())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, help="GroundingSuite-Eval.jsonl")
    parser.add_argument("--released", type=Path,
                        help="folder of the toy checkpoint and its outputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = ROOT / "docs/real.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if args.suite:
        found["GroundingSuite-Eval"] = check_suite(args.suite)
    if args.released:
        found["released code, largest differences"] = check_released(args.released)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
