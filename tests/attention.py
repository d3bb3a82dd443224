"""What do the context queries read? Their attention over picture, question, reasoning and box.

    python tests/attention.py --checkpoint runs/tiny/rl       # half a minute; needs matplotlib

Writes docs/attention.json and, as a small picture, docs/attention.png. For 100 rows of the shapes
world's val: the model's greedy answer, the M queries behind it, one forward with the attention
weights kept (Hugging Face's eager attention; a group of one is a plain causal row). A token's share
is the mean over rows, queries and heads. Four rows are drawn: the picture, and where in it the
queries of each layer look.
"""
import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

from data import EvaluationRows, load_item, read_records, select
from model import embed, generate, pack_groups, prompt_positions
from picture import open_run

ROWS, DRAWN = 100, (3, 21, 45, 80)
KINDS = ["picture", "system prompt and question", "reasoning", "answer around the box", "box",
         "other queries"]


def kinds_of(batch, b, completion, tokenizer, M):
    """The kind of every token of [prompt][completion][queries], as an index into KINDS (L,)."""
    kinds, answered, so_far = [], False, ""
    for text in (tokenizer.decode([i]) for i in completion):
        so_far += text
        answered |= so_far.rstrip().endswith("</think>")
        _, named, after_name = so_far.rpartition("bbox_2d")
        _, opened, numbers = after_name.partition("[")
        of_box = named and opened and "]" not in numbers and text.strip().isdigit()
        kinds.append(4 if of_box else 3 if answered else 2)
    prompt = torch.where(batch["types"][b] == 1, 0, 1)
    return torch.cat([prompt, torch.tensor(kinds), torch.full((M,), 5)])


@torch.no_grad()
def attentions(lens, batch, positions, completion):
    """-> (layers, M, L): the queries' attention, mean over heads"""
    packed = pack_groups(batch["ids"], positions, [[completion]], lens.M)
    inputs = embed(lens.mllm, packed.ids, batch["pixel_values"], batch["grid_thw"])
    flat = inputs["inputs_embeds"][0].index_copy(0, packed.queries.flatten(), lens.queries)
    out = lens.mllm.model.language_model(inputs_embeds=flat[None], position_ids=packed.positions,
                                         use_cache=False, output_attentions=True)
    return torch.stack([layer[0].mean(0)[packed.queries[0]] for layer in out.attentions])


def main(folder):
    lens, processor, collate, shared = open_run(folder)
    rows = EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), ROWS).rows
    batch = collate([load_item(*row) for row in rows])
    positions = prompt_positions(lens.mllm, batch)
    completions = generate(lens.mllm, batch, positions, 1, shared.max_completion, lens.eos,
                           lens.forbidden).completions
    lens.mllm.set_attn_implementation({"text_config": "eager"})
    shares, drawn = [], []
    for b in range(ROWS):
        one = select(batch, [b])
        weights = attentions(lens, one, positions[b:b + 1], completions[b][0])
        kinds = kinds_of(batch, b, completions[b][0].tolist(), processor.tokenizer, lens.M)
        by_kind = [weights[..., kinds == k].sum(-1).mean(-1) for k in range(len(KINDS))]
        shares.append(torch.stack(by_kind, -1))
        if b in DRAWN:
            merged = (one["grid_thw"][0, 1:] // 2).tolist()
            drawn.append((load_item(*rows[b]), weights[..., kinds == 0].mean(1).view(-1, *merged)))
    shares = torch.stack(shares).mean(0)                                     # (layers, kinds)
    table = {KINDS[k]: shares[:, k].tolist() for k in range(len(KINDS))}
    found = json.dumps({"rows": ROWS, "share by layer": table}, indent=1)
    (ROOT / "docs/attention.json").write_text(found + "\n")
    draw(drawn, shares, ROOT / "docs/attention.png")
    print(json.dumps(table, indent=1))


def draw(drawn, shares, path):
    from matplotlib import pyplot
    layers = len(shares)
    left_part, right_part = 2 * (layers + 1), 6           # widths in inches: maps, bars
    size = left_part + right_part, 2.3 * len(drawn)
    figure, axes = pyplot.subplots(len(drawn), layers + 1, figsize=size, squeeze=False)
    edge = left_part / (left_part + right_part)
    figure.subplots_adjust(left=0.01, right=edge, top=0.94, bottom=0.02, hspace=0.25)
    for row, (item, maps) in zip(axes, drawn):
        row[0].imshow(item["image"])
        row[0].set_title("\n".join(textwrap.wrap(item["text"], 26)), fontsize=9)
        for n, (axis, attention) in enumerate(zip(row[1:], maps)):
            grey = (255 * attention / attention.max()).byte().numpy()
            grown = Image.fromarray(grey).resize(item["image"].size)
            axis.imshow(np.array(item["image"].convert("L")), cmap="gray", alpha=0.5)
            axis.imshow(np.array(grown), cmap="magma", alpha=0.7)
            axis.set_title(f"layer {n + 1}", fontsize=9)
        for axis in row:
            axis.axis("off")
    bars, left = figure.add_axes([edge + 0.09, 0.15, 0.89 - edge, 0.6]), np.zeros(layers)
    for k, name in enumerate(KINDS):
        bars.barh(range(layers), shares[:, k], left=left, label=name)
        left += shares[:, k].numpy()
    bars.set(yticks=range(layers), yticklabels=[f"layer {n + 1}" for n in range(layers)],
             xlabel="share of the queries' attention")
    bars.invert_yaxis()
    bars.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    figure.savefig(path, dpi=72)


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--checkpoint") + 1])
