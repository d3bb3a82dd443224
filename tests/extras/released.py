"""Checkpoints as the paper's authors published them (hustvl/LENS, OuyBin/LENS and others on the hub), for model.build_lens."""
import json

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration)

from data import LensError

RELEASED_NAMES = {"learnable_query": "queries", "pos_embed": "position", ".attn.": ".", ".mlp.": ".",
                  "conv_1d.": "connector.squeeze.", "proj_to_sam.": "connector.to_sam."}
UNUSED_SAM = ("memory_", "maskmem_", "mask_downsample", "no_mem_pos_enc", "no_obj_", "obj_ptr_")     # SAM 2's video memory


def read_config(folder):
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise LensError(f"{folder}/config.json is damaged ({error}). Download it again.") from None


def settings(folder):
    """What config.json says of the architecture, as our settings."""
    config = read_config(folder)
    if not config.get("num_of_query"):
        raise LensError(f"{folder}/config.json has no num_of_query: this is a plain MLLM (--mllm), not a LENS")
    return {"num_queries": config["num_of_query"], "connector": "vit" if config.get("if_use_qwen_connector") else "mlp",
            "connector_heads": 16}


def load_released(folder, sam, dtype):
    """A checkpoint folder as the authors published it -> MLLM, state dict of our context module, and the names of what is
    wrong: every tensor of the files must be used or be one of UNUSED_SAM. `sam` is filled in place. Their model_type can
    say qwen2_vl for a Qwen2.5-VL, so the family is told by what its vision tower's config holds."""
    config = read_config(folder)
    vision = config["vision_config"]
    is_2_5 = "qwen2p5" in str(config.get("architectures")) or "fullatt_block_indexes" in vision or "window_size" in vision
    make, family = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration) if is_2_5 else (
        Qwen2VLConfig, Qwen2VLForConditionalGeneration)
    config["vision_config"] = {name: value for name, value in vision.items() if name != "model_type"}
    own = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    try:
        tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise LensError(f"{folder}: a safetensors file is damaged ({error}). Download it again.") from None
    part = lambda *prefixes: {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefixes)}
    mllm, report = family.from_pretrained(None, config=make(**own), state_dict=part("model.", "visual.", "lm_head."),
                                          dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = [str(name) for problem in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[problem]]
    filled = fill(sam, {name.removeprefix("sam."): tensor for name, tensor in part("sam.").items()})
    wrong += [f"sam.{name}" for name in filled if not name.startswith(UNUSED_SAM)]
    context = {}
    for name in list(tensors):
        ours = name
        for theirs, name_here in RELEASED_NAMES.items():
            ours = ours.replace(theirs, name_here)
        if ours != name or ours.startswith("connector."):
            context[ours] = tensors.pop(name).squeeze(0) if name == "learnable_query" else tensors.pop(name)
    return mllm, context, [*wrong, *tensors]


def fill(module, tensors):
    """Load what fits. -> the names of what is missing, unknown or of another shape."""
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    module.load_state_dict(fitting, strict=False)
    return sorted((own.keys() | tensors.keys()) - fitting.keys())


def fill_context(folder, module, context, wrong):
    """Load the context module; LensError for whatever is wrong with the folder, the MLLM and SAM included."""
    if wrong := wrong + fill(module, context):
        raise LensError(f"{folder}: not the LENS that its config.json and --sam describe; wrong or missing: "
                        f"{', '.join(wrong[:8])}. Download it again, or give the --sam it has.")
