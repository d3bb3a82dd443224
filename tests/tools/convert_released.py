"""Turn a checkpoint that the authors published (hustvl/LENS) into a finished run of this code.

    hf download OuyBin/LENS --local-dir pretrained/lens      # LENS_ReasonSeg, LENS_ReasonSeg_FT
    python tests/tools/convert_released.py pretrained/lens runs/lens
    torchrun --nproc_per_node=8 evaluate.py --checkpoint runs/lens --splits all --ignore background

LENS_ReasonSeg_CoT reasons before it answers, so add `--prompt released-cot` for it. `--sam` names
the SAM 2 that a checkpoint was built on. Its weights need not be there: the checkpoint holds its
own. OUT becomes a folder like one that train_rl.py writes, with its SAM 2 in it:

    mllm/                  the MLLM and its processor, as save_pretrained writes them
    context.safetensors    context queries and connector
    sam.safetensors        SAM's prompt encoder and mask decoder
    sam/                   config.yaml and model.pt: the whole SAM 2, image encoder included
    lens.json              the settings; the released code's where they differ from the paper's

Every tensor of the checkpoint is used, or belongs to SAM 2's video memory, which no LENS needs. If
a tensor is missing, unknown, damaged or of another shape, an error names it and nothing is written.
"""
import argparse
import json
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import sam2
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration,
                          Qwen2VLConfig, Qwen2VLForConditionalGeneration)

from align import PROFILES, SharedArgs, run
from data import LensError
from model import SAM_CONFIGS, Lens, context_module, forbidden_tokens, load_sam

# Parts of their tensors' names -> parts of ours, for all that is neither the MLLM nor SAM
OUR_NAMES = {"learnable_query": "queries", "pos_embed": "position", ".attn.": ".", ".mlp.": ".",
             "conv_1d.": "connector.squeeze.", "proj_to_sam.": "connector.to_sam."}
# SAM 2's memory of a video: a checkpoint may hold it or not
VIDEO_MEMORY = ("memory_", "maskmem_", "mask_downsample", "no_mem_pos_enc", "no_obj_", "obj_ptr_")
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
                   "processor_config.json")


def convert(folder, out, sam_path, prompt="released"):
    """Write the run folder OUT from the checkpoint FOLDER, under another name that is changed at
    the end. So OUT is complete or not there. -> whether FOLDER held a processor"""
    if out.exists():
        raise LensError(f"{out} exists already. Name another folder, or remove it.")
    lens, sam, shared, processor = read_checkpoint(folder, sam_path, prompt)
    shared.mllm, shared.sam = str(out / "mllm"), str(out / "sam")
    building = out.with_name(out.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)                      # of a call that was killed
    (building / "sam").mkdir(parents=True)
    shutil.copyfile(sam_config(sam_path), building / "sam/config.yaml")
    torch.save({"model": sam.state_dict()}, building / "sam/model.pt")
    save_file(context_module(lens).state_dict(), building / "context.safetensors")
    save_file(lens.sam.state_dict(), building / "sam.safetensors")
    lens.mllm.save_pretrained(building / "mllm")
    if (folder / "generation_config.json").exists():
        shutil.copyfile(folder / "generation_config.json", building / "mllm/generation_config.json")
    if processor:
        processor.save_pretrained(building / "mllm")
    (building / "lens.json").write_text(json.dumps(asdict(shared), indent=2))
    building.rename(out)
    return processor is not None


def read_checkpoint(folder, sam_path, prompt):
    """-> Lens, its SAM 2, its settings, its processor or None"""
    config = read_config(folder)
    shared, processor = settings(config, prompt), read_processor(folder)
    sam, tensors = load_sam(sam_path, with_weights=False), read_tensors(folder)
    mllm, wrong = build_mllm(config, take(tensors, "model.", "visual.", "lm_head."))
    sam_tensors = take(tensors, "sam.")
    wrong += fill_sam(sam, {name.removeprefix("sam."): tensor
                            for name, tensor in sam_tensors.items()})
    forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)     # not saved
    if processor:                                            # an error if it has too many tokens
        forbidden = forbidden_tokens(processor.tokenizer, len(forbidden), 0, prompt)
    lens = Lens(mllm, sam, shared, forbidden, eos=0)
    wrong += fill_context(context_module(lens), tensors)
    if wrong:
        raise LensError(f"{folder}: not the LENS that its config.json and --sam describe; wrong or "
                        f"missing: {', '.join(wrong[:8])}. Download it again, or give the --sam it "
                        f"was built on.")
    return lens, sam, shared, processor


