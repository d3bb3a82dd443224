"""A walk through one group of stage 2, with the real numbers of a run: docs/walk.md and walk.png.

    python tests/evidence/walk.py runs/tiny/align     # ten seconds
    python tests/evidence/walk.py runs/tiny/rl        # the same, from the model after stage 2

It loads a finished run as train_rl.py does, takes one image and its expression, and makes one
update on this group alone. Every number of the page comes from the functions that train. Nothing
is saved but the page and its figure.
"""
import argparse
import json
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tiny_runs import ROOT, markdown_table, read_lines

import pages
from align import (MAX_GRAD_NORM, SharedArgs, apply_update, make_optimizer, segmentation_loss,
                   start_processes)
from data import Collator, EvaluationRows, load_item, read_records, rescale_box
from evaluate import draw_overlay
from grpo import clipped_objective, completion_mean, kl_k3
from model import prompt_positions, read_run
from rewards import find_box, full_size_masks
from train_rl import (PRESETS, RLArgs, backward, completion_texts, draw_uniforms, generate,
                      load_models, make_micro_batches, mask_rewards, parameter_groups, refresh,
                      score)


# --- One group, as train_rl.py treats it ----------------------------------------------------------

def read_settings(folder, group_size):
    """-> the run's shared settings; those of stage 2, which are its own, or the tiny preset's if it
    is a run of stage 1; the name of its stage"""
    saved = read_run(folder)
    shared = SharedArgs(**{f.name: saved[f.name] for f in fields(SharedArgs) if f.name in saved})
    own = json.loads((Path(folder) / "settings.json").read_text())
    stage = "stage 2" if "group_size" in own else "stage 1"
    values = own if stage == "stage 2" else PRESETS.get(shared.preset, {})
    values = {f.name: values[f.name] for f in fields(RLArgs) if f.name in values}
    values |= dict(init=folder, batch=1, micro_batch=1, group_size=group_size, resume=False)
    return shared, RLArgs(**values), stage


def policy_forward(lens, micro, args):
    """The forward of train_rl.update -> its output, and SAM's prompt embeddings (N, K, D)"""
    seen = []
    hook = lens.connector.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    out = lens(micro.batch["pixel_values"], micro.batch["grid_thw"], micro.packed, micro.features,
               args.temperature)
    hook.remove()
    return out, seen[0]


def loss_terms(out, micro, args):
    """Each term of Eq. 12 by itself -> {name: float}, and L_seg of each mask"""
    mask, log_probs = micro.packed.mask, out["log_probs"].detach()
    advantages = micro.advantages.flatten()[:, None]
    objective = clipped_objective(log_probs, micro.old_log_probs, advantages, args.clip_eps)
    kl = torch.zeros(())
    if micro.ref_log_probs is not None:
        kl = completion_mean(kl_k3(log_probs, micro.ref_log_probs), mask)
    gt, weights = (micro.batch[name].repeat_interleave(args.group_size, 0)
                   for name in ("low_res_masks", "low_res_weights"))
    seg = segmentation_loss(out["mask_logits"].detach(), gt, weights)
    terms = {"objective": completion_mean(objective, mask).item(), "kl": kl.item(),
             "seg": seg.mean().item()}
    terms["policy"] = -terms["objective"] + args.beta * terms["kl"]
    terms["loss"] = terms["policy"] + args.alpha * terms["seg"]
    return terms, seg.tolist()


