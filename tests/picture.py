"""The picture at the top of the README: one group as stage 2 sees it, question to advantages.

    python tests/picture.py --checkpoint runs/tiny/align     # ten seconds; needs matplotlib

Writes docs/lens.png. The stage-1 model samples four answers to one row of the shapes world's val
and segments behind each; rewards and advantages come from the functions that train (Eqs. 6, 7 and
11). The row was chosen because its answers differ; --row draws another.
"""
import argparse
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from align import SharedArgs
from data import Collator, EvaluationRows, load_item, read_records, rescale_box
from evaluate import draw_overlay
from grpo import group_advantages
from model import build_lens, draw_uniforms, generate, pack_groups, prompt_positions, read_run
from rewards import find_box, full_size_masks, unified_reward
from train_rl import mask_rewards, text_rewards

G = 4


def open_run(folder):
    """A finished run -> (lens, processor, collate, shared), on one thread"""
    torch.set_num_threads(1)
    saved = read_run(folder)
    shared = SharedArgs(**{f.name: saved[f.name] for f in fields(SharedArgs) if f.name in saved})
    lens, processor = build_lens(shared, folder)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    return lens.eval(), processor, collate, shared


@torch.no_grad()
def one_group(lens, processor, collate, item, shared):
    """-> for each of G answers: (text, box in the picture frame or None, mask (H, W), three
    rewards, advantage)"""
    batch = collate([item])
    positions = prompt_positions(lens.mllm, batch)
    uniforms = draw_uniforms(shared.seed, 0, [0], G, shared.max_completion)
    samples = generate(lens.mllm, batch, positions, G, shared.max_completion, lens.eos,
                       lens.forbidden, uniforms)
    completions, finished = samples.completions, samples.finished
    texts = processor.tokenizer.batch_decode(completions[0], skip_special_tokens=True)
    packed = pack_groups(batch["ids"], positions, completions, lens.M)
    logits = lens(batch["pixel_values"], batch["grid_thw"], packed,
                  lens.encode_pictures(batch["sam_pixels"]), with_log_probs=False)["mask_logits"]
    r_format, r_box = text_rewards([texts], finished, batch, 1.0)
    rewards = torch.stack([r_format, r_box, mask_rewards(logits, batch, 1.0)])       # (3, 1, G)
    advantages = group_advantages(unified_reward(*rewards, (1, 1, 1)))[0]
    boxes = [find_box(text) for text in texts]
    size = item["image"].size
    boxes = [box and rescale_box(box, batch["frames"][0], size) for box in boxes]
    masks = full_size_masks(logits, batch["masks"][0].shape).numpy()
    return list(zip(texts, boxes, masks, rewards[:, 0].T.tolist(), advantages.tolist()))


def draw(item, answers, path):
    from matplotlib import pyplot
    columns = len(answers) + 1
    figure, axes = pyplot.subplots(2, columns, figsize=(3 * columns, 5.4), height_ratios=[1.45, 3])
    question = "\n".join(textwrap.wrap(f"“{item['text']}”", 24))
    axes[0, 0].text(0.5, 0.5, question, ha="center", va="center", fontsize=13)
    axes[1, 0].imshow(item["image"].resize((512, 512)))
    axes[1, 0].set_title("picture and expression", fontsize=11)
    for n, (text, box, mask, (r_format, r_box, r_mask), advantage) in enumerate(answers, 1):
        words = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, 40)]
        axes[0, n].text(0.0, 0.5, "\n".join(words), fontsize=7.5, family="monospace", va="center")
        axes[1, n].imshow(draw_overlay(item["image"], mask, box))
        axes[1, n].set_title(f"answer {n}", fontsize=11)
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
    parser.add_argument("--row", type=int, default=69, help="row of val")
    args = parser.parse_args()
    lens, processor, collate, shared = open_run(args.checkpoint)
    rows = EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), 1000).rows
    item = load_item(*rows[args.row])
    draw(item, one_group(lens, processor, collate, item, shared), ROOT / "docs/lens.png")


if __name__ == "__main__":
    main()