def settings(config, prompt):
    """The settings with which this checkpoint is what it was for its authors."""
    released = {field.name: PROFILES["released"][field.name] for field in fields(SharedArgs)
                if field.name in PROFILES["released"]}
    connector = "vit" if config.get("if_use_qwen_connector") else "mlp"
    return SharedArgs(**{**released, "profile": "released", "prompt": prompt,
                         "num_queries": config["num_of_query"], "connector": connector})


# --- The three parts of a LENS; each returns the names of what is wrong ---------------------------

def build_mllm(config, tensors):
    """-> the MLLM in the precision in which it was saved, names

    The model_type of a Qwen2.5-VL can say qwen2_vl here. So the name of the architecture decides,
    or what the config of the vision tower holds."""
    vision = dict(config["vision_config"])
    vision.pop("model_type", None)
    if ("qwen2p5" in str(config.get("architectures")) or "fullatt_block_indexes" in vision
            or "window_size" in vision):
        make_config, family = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    else:
        make_config, family = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    theirs_alone = ("model_type", "architectures", "vision_config", "num_of_query",
                    "if_use_qwen_connector")
    own = {name: value for name, value in config.items() if name not in theirs_alone}
    dtype = max((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize,
                default=torch.float32)
    mllm, report = family.from_pretrained(
        None, config=make_config(**own, vision_config=vision), state_dict=tensors, dtype=dtype,
        output_loading_info=True, ignore_mismatched_sizes=True)
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return mllm, [str(name) for problem in problems for name in report[problem]]


def fill_sam(sam, tensors):
    """Load SAM 2. Its video memory becomes zeros if the checkpoint holds none."""
    wrong = fill(sam, tensors)
    for name, tensor in sam.state_dict().items():
        if name in wrong and name.startswith(VIDEO_MEMORY):
            tensor.zero_()
    return [f"sam.{name}" for name in wrong if not name.startswith(VIDEO_MEMORY)]


def fill_context(module, tensors):
    """Load the context queries and the connector."""
    ours = {}
    for name, tensor in tensors.items():
        if name == "learnable_query":
            tensor = tensor.squeeze(0)                                       # (1, M, C) -> (M, C)
        for their_part, our_part in OUR_NAMES.items():
            name = name.replace(their_part, our_part)
        ours[name] = tensor
    return fill(module, ours)


def fill(module, tensors):
    """Load the tensors that fit. -> the names that are missing, unknown or of another shape"""
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items()
               if name in own and own[name].shape == tensor.shape}
    module.load_state_dict(fitting, strict=False)
    return sorted((own.keys() | tensors.keys()) - fitting.keys())


# --- Files ----------------------------------------------------------------------------------------

def read_config(folder):
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise LensError(f"{path} is missing: this is no folder of a published checkpoint") from None
    except ValueError as error:
        raise LensError(f"{path} is damaged ({error}). Download it again.") from None
    if not config.get("num_of_query") or "vision_config" not in config:
        raise LensError(f"{path} has no num_of_query: this is a plain MLLM (--mllm), not a LENS")
    return config


def read_tensors(folder):
    """-> {name: tensor} of all its safetensors files"""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise LensError(f"{file} is damaged ({error}). Download it again.") from None
    return tensors


def take(tensors, *prefixes):
    """Move the tensors whose names begin with a prefix out of `tensors`."""
    names = [name for name in tensors if name.startswith(prefixes)]
    return {name: tensors.pop(name) for name in names}


def read_processor(folder):
    """-> the processor, or None if the folder holds none"""
    if not any((folder / name).exists() for name in PROCESSOR_FILES):
        return None
    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise LensError(f"{folder}: its processor could not be loaded. Download it again. "
                        f"({str(error).splitlines()[0]})") from None


def sam_config(path):
    """The yaml from which load_sam builds SAM 2."""
    path = Path(path)
    if path.is_dir():
        return path / "config.yaml"
    return Path(sam2.__path__[0]) / SAM_CONFIGS[path.name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the checkpoint as it was downloaded")
    parser.add_argument("out", type=Path, help="the run folder to write")
    parser.add_argument("--sam", default=SharedArgs.sam,
                        help="the SAM 2 it was built on, as --sam of the scripts; without weights")
    parser.add_argument("--prompt", choices=["released", "released-cot"], default="released",
                        help="released-cot: the checkpoint that reasons (LENS_ReasonSeg_CoT)")
    args = parser.parse_args()
    has_processor = convert(args.folder, args.out, args.sam, args.prompt)
    print(f"{args.out} is written")
    if not has_processor:
        print(f"{args.folder} holds no tokenizer and no processor. Copy those of the MLLM it was "
              f"trained from into {args.out / 'mllm'}.")


if __name__ == "__main__":
    run(main)