def take_the_walk(folder, row, group_size):
    """One step of train_rl.main on one row of val -> all that the page shows, by name"""
    torch.set_num_threads(1)
    shared, args, stage = read_settings(folder, group_size)
    _, world, device, mesh = start_processes(shared)
    lens, reference, sampler, processor = load_models(shared, args, mesh, device)
    optimizer = make_optimizer(parameter_groups(lens, args), args, device)
    refresh(sampler, lens)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    rows = EvaluationRows(read_records(shared.data, shared.datasets, ["val"]), 1000).rows
    item = load_item(*rows[row])
    batch = collate([item])
    positions = prompt_positions(lens.mllm, batch)
    uniforms = draw_uniforms(shared.seed, 0, [0], group_size, shared.max_completion)
    samples = generate(sampler, batch, positions, group_size, shared.max_completion, lens.eos,
                       lens.forbidden, uniforms, args.temperature)
    texts, = completion_texts(lens, samples, processor.tokenizer)
    micro, = make_micro_batches(lens, reference, batch, positions, samples, [texts], args)
    out, prompts = policy_forward(lens, micro, args)
    score(out, micro, args)
    terms, seg = loss_terms(out, micro, args)
    terms["backward"] = backward(out, micro, args, world)["loss"].item()
    assert abs(terms["backward"] - terms["loss"]) < 1e-5
    terms["norm"] = apply_update(lens, optimizer, 1.0, args, terms["loss"], 0)
    with torch.no_grad():
        after, _ = policy_forward(lens, micro, args)
    dist.destroy_process_group()
    boxes = [find_box(text, lens.prompt) for text in texts]
    return SimpleNamespace(
        folder=folder, stage=stage, shared=shared, args=args, item=item, batch=batch, terms=terms,
        steps=len(read_lines(Path(folder) / "metrics.jsonl")), tokenizer=processor.tokenizer,
        texts=texts, completions=samples.completions[0], finished=samples.finished[0],
        lengths=[len(ids) for ids in samples.completions[0]], M=lens.M, packed=micro.packed,
        query_states=out["query_states"].detach(), prompts=prompts,
        mask_logits=out["mask_logits"].detach(),
        masks=full_size_masks(out["mask_logits"].detach(), batch["gt_masks"][0].shape).numpy(),
        boxes=[box and rescale_box(box, batch["mllm_frames"][0], item["image"].size)
               for box in boxes],
        r_format=micro.r_format[0].tolist(), r_box=micro.r_box[0].tolist(),
        r_mask=micro.r_mask[0].tolist(), rewards=micro.reward[0].tolist(),
        sigma=micro.reward.std(correction=int(args.deviation == "sample")).item(),
        advantages=micro.advantages[0].tolist(), seg=seg,
        before=out["log_probs"].detach().sum(1).tolist(), after=after["log_probs"].sum(1).tolist(),
        r_mask_after=mask_rewards(after["mask_logits"], batch, args.iou_power)[0].tolist())


# --- The page, a function for each section --------------------------------------------------------

def table(header, *columns):
    """A Markdown table of columns, numbered by completion."""
    rows = [[n, *cells] for n, cells in enumerate(zip(*columns), 1)]
    return markdown_table(["completion", *header], rows).rstrip()


def code(*names):
    """Links to functions, given as FILE: NAME; pages.anchored finds the line numbers."""
    links = [name.split(": ") for name in names]
    return "Code: " + ", ".join(f"[`{name}`](../{file}#L0)" for file, name in links)


def write_box(box, digits=0):
    return "none" if box is None else f"({', '.join(f'{value:.{digits}f}' for value in box)})"


def fixed(values, digits=3, sign=""):
    return [f"{value:{sign}.{digits}f}" for value in values]


def about_the_run(group):
    return f"""# A walk through one group

This page follows one group of stage 2 from an image to an update, with real numbers. It is made by
`python tests/evidence/walk.py {group.folder}`. The model is the one in `{group.folder}`:
{group.stage} of the preset `{group.shared.preset}`, trained for {group.steps} steps. The MLLM and
SAM 2 are the tiny stand-ins. Every step links to the functions that do it."""


def about_the_row(group):
    item, gt_mask = group.item, group.batch["gt_masks"][0]
    width, height = item["image"].size
    return f"""## 1. One image and one expression

![The image, and the mask and the box of each completion](walk.png)

The expression is "{item["expression"]}". The image has {width} x {height} pixels. The ground-truth
box is {write_box(item["gt_box"])} in these pixels, and the ground-truth mask has
{int(gt_mask.sum())} pixels. The figure shows each completion's mask in pink and its box in yellow.

{code("data.py: load_item")}"""


