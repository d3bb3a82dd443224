"""How large the real models are: LENS at full size, part by part.

    python tests/evidence/parameters.py          # writes docs/evidence/parameters.md

Nothing is downloaded, and no weight takes memory. tests/test_released.py compares the totals with
the sizes of the published checkpoints.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import plan
import torch

from align import SharedArgs
from data import write_whole
from model import Connector, set_trainable

TITLES = {"LENS-2B": "Qwen/Qwen2-VL-2B-Instruct", "LENS-3B": "Qwen/Qwen2.5-VL-3B-Instruct",
          "With Qwen2.5-VL-7B (not in the paper)": "Qwen/Qwen2.5-VL-7B-Instruct"}


def page():
    head = ("# Parameters\n\nWritten by `python tests/evidence/parameters.py`. SAM 2 is SAM2-Large "
            "without its video memory; M = 64 queries.\n")
    return head + "".join(section(title, name) for title, name in TITLES.items())


def section(title, name):
    lens = plan.build(SharedArgs(mllm=name))
    (M, C), D = lens.queries.shape, lens.sam.sam_prompt_encoder.embed_dim
    with torch.device("meta"):
        squeezed = plan.count(Connector(C, M, D, sam_tokens="one"))
    return (f"\n## {title}\n\n{name}, all of its parameters: {plan.count(lens.mllm):,}.\n\n"
            + "\n".join(table(lens)) + "\n\n`--sam-tokens one`, as in the released code, adds "
            f"{squeezed - plan.count(lens.connector):,} to the connector.\n")


def table(lens):
    """Lines: a row per part, a column per stage."""
    columns = {"parameters": [plan.count(part) for part in parts(lens).values()]}
    for stage, heading in ("align", "trained in stage 1"), ("rl", "trained in stage 2"):
        set_trainable(lens, stage)
        columns[heading] = [plan.count(part, trained=True) for part in parts(lens).values()]
    totals = [sum(column) for column in columns.values()]
    assert totals[0] == plan.count(lens), "a part is forgotten or counted twice"
    assert totals[2] == plan.count(lens, trained=True)
    lines = [f"| {' | '.join(['part', *columns])} |", "|---|" + "---:|" * len(columns)]
    for part, *counts in zip(parts(lens), *columns.values()):
        lines.append(f"| {' | '.join([part, *(f'{number:,}' for number in counts)])} |")
    return [*lines, f"| **all** | {' | '.join(f'**{total:,}**' for total in totals)} |"]


def parts(lens):
    """-> {part: module}; their parameters are all of the model's, each once."""
    # a tied lm_head counts once
    language = torch.nn.ModuleList([lens.mllm.model.language_model, lens.mllm.lm_head])
    return {"MLLM, vision tower": lens.mllm.model.visual,
            "MLLM, language model": language,
            "context queries": torch.nn.ParameterList([lens.queries]),
            "connector": lens.connector,
            "SAM 2, image encoder": lens.image_encoder,
            "SAM 2, prompt encoder and mask decoder": lens.sam}


if __name__ == "__main__":
    write_whole(ROOT / "docs/evidence/parameters.md", page())
