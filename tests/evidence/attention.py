"""What do the context queries read? Their attention over image, expression, reasoning and box.

    python tests/evidence/attention.py --checkpoint runs/tiny/rl    # half a minute; matplotlib

For 100 rows of the shapes world's val: the greedy completion, the M queries behind it, and one
forward that keeps the attention weights (transformers' eager attention; a group of one completion
is a plain causal row). A token's share is the mean over rows, queries and heads.

Writes docs/evidence/attention.json and docs/attention.png. The figure shows four rows: the image,
and where in it the queries of each layer look.
"""
import json
import sys
import textwrap

import numpy as np
import torch
from PIL import Image
from tiny_runs import ROOT, open_run, write_json

from data import EvaluationRows, load_item, read_records, select
from grpo import pack_groups
from model import embed, prompt_positions
from train_rl import generate

ROWS, DRAWN = 100, (3, 21, 45, 80)
KINDS = ["image", "system prompt and expression", "reasoning", "answer block around the box", "box",
         "other queries"]


def token_kinds(token_types, completion, tokenizer, M):
    """The kind of every token of [prompt][completion][queries], as an index into KINDS (L,)"""
    kinds, in_answer, so_far = [], False, ""
    for text in (tokenizer.decode([token]) for token in completion):
        so_far += text
        in_answer |= so_far.rstrip().endswith("</think>")
        _, key, behind_key = so_far.rpartition("bbox_2d")
        _, bracket, numbers = behind_key.partition("[")
        in_box = key and bracket and "]" not in numbers and text.strip().isdigit()
        kinds.append(4 if in_box else 3 if in_answer else 2)
    prompt = torch.where(token_types == 1, 0, 1)
    return torch.cat([prompt, torch.tensor(kinds), torch.full((M,), 5)])


@torch.no_grad()
def query_attention(lens, batch, positions, completion):
    """-> (layers, M, L): the queries' attention weights, mean over heads"""
    packed = pack_groups(batch["prompt_ids"], positions, [[completion]], lens.M)
    places = packed.query_places[0]
    inputs = embed(lens.mllm, packed.ids, batch["pixel_values"], batch["grid_thw"])
    embeds = inputs["inputs_embeds"][0].index_copy(0, places, lens.queries)[None]
    out = lens.mllm.model.language_model(inputs_embeds=embeds, position_ids=packed.positions,
                                         use_cache=False, output_attentions=True)
    return torch.stack([layer[0].mean(0)[places] for layer in out.attentions])


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
        prompt, completion = select(batch, [b]), completions[b][0]
        weights = query_attention(lens, prompt, positions[b:b + 1], completion)
        kinds = token_kinds(batch["token_types"][b], completion.tolist(), processor.tokenizer,
                            lens.M)
        by_kind = [weights[..., kinds == kind].sum(-1).mean(-1) for kind in range(len(KINDS))]
        shares.append(torch.stack(by_kind, -1))
        if b in DRAWN:
            grid = (prompt["grid_thw"][0, 1:] // 2).tolist()
            drawn.append((load_item(*rows[b]), weights[..., kinds == 0].mean(1).view(-1, *grid)))
    shares = torch.stack(shares).mean(0)                                     # (layers, kinds)
    table = dict(zip(KINDS, shares.T.tolist()))
    write_json("attention", {"rows": ROWS, "share by layer": table})
    draw(drawn, shares, ROOT / "docs/attention.png")
    print(json.dumps(table, indent=1))


def draw(drawn, shares, path):
    from matplotlib import pyplot
    layers = len(shares)
    maps_width, bars_width = 2 * (layers + 1), 6                             # in inches
    size = maps_width + bars_width, 2.3 * len(drawn)
    figure, axes = pyplot.subplots(len(drawn), layers + 1, figsize=size, squeeze=False)
    edge = maps_width / (maps_width + bars_width)
    figure.subplots_adjust(left=0.01, right=edge, top=0.94, bottom=0.02, hspace=0.25)
    for row, (item, maps) in zip(axes, drawn):
        row[0].imshow(item["image"])
        row[0].set_title("\n".join(textwrap.wrap(item["expression"], 26)), fontsize=9)
        for n, (axis, attention) in enumerate(zip(row[1:], maps), 1):
            grey = (255 * attention / attention.max()).byte().numpy()
            axis.imshow(np.array(item["image"].convert("L")), cmap="gray", alpha=0.5)
            axis.imshow(np.array(Image.fromarray(grey).resize(item["image"].size)), cmap="magma",
                        alpha=0.7)
            axis.set_title(f"layer {n}", fontsize=9)
        for axis in row:
            axis.axis("off")
    bars, left = figure.add_axes([edge + 0.09, 0.15, 0.89 - edge, 0.6]), np.zeros(layers)
    for kind, name in enumerate(KINDS):
        bars.barh(range(layers), shares[:, kind], left=left, label=name)
        left += shares[:, kind].numpy()
    bars.set(yticks=range(layers), yticklabels=[f"layer {n + 1}" for n in range(layers)],
             xlabel="share of the queries' attention")
    bars.invert_yaxis()
    bars.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    figure.savefig(path, dpi=72)


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--checkpoint") + 1])