def about_the_prompt(group):
    ids, types = group.batch["prompt_ids"][0], group.batch["token_types"][0]
    image_tokens, pieces = int(types.sum()), []
    for token, is_image in zip(ids.tolist(), types.tolist()):
        text = f"[{image_tokens} image tokens]" if is_image else group.tokenizer.decode([token])
        if not is_image or pieces[-1] != text:
            pieces.append(text.replace("\n", "\\n"))
    shown = textwrap.fill(" ".join(f"|{piece}|" for piece in pieces), 100,
                          break_long_words=False, break_on_hyphens=False)
    width, height = group.batch["mllm_frames"][0]
    return f"""## 2. The prompt becomes tokens

The prompt of Fig. 4 and the image are {len(ids)} tokens: P = {len(ids)}. {image_tokens} of them
stand for pieces of the image. Each piece of text between bars is one token:

```text
{shown}
```

The MLLM sees the image resized to {width:.0f} x {height:.0f}, and writes places and boxes in these
pixels.

{code("data.py: Collator")}"""


def about_the_completions(group):
    shown = ""
    for n, (text, length, ended) in enumerate(zip(group.texts, group.lengths, group.finished), 1):
        end = "ends with the end token" if ended else "was cut at the limit"
        shown += f"Completion {n}: {length} tokens, {end}.\n\n````text\n{text.strip()}\n````\n\n"
    return f"""## 3. The model samples G = {len(group.texts)} completions (Eq. 1)

The prompt is computed once. Then {len(group.texts)} completions are sampled from it together, token
by token, at temperature {group.args.temperature:g}, with at most {group.shared.max_completion}
tokens. The random numbers are drawn in advance, from (seed, step, prompt, g).

{shown}{code("train_rl.py: draw_uniforms", "train_rl.py: generate")}"""


def about_the_packed_row(group):
    P, M, packed = len(group.batch["prompt_ids"][0]), group.M, group.packed
    start, places, query_places, positions = P, [], [], []
    for length in group.lengths:
        first, end = int(packed.positions[0, 0, start]), start + length
        places.append(f"{start} to {end - 1}")
        query_places.append(f"{end} to {end + M - 1}")
        positions.append(f"{first} to {first + length + M - 1}")
        start = end + M
    N, T = packed.mask.shape
    total = " + ".join(f"({length} + {M})" for length in group.lengths)
    separate = " + ".join(f"({P} + {length} + {M})" for length in group.lengths)
    tensors = [["`ids`", f"(B, L) = {tuple(packed.ids.shape)}", "tokens; 0 at the queries"],
               ["`positions`", f"(3, B, L) = {tuple(packed.positions.shape)}",
                "time, height and width of M-RoPE"],
               ["`query_places`", f"(N, M) = {tuple(packed.query_places.shape)}",
                "where the queries are"],
               ["`targets`", f"({len(packed.targets)},)", "the tokens of all completions"],
               ["`mask`", f"(N, T) = {(N, T)}", "True where a completion has a token"],
               ["`segment_mask`",
                f"(N, 1, T + M, P + T + M) = {tuple(packed.segment_mask.shape)}",
                "what each place of a segment attends to"]]
    return f"""## 4. The group becomes one packed row

The row holds the prompt once, then the segments. A segment is a completion and its M = {M} queries:

L = {P} + {total} = {start} places.

Separate rows would need {separate} = {sum(group.lengths) + N * (P + M)} places.

{table(["places of its tokens", "places of its queries", "positions"], places, query_places,
       positions)}

Places are not positions. Qwen's positions (M-RoPE) count time, height and width, so all image
tokens together use up only as many as the image has rows or columns. Every completion starts at the
same position, the first one after the prompt. It attends to the prompt and to itself, and never to
another completion. In the table B counts prompts, N completions, and T the tokens of the longest.

{markdown_table(["tensor", "shape", "what it is"], tensors)}
{code("grpo.py: pack_groups", "grpo.py: packed_attention")}"""


