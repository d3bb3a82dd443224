"""The figure at the top of the README: one group as stage 2 sees it, from expression to advantages.

    python tests/evidence/group_figure.py --checkpoint runs/tiny/align   # needs matplotlib

Writes docs/lens.png in ten seconds. The model after stage 1 samples four completions for one row of
the shapes world's val, and draws a mask behind each. Rewards and advantages come from the functions
that train (Eqs. 6, 7 and 11). The row was chosen because its completions differ; --row takes
another.
"""
import argparse
import textwrap

import torch
from tiny_runs import ROOT, open_run

from data import EvaluationRows, load_item, read_records, rescale_box
from evaluate import draw_overlay
from grpo import group_advantages, pack_groups
from model import context_positions, prompt_positions
from rewards import find_box, full_size_masks, unified_reward
from train_rl import (completion_texts, draw_uniforms, generate, mask_rewards,
                      text_rewards)

G = 4


@torch.no_grad()
def one_group(lens, processor, collate, item, shared):
    """-> for each of G completions: (text, box in the image frame or None, mask (H, W), its three
    rewards, its advantage)"""
    batch = collate([item])
    positions = prompt_positions(lens.mllm, batch)
    uniforms = draw_uniforms(shared.seed, 0, [0], G, shared.max_completion)
    samples = generate(lens.mllm, batch, positions, G, shared.max_completion, lens.eos,
                       lens.forbidden, uniforms)
    texts, = completion_texts(lens, samples, processor.tokenizer)
    packed = pack_groups(batch["prompt_ids"], context_positions(positions, lens.mask_pass),
                         samples.completions, lens.M)
    features = lens.encode_images(batch["sam_pixels"])
    mask_logits = lens(batch["pixel_values"], batch["grid_thw"], packed, features,
                       with_log_probs=False)["mask_logits"]
    r_format, r_box = text_rewards([texts], samples.finished, batch, 1.0)
    rewards = torch.stack([r_format, r_box, mask_rewards(mask_logits, batch, 1.0)])  # (3, 1, G)
    advantages = group_advantages(unified_reward(*rewards))[0]
    boxes = [find_box(text) for text in texts]
    boxes = [box and rescale_box(box, batch["mllm_frames"][0], item["image"].size) for box in boxes]
    masks = full_size_masks(mask_logits, batch["gt_masks"][0].shape).numpy()
    return list(zip(texts, boxes, masks, rewards[:, 0].T.tolist(), advantages.tolist()))


def draw(item, completions, path):
    from matplotlib import pyplot
    columns, height = len(completions) + 1, 2.6 * item["image"].height / item["image"].width
    figure, axes = pyplot.subplots(2, columns, figsize=(3 * columns, height + 2.4),
                                   height_ratios=[1.6, height])
    expression = "\n".join(textwrap.wrap(f"“{item['expression']}”", 24))
    axes[0, 0].text(0.5, 0.5, expression, ha="center", va="center", fontsize=13)
    axes[1, 0].imshow(item["image"])
    axes[1, 0].set_title("image and expression", fontsize=11)
    for n, (text, box, mask, (r_format, r_box, r_mask), advantage) in enumerate(completions, 1):
        lines = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, 40)]
        axes[0, n].text(0.0, 0.5, "\n".join(lines), fontsize=7.5, family="monospace", va="center")
        axes[1, n].imshow(draw_overlay(item["image"], mask, box))
        axes[1, n].set_title(f"completion {n}", fontsize=11)
        scores = f"format {r_format:.0f} + box {r_box:.2f} + mask {r_mask:.2f}\nadvantage "
        axes[1, n].text(0.5, -0.04, scores + f"{advantage:+.2f}", fontsize=11, ha="center",
                        va="top", transform=axes[1, n].transAxes,
                        color="#1b7f4b" if advantage > 0 else "#b3261e")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="stage 1's folder")
    parser.add_argument("--row", type=int, default=56, help="row of val")
    args = parser.parse_args()
    lens, processor, collate, shared = open_run(args.checkpoint)
    rows = EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), 1000).rows
    item = load_item(*rows[args.row])
    draw(item, one_group(lens, processor, collate, item, shared), ROOT / "docs/lens.png")


if __name__ == "__main__":
    main()
