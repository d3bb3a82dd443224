"""How large the real models are: LENS at full size, part by part. By hand:

    python tests/parameters.py > docs/parameters.md

Nothing is downloaded and no weight takes memory. Of each MLLM's published config.json stands here
what decides a shape. tests/test_released.py compares the totals with the sizes of the published
checkpoints.
"""
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from align import SharedArgs, set_trainable
from model import Connector, Lens, load_sam

QWEN2_VISION = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14)
QWEN2_5_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                      patch_size=14)
# name: its family, its language model, whether lm_head is tied, its vision tower
MLLMS = {
    "Qwen/Qwen2-VL-2B-Instruct": (
        "qwen2_vl",
        dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
             num_attention_heads=12, num_key_value_heads=2, vocab_size=151936),
        True, {**QWEN2_VISION, "hidden_size": 1536}),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
             num_attention_heads=16, num_key_value_heads=2, vocab_size=151936),
        True, {**QWEN2_5_VISION, "out_hidden_size": 2048}),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
             num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
        False, {**QWEN2_5_VISION, "out_hidden_size": 3584})}
TITLES = {"LENS-2B": "Qwen/Qwen2-VL-2B-Instruct", "LENS-3B": "Qwen/Qwen2.5-VL-3B-Instruct",
          "With Qwen2.5-VL-7B (not in the paper)": "Qwen/Qwen2.5-VL-7B-Instruct"}


def build_mllm(name):
    family, text, tied, vision = MLLMS[name]
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision,
                                  tie_word_embeddings=tied)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@contextmanager
def sam_on_meta():
    """Where SAM 2 can be built without memory. Its trunk reads numbers out of a linspace, which
    meta tensors do not hold; and where there is a GPU its attention sends tables there, which meta
    tensors refuse, so it must see none."""
    with (torch.device("meta"),
          mock.patch("torch.linspace", partial(torch.linspace, device="cpu")),
          mock.patch("torch.cuda.is_available", return_value=False)):
        yield


def build_sam(path="sam2_hiera_large.pt"):
    """SAM 2 with its video memory."""
    with sam_on_meta():
        return load_sam(path, with_weights=False)


def build_lens(name):
    mllm, sam = build_mllm(name), build_sam()
    with torch.device("meta"):
        forbidden = torch.zeros(mllm.lm_head.out_features, dtype=torch.bool)
        return Lens(mllm, sam, SharedArgs(), forbidden, eos=0)


def count(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def parts(lens):
    """-> {part: module}; their parameters are all of the model's, each once."""
    # a tied head counts once
    language = torch.nn.ModuleList([lens.mllm.model.language_model, lens.mllm.lm_head])
    return {"MLLM, vision tower": lens.mllm.model.visual,
            "MLLM, language model": language,
            "context queries": torch.nn.ParameterList([lens.queries]),
            "connector": lens.connector,
            "SAM 2, image encoder": lens.image_encoder,
            "SAM 2, prompt encoder and mask decoder": lens.sam}


def table(lens):
    """Lines: a row per part, a column per stage."""
    columns = {"parameters": {part: count(module) for part, module in parts(lens).items()}}
    for stage, heading in ("align", "trained in stage 1"), ("rl", "trained in stage 2"):
        set_trainable(lens, stage)
        columns[heading] = {part: count(module, trained=True)
                            for part, module in parts(lens).items()}
    lines = [f"| {' | '.join(['part', *columns])} |", "|---|" + "---:|" * len(columns)]
    for part in parts(lens):
        cells = [f"{column[part]:,}" for column in columns.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    totals = [sum(column.values()) for column in columns.values()]
    assert totals[0] == count(lens), "a part is forgotten or counted twice"
    assert totals[2] == count(lens, trained=True)
    cells = [f"**{total:,}**" for total in totals]
    return [*lines, f"| **all** | {' | '.join(cells)} |"]


def section(title, name):
    lens = build_lens(name)
    (M, C), D = lens.queries.shape, lens.sam.sam_prompt_encoder.embed_dim
    with torch.device("meta"):
        more = count(Connector(C, M, D, prompt_tokens="one")) - count(lens.connector)
    return (f"\n## {title}\n\n{name}, all of its parameters: {count(lens.mllm):,}.\n\n"
            + "\n".join(table(lens))
            + f"\n\n`--prompt-tokens one`, the released code's, adds {more:,} to the connector.\n")


def document():
    head = ("# Parameters\n\nWritten by `python tests/parameters.py > docs/parameters.md`. SAM 2 "
            "is SAM2-Large without its video memory; M = 64 queries.\n")
    return head + "".join(section(title, name) for title, name in TITLES.items())


if __name__ == "__main__":
    print(document(), end="")