def about_the_queries(group):
    best = group.advantages.index(max(group.advantages))
    flat = group.prompts.flatten(1)
    norms = flat.norm(dim=1)
    cosines = flat @ flat[best] / norms / norms[best]
    return f"""## 5. The queries read completions, and the connector makes prompts (Eqs. 2 and 3)

One forward over the row gives the query states, (N, M, C) = {tuple(group.query_states.shape)}. The
connector turns them into prompt embeddings for SAM, (N, K, D) = {tuple(group.prompts.shape)}. They
differ only because the queries have read different completions. The table compares them with those
of completion {best + 1}:

{table(["norm of its prompt embeddings", f"cosine to completion {best + 1}"],
       fixed(norms.tolist(), 1), fixed(cosines.tolist()))}

{code("model.py: group_forward", "model.py: Connector")}"""


def about_the_masks(group):
    return f"""## 6. SAM 2 draws the masks (Eq. 4)

SAM's image encoder runs once for the image. Its mask decoder runs once for each completion and
gives mask logits of the shape (N, S/4, S/4) = {tuple(group.mask_logits.shape)}. They are resized to
the image; a pixel belongs to the mask where its logit is above 0.

{table(["pixels of its mask", "IoU with the ground truth"],
       [int(mask.sum()) for mask in group.masks], fixed(group.r_mask))}

{code("model.py: SamHead", "rewards.py: full_size_masks")}"""


def about_the_rewards(group):
    lambdas = (group.args.lambda_format, group.args.lambda_box, group.args.lambda_mask)
    return f"""## 7. Three rewards for each completion (Eq. 11)

The box is read from the completion's text and rescaled from the resized image to the image. The
ground-truth box is {write_box(group.item["gt_box"])}. The weights lambda are
{", ".join(f"{v:g}" for v in lambdas)}, so the reward is the weighted sum:

{table(["box", "format", "box IoU", "mask IoU", "reward"],
       [write_box(box, 1) for box in group.boxes],
       *map(fixed, (group.r_format, group.r_box, group.r_mask, group.rewards)))}

{code("train_rl.py: text_rewards", "train_rl.py: mask_rewards", "rewards.py: unified_reward")}"""


def about_the_advantages(group):
    mean = sum(group.rewards) / len(group.rewards)
    by_hand = [f"({reward:.3f} - {mean:.3f}) / ({group.sigma:.3f} + 0.0001)"
               for reward in group.rewards]
    return f"""## 8. Advantages within the group (Eqs. 6 and 7), by hand

The mean of the rewards is {mean:.3f}. Their standard deviation, over G, is {group.sigma:.3f}.

{table(["(r - mean) / (deviation + delta)", "advantage"], by_hand, fixed(group.advantages, 3, "+"))}

A completion above the mean is made more likely, and one below it less likely.

{code("grpo.py: group_advantages")}"""


def about_the_loss(group):
    terms = group.terms
    rows = [["O_clip (Eq. 8), mean over the group", f"{terms['objective']:+.6f}",
             "the model that is trained is the one that sampled, so every ratio is 1, and this is "
             "the mean of the advantages"],
            ["KL (Eq. 9), mean over the group", f"{terms['kl']:.6f}",
             "0 before the first update: model and reference are equal"],
            ["-J = -O_clip + beta KL (Eq. 10)", f"{terms['policy']:+.6f}",
             f"beta = {group.args.beta:g}"],
            ["L_seg, mean over the group", f"{terms['seg']:.6f}", "dice plus cross-entropy"],
            ["**loss = -J + alpha L_seg (Eq. 12)**", f"**{terms['loss']:.6f}**",
             f"alpha = {group.args.alpha:g}; `backward` gives {terms['backward']:.6f}"]]
    return f"""## 9. The loss (Eqs. 8 to 10 and 12)

{table(["log-probability of all its tokens", "tokens", "advantage", "L_seg of its mask"],
       fixed(group.before, 2), group.lengths, fixed(group.advantages, 3, "+"), fixed(group.seg))}

{markdown_table(["term", "value", "why"], rows)}
The value of -J says nothing here, but its gradient is not 0: each token's log-probability is pushed
by the advantage of its completion. The norm of the whole gradient is {terms["norm"]:.3f}; it is
clipped to {MAX_GRAD_NORM:g}.

{code("grpo.py: grpo_loss", "align.py: segmentation_loss", "train_rl.py: backward")}"""


