"""What could be checked against the real thing without weights or pictures: docs/real.json, by hand.

    python tests/real.py --suite GroundingSuite-Eval.jsonl     # from github.com/hustvl/GroundingSuite; ten seconds
    python tests/real.py --released FOLDER

--suite reads all records of the real annotation file (empty files stand in for the pictures) and decodes every mask.
--released takes a checkpoint that the paper's released code (28cf510) wrote at toy size with random weights, and what that
code put out for one picture and one answer: with its own 1-D positions (a) and with 3-D ones (b). Its noise between
attention kernels is 4.5e-6 in logits and 4e-5 in mask logits. The folder is not published; its README names its tensors.
"""
import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import sam2
import torch
from omegaconf import OmegaConf

from data import extent, extra, load_masks, read_records
from model import (Lens, context_module, context_positions, group_hidden, load_sam, pack_groups, prompt_positions,
                   read_run)
from rewards import box_iou


def check_suite(path):
    """-> counts, seconds, and the mean IoU of the annotated boxes with the extents of their masks"""
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
            "classes": Counter(record["class"] for record in records), "seconds to read": round(parsed - start, 2),
            "seconds to decode": round(decoded - parsed, 2), "mean IoU of box and mask extent": round(float(np.mean(ious)), 3)}


def toy_sam():
    """SAM 2-Large's configuration with the small trunk that the toy checkpoint has, without weights."""
    config = OmegaConf.load(Path(sam2.__path__[0]) / "configs/sam2/sam2_hiera_l.yaml")
    config.model.image_encoder.trunk.update(embed_dim=16, num_heads=1, stages=[1, 2, 3, 1], global_att_blocks=[4],
                                            window_spec=[8, 4, 16, 8], window_pos_embed_bkg_spatial_size=[7, 7])
    config.model.image_encoder.neck.backbone_channel_list = [128, 64, 32, 16]
    with tempfile.TemporaryDirectory() as folder:
        OmegaConf.save(config, Path(folder) / "config.yaml")
        return load_sam(folder, with_weights=False)


@torch.no_grad()
def check_released(folder):
    """-> largest differences to the released code's outputs, by its positions"""
    sam, settings = toy_sam(), read_run(folder / "checkpoint")
    mllm, context, wrong = extra("released").load_released(folder / "checkpoint", sam, torch.float32)
    assert not [name for name in wrong if not name.startswith("sam.")], wrong
    args = SimpleNamespace(**{**settings, "connector_heads": 16})
    lens = Lens(mllm, sam, args, torch.zeros(mllm.config.text_config.vocab_size, dtype=torch.bool), 0).eval()
    context_module(lens).load_state_dict(context)
    case, vision = np.load(folder / "case_single.npz"), np.load(folder / "vision.npz")
    ids, grid = torch.from_numpy(case["input_ids"])[0], torch.from_numpy(case["image_grid_thw"])
    prompt, answer = ids.split([int(case["prompt_length"]), len(ids) - int(case["prompt_length"])])
    small = torch.from_numpy(np.load(folder / "sam_images_u8.npz")["u8_128"][:1]).float()
    pixels = small.repeat_interleave(8, 2).repeat_interleave(8, 3) - torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    batch = {"ids": [prompt], "types": [(prompt == mllm.config.image_token_id).long()], "grid_thw": grid,
             "pixel_values": torch.from_numpy(vision["pixel_values"])[:int(grid.prod())],
             "sam_pixels": pixels / torch.tensor([58.395, 57.12, 57.375])[:, None, None]}
    positions, features = prompt_positions(mllm, batch), lens.encode_pictures(batch["sam_pixels"])
    found = {}
    for kind, tag in (("1d", "a"), ("mrope", "b")):
        packed = pack_groups([prompt], context_positions(positions, kind), [[answer]], lens.M)
        out = lens(batch, packed, features, with_log_probs=False)
        ours = {"logits": mllm.lm_head(group_hidden(mllm, batch, packed, lens.queries)),
                "query_hidden": out["query_states"], "sam_embedding": lens.connector(out["query_states"]),
                "low_res_masks": out["mask_logits"]}
        found[kind] = {name: float(np.abs(tensor.numpy() - case[f"{name}_{tag}"].reshape(tensor.shape)).max())
                       for name, tensor in ours.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, help="GroundingSuite-Eval.jsonl")
    parser.add_argument("--released", type=Path, help="folder of the toy checkpoint and its outputs")
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