def about_the_update(group):
    ratios = (torch.tensor(group.after) - torch.tensor(group.before)).exp().tolist()
    surprises = [n for n, (advantage, ratio) in enumerate(zip(group.advantages, ratios), 1)
                 if advantage > 0 and ratio < 1]
    note = "".join(f"Completion {n} became less likely although its advantage is positive. It "
                   "shares tokens with completions that the update makes less likely. This can "
                   "happen in one update on one group.\n\n" for n in surprises)
    return f"""## 10. One update, and what it changed

AdamW makes one step with the peak rate, {group.args.lr:g} for the MLLM; a real run warms up first.
Then the same completions are read again. "Times as likely" is the probability of the whole
completion after the update, divided by that before:

{table(["advantage", "log-probability before", "after", "times as likely", "mask IoU before",
        "after"], fixed(group.advantages, 3, "+"), fixed(group.before), fixed(group.after),
       [f"{ratio:.2g}" for ratio in ratios], fixed(group.r_mask), fixed(group.r_mask_after))}

The factors are large because Adam's first step moves nearly every weight by the rate, and because
it follows a single group. The clip of Eq. 8 does not limit them: it acts only from a second update
on the same samples.

The masks change too, because L_seg trains the queries, the connector and SAM's decoder. They are
masks of the one image that the update has just seen, so this does not show that masks of other
images change in the same way.

{note}In a real run a step has {PRESETS["tiny"]["batch"]} groups of
{RLArgs.group_size} completions (tiny preset) or {RLArgs.batch} (paper), and the update follows
their mean. After the update, the sampler gets the new weights.

{code("train_rl.py: update", "align.py: apply_update", "train_rl.py: refresh")}"""


SECTIONS = (about_the_run, about_the_row, about_the_prompt, about_the_completions,
            about_the_packed_row, about_the_queries, about_the_masks, about_the_rewards,
            about_the_advantages, about_the_loss, about_the_update)


def draw(group, path):
    """The image, and beside it the mask and the box of each completion, under its advantage."""
    side, top, gap = 220, 30, 12
    height = round(side * group.item["image"].height / group.item["image"].width)
    panels = [("the image", "#000000", group.item["image"])]
    for n, (mask, box, advantage) in enumerate(zip(group.masks, group.boxes, group.advantages), 1):
        panels.append((f"completion {n}: {advantage:+.2f}",
                       "#1b7f4b" if advantage > 0 else "#b3261e",
                       draw_overlay(group.item["image"], mask, box)))
    figure = Image.new("RGB", (len(panels) * (side + gap) - gap, height + top), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    for place, (title, color, panel) in enumerate(panels):
        left = place * (side + gap)
        pen.text((left + side / 2, top / 2), title, fill=color, font=font, anchor="mm")
        figure.paste(panel.resize((side, height)), (left, top))
    figure.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run's folder, of stage 1 or stage 2")
    parser.add_argument("--row", type=int, default=69, help="row of val")
    parser.add_argument("--group-size", type=int, default=4, help="G, completions to show")
    parser.add_argument("--output", default=str(ROOT / "docs"), help="folder of walk.md, walk.png")
    args = parser.parse_args()
    group = take_the_walk(args.run.rstrip("/"), args.row, args.group_size)
    draw(group, Path(args.output) / "walk.png")
    text = "\n\n".join(section(group) for section in SECTIONS)
    (Path(args.output) / "walk.md").write_text(pages.anchored(text) + "\n")


if __name__ == "__main__":
    main()
