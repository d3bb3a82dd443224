"""A walk through one group of stage 2, with the real numbers of a run: docs/walk.md. By hand:

    python tests/walk.py runs/tiny/align     # ten seconds; also docs/walk.png
    python tests/walk.py runs/tiny/rl        # the same, from the model after stage 2

It loads a finished run as train_rl.py does, takes one picture and sentence, and makes one update on
this group alone. Every number of the page comes from the functions that train. Nothing is saved but
the page and its picture.
"""
import argparse
import json
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from align import PRESETS as STAGE_1
from align import SharedArgs, apply_update, make_optimizer, start_processes
from data import Collator, EvaluationRows, load_item, read_records, rescale_box
from evaluate import draw_overlay
from grpo import clipped_objective, completion_mean, kl_k3, segmentation_loss
from model import draw_uniforms, generate, prompt_positions, read_run
from rewards import find_box, full_size_masks
from train_rl import (PRESETS, RLArgs, backward_pass, load_models, make_groups, mask_rewards,
                      parameter_groups, refresh, score)


def code(*files_and_texts):
    """Links to the lines that hold a text: file, text, file, text, ... It fails where there is no
    such line, or more than one."""
    links = []
    for file, text in zip(files_and_texts[::2], files_and_texts[1::2]):
        lines = (ROOT / file).read_text().splitlines()
        found = [number for number, line in enumerate(lines, 1) if text in line]
        assert len(found) == 1, (file, text, found)
        links.append(f"[`{text}`](../{file}#L{found[0]})")
    return ", ".join(links)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def box_of(values, digits=0):
    return "none" if values is None else f"({', '.join(f'{v:.{digits}f}' for v in values)})"


def open_settings(folder, group_size):
    """-> the run's shared settings, and those of stage 2: its own, or its preset's after stage 1"""
    saved = read_run(folder)
    shared = SharedArgs(**{f.name: saved[f.name] for f in fields(SharedArgs) if f.name in saved})
    shared.device = "cpu"
    own = json.loads((Path(folder) / "settings.json").read_text())
    values = own if "group_size" in own else PRESETS.get(shared.preset, {})
    values = {f.name: values[f.name] for f in fields(RLArgs) if f.name in values}
    values.update(init=folder, batch=1, micro_batch=1, group_size=group_size, resume=False,
                  export=False)
    return shared, RLArgs(**values), own


# --- The page, step by step: each function gives one section --------------------------------------

def about_the_run(folder, own):
    stage = "stage 2" if "group_size" in own else "stage 1"
    steps = len((Path(folder) / "metrics.jsonl").read_text().splitlines())
    usual = PRESETS if "group_size" in own else STAGE_1
    usual = usual.get(own["preset"], {}).get("steps")
    short = f" (the preset's full run has {usual})" if usual and usual != steps else ""
    return f"""# A walk through one group

This page follows one group of stage 2 from a picture to an update, with real numbers. It is made by
`python tests/walk.py {folder}`. The model is the one in `{folder}`: {stage} of the preset
`{own["preset"]}`, trained for {steps} steps{short}. The language model and SAM 2 are the tiny
stand-ins. Every step names the line of code that does it."""


def about_the_question(item, truth):
    return f"""## 1. One picture and one sentence

![The picture, and the mask behind each answer](walk.png)

The sentence is "{item["text"]}". The true box is {box_of(item["box"])} in pixels of the picture,
and the true mask has {int(truth.sum())} of {truth.numel()} pixels.

Code: {code("data.py", "def load_item")}"""


def about_the_prompt(ids, types, tokenizer, frame):
    pieces, pictures = [], int(types.sum())
    for token, kind in zip(ids.tolist(), types.tolist()):
        text = f"[{pictures} picture tokens]" if kind else tokenizer.decode([token])
        if not kind or pieces[-1] != text:
            pieces.append(text.replace("\n", "\\n"))
    shown = textwrap.fill(" ".join(f"|{piece}|" for piece in pieces), 100,
                          break_long_words=False, break_on_hyphens=False)
    return f"""## 2. The prompt becomes tokens

The prompt of Fig. 4 and the picture are {len(ids)} tokens: P = {len(ids)}. {pictures} of them stand
for pieces of the picture. Each piece of text between bars is one token:

```text
{shown}
```

The model speaks of boxes in a frame of {frame[0]:.0f} x {frame[1]:.0f}.

Code: {code("data.py", "encoded = self.processor(")}"""


def about_the_answers(texts, lengths, finished, shared, args):
    shown = []
    for n, (text, length, ended) in enumerate(zip(texts, lengths, finished), 1):
        end = "ends with the end token" if ended else "was cut at the limit"
        shown.append(f"Answer {n}: {length} tokens, {end}.\n\n````text\n{text.strip()}\n````")
    return f"""## 3. The model samples G = {len(texts)} answers (Eq. 1)

The prompt is computed once. Then {len(texts)} answers are sampled from it together, token by
token, at temperature {args.temperature:g}, with at most {shared.max_completion} tokens. The random
numbers are drawn before sampling, from (seed, step, prompt, g).

{chr(10).join(part + chr(10) for part in shown)}
Code: {code("train_rl.py", "uniforms = draw_uniforms(",
            "train_rl.py", "return positions, generate(sampler, batch, positions,")}"""


def about_the_row(packed, lengths, P, M):
    L, start, rows = packed.ids.shape[1], P, []
    for n, length in enumerate(lengths, 1):
        first = int(packed.positions[0, 0, start])
        last = start + length + M
        rows.append([n, f"{start} to {start + length - 1}", f"{start + length} to {last - 1}",
                     f"{first} to {first + length + M - 1}"])
        start = last
    N, T = packed.mask.shape
    total = " + ".join(f"({length} + {M})" for length in lengths)
    separate = " + ".join(f"({P} + {length} + {M})" for length in lengths)
    return f"""## 4. The group becomes one packed row

The row holds the prompt once, then each answer with its M = {M} queries:

L = {P} + {total} = {L} places.

Separate rows would need {separate} = {sum(lengths) + N * (P + M)} places.

{table(["answer", "places of its tokens", "places of its queries", "positions"], rows)}

Every answer starts at the same position, directly behind the prompt. It sees the prompt and itself,
and never another answer.

{table(["tensor", "shape", "what it is"],
       [["`ids`", f"(B, L) = {tuple(packed.ids.shape)}", "tokens; 0 at the queries"],
        ["`positions`", f"(3, B, L) = {tuple(packed.positions.shape)}",
         "time, height and width of M-RoPE"],
        ["`queries`", f"(N, M) = {tuple(packed.queries.shape)}", "where the queries stand"],
        ["`targets`", f"({len(packed.targets)},)", "the tokens of all answers"],
        ["`mask`", f"(N, T) = {(N, T)}", "True where an answer has a token"],
        ["`group.mask`", f"(N, 1, T + M, P + T + M) = {tuple(packed.group.mask.shape)}",
         "what each place of an answer sees"]])}

Code: {code("train_rl.py", "return pack_groups(part[",
            "model.py", "segment_mask = torch.cat(")}"""


def about_the_queries(out, prompts, best):
    N, M, C = out["query_states"].shape
    flat = torch.nn.functional.normalize(prompts.flatten(1), dim=1)
    rows = [[n, f"{norm:.1f}", f"{same:.3f}"] for n, (norm, same) in enumerate(
        zip(prompts.flatten(1).norm(dim=1).tolist(), (flat @ flat[best]).tolist()), 1)]
    return f"""## 5. The queries read the answers, and the connector makes prompts (Eqs. 2 and 3)

One forward pass over the row gives the states of the queries, (N, M, C) =
{(N, M, C)}. The connector turns them into prompt embeddings for SAM, (N, K, D) =
{tuple(prompts.shape)}. The {N} rows differ only because the queries have read different answers.
The table compares them with those of answer {best + 1}:

{table(["answer", "norm of its prompt embeddings", f"cosine to answer {best + 1}"], rows)}

Code: {code("model.py", "states = hidden[packed.queries]",
            "model.py", "prompts = self.connector(")}"""


def about_the_masks(out, masks, r_mask):
    rows = [[n, int(mask.sum()), f"{iou:.3f}"] for n, (mask, iou) in
            enumerate(zip(masks, r_mask), 1)]
    return f"""## 6. SAM 2 draws the masks (Eq. 4)

SAM's image encoder runs once for the picture. Its mask decoder runs once for each answer and gives
logits of the shape (N, S/4, S/4) = {tuple(out["mask_logits"].shape)}. They are resized to the
picture; a pixel belongs to the mask where its logit is above 0.

{table(["answer", "pixels of its mask", "IoU with the true mask"], rows)}

Code: {code("model.py", "logits = decoder(image_embeddings=",
            "rewards.py", "resized = F.interpolate(")}"""


def about_the_rewards(boxes, item, r_format, r_box, scores, args, sigma):
    rewards, advantages = scores.reward[0].tolist(), scores.advantages[0].tolist()
    parts = list(zip(boxes, r_format, r_box, scores.r_mask[0].tolist(), rewards))
    rows = [[n, box_of(box, 1), *(f"{value:.3f}" for value in values)]
            for n, (box, *values) in enumerate(parts, 1)]
    mean = sum(rewards) / len(rewards)
    by_hand = [[n, f"({reward:.3f} - {mean:.3f}) / ({sigma:.3f} + 0.0001)", f"{advantage:+.3f}"]
               for n, (reward, advantage) in enumerate(zip(rewards, advantages), 1)]
    weights = ", ".join(f"{v:g}" for v in (args.lambda_format, args.lambda_box, args.lambda_mask))
    return f"""## 7. Three rewards for each answer (Eq. 11)

The box is read from the answer's text and translated into pixels of the picture. The true box is
{box_of(item["box"])}. The weights lambda are {weights}, so the reward is the weighted sum:

{table(["answer", "box", "format", "box IoU", "mask IoU", "reward"], rows)}

Code: {code("train_rl.py", "r_format, r_box = text_rewards(",
            "train_rl.py", "reward = unified_reward(")}

## 8. Advantages within the group (Eqs. 6 and 7), by hand

The mean of the rewards is {mean:.3f}. Their standard deviation, over G, is {sigma:.3f}.

{table(["answer", "(r - mean) / (deviation + delta)", "advantage"], by_hand)}

An answer above the mean is made more likely, and an answer below it less likely.

Code: {code("train_rl.py", "advantages = group_advantages(")}"""


def about_the_loss(terms, log_probs, per_answer, lengths, advantages, args):
    rows = [[n, f"{log_p:.2f}", length, f"{advantage:+.3f}", f"{seg:.3f}"] for
            n, (log_p, length, advantage, seg) in
            enumerate(zip(log_probs, lengths, advantages, per_answer), 1)]
    return f"""## 9. The loss (Eqs. 8 to 10 and 12)

{table(["answer", "log-probability of all its tokens", "tokens", "advantage", "L_seg of its mask"],
       rows)}

{table(["term", "value", "why"], [
    ["O_clip (Eq. 8), mean over the group", f"{terms['objective']:+.6f}",
     "the model that is trained is the one that sampled, so every ratio is 1 and this is the mean "
     "of the advantages"],
    ["KL (Eq. 9), mean over the group", f"{terms['kl']:.6f}",
     "0 before the first update: model and reference are equal"],
    ["-J = -O_clip + beta KL (Eq. 10)", f"{terms['policy']:+.6f}", f"beta = {args.beta:g}"],
    ["L_seg, mean over the group", f"{terms['seg']:.6f}", "dice plus cross-entropy"],
    ["**loss = -J + alpha L_seg (Eq. 12)**", f"**{terms['loss']:.6f}**",
     f"alpha = {args.alpha:g}; backward_pass gives {terms['reported']:.6f}"]])}

The value of -J says nothing here, but its gradient is not 0: each token's log-probability is pushed
by the advantage of its answer. The norm of the whole gradient is {terms["norm"]:.3f}; it is clipped
to {args.max_grad_norm:g}.

Code: {code("train_rl.py", "policy_loss, stats = grpo_loss(",
            "train_rl.py", "loss = policy_loss + args.alpha * loss_seg")}"""


def shared_start(first, second):
    """How many tokens two answers have in common before they differ."""
    length = min(len(first), len(second))
    differ = (first[:length] != second[:length]).nonzero()
    return int(differ[0, 0]) if len(differ) else length


def about_the_update(before, after, r_mask, after_mask, advantages, completions, args):
    best, worst = advantages.index(max(advantages)), advantages.index(min(advantages))
    rows, notes = [], ""
    for n, (old, new, mask, new_mask, advantage) in enumerate(
            zip(before, after, r_mask, after_mask, advantages)):
        name = {best: f"{n + 1} (best)", worst: f"{n + 1} (worst)"}.get(n, n + 1)
        factor = torch.tensor(new - old).exp().item()
        if advantage > 0 and new < old:
            common = shared_start(completions[n], completions[worst])
            notes += (f"Answer {n + 1} became less likely although its advantage is positive. Its "
                      f"first {common} tokens are also those of answer {worst + 1}, which the "
                      f"update makes less likely. This can happen in one update on one group.\n\n")
        rows.append([name, f"{advantage:+.3f}", f"{old:.3f}", f"{new:.3f}", f"{factor:.3f}",
                     f"{mask:.3f}", f"{new_mask:.3f}"])
    return f"""## 10. One update, and what it changed

AdamW makes one step, with rate {args.lr:g} for the language model. Then the same answers are
looked at again. "times as likely" is the probability of the whole answer after the update, divided
by that before:

{table(["answer", "advantage", "log-probability before", "after", "times as likely",
        "mask IoU before", "after"], rows)}

The masks change too, because L_seg trains the queries, the connector and SAM's decoder. They are
masks of the one picture that the update has just seen, so this is no sign that masks of other
pictures change in the same way.

{notes}In a real run a step has {PRESETS["tiny"]["batch"]} such groups (tiny preset) or
{RLArgs.batch} (paper), and the update follows their mean. After the update, the copy that samples
gets the new weights.

Code: {code("train_rl.py", "norm = apply_update(lens,",
            "align.py", "optimizer.step()",
            "train_rl.py", "def refresh(sampler, lens)")}"""


# --- The walk -------------------------------------------------------------------------------------

def draw(item, masks, boxes, advantages, path):
    """The picture, and beside it the mask and box of each answer, under its advantage"""
    side, top, gap = 220, 30, 12
    panels = [("the picture", item["image"], "#000000")]
    for n, (mask, box, advantage) in enumerate(zip(masks, boxes, advantages), 1):
        color = "#1b7f4b" if advantage > 0 else "#b3261e"
        panels.append((f"answer {n}: {advantage:+.2f}", draw_overlay(item["image"], mask, box),
                       color))
    whole = Image.new("RGB", (len(panels) * (side + gap) - gap, side + top), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(18)
    for place, (title, panel, color) in enumerate(panels):
        left = place * (side + gap)
        pen.text((left + side / 2, top / 2), title, fill=color, font=font, anchor="mm")
        whole.paste(panel.resize((side, side)), (left, top))
    whole.save(path)


def look(lens, groups, args):
    """The policy pass of train_rl.train_on -> its output, and the prompt embeddings of SAM"""
    seen = []
    hook = lens.connector.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    out = lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
               groups.features, args.temperature)
    hook.remove()
    return out, seen[0]


def loss_terms(out, groups, scores, args):
    """Each term of Eq. 12 by itself, from grpo.py -> {name: float}, L_seg of each answer"""
    mask, log_probs = groups.packed.mask, out["log_probs"].detach()
    advantages = scores.advantages.flatten()[:, None]
    objective = clipped_objective(log_probs, scores.old_log_probs, advantages, args.clip_eps)
    terms = {"objective": completion_mean(objective, mask).item(), "kl": 0.0}
    if groups.ref_log_probs is not None:
        terms["kl"] = completion_mean(kl_k3(log_probs, groups.ref_log_probs), mask).item()
    truth, weights = (groups.batch[name].repeat_interleave(args.group_size, 0)
                      for name in ("low_masks", "low_weights"))
    seg = segmentation_loss(out["mask_logits"].detach(), truth, args.focal, weights)
    terms["policy"] = -terms["objective"] + args.beta * terms["kl"]
    terms["seg"] = seg.mean().item()
    terms["loss"] = terms["policy"] + args.alpha * terms["seg"]
    return terms, seg.tolist()


def walk(folder, row, group_size):
    """-> the sections of the page, and what its picture shows"""
    torch.set_num_threads(1)
    shared, args, own = open_settings(folder, group_size)
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
    texts = processor.tokenizer.batch_decode(samples.completions[0], skip_special_tokens=True)
    lengths = [len(ids) for ids in samples.completions[0]]
    groups, = make_groups(lens, reference, batch, positions, samples, [texts], args)
    out, prompts = look(lens, groups, args)
    scores = score(out, groups, args)
    reported = backward_pass(out, groups, scores, args, world)["loss"].item()
    terms, per_answer = loss_terms(out, groups, scores, args)
    terms |= {"reported": reported}
    assert abs(reported - terms["loss"]) < 1e-5
    terms["norm"] = apply_update(lens, optimizer, 1.0, args, reported, 0)
    with torch.no_grad():
        changed, _ = look(lens, groups, args)

    truth, size = batch["masks"][0], item["image"].size
    masks = full_size_masks(out["mask_logits"].detach(), truth.shape).numpy()
    boxes = [find_box(text, lens.prompt) for text in texts]
    boxes = [box and rescale_box(box, batch["frames"][0], size) for box in boxes]
    advantages, r_mask = scores.advantages[0].tolist(), scores.r_mask[0].tolist()
    before, after = out["log_probs"].detach().sum(1).tolist(), changed["log_probs"].sum(1).tolist()
    after_mask = mask_rewards(changed["mask_logits"], batch, args.iou_power)[0].tolist()
    sigma = scores.reward.std(correction=int(args.deviation == "sample")).item()
    sections = [
        about_the_run(folder, own),
        about_the_question(item, truth),
        about_the_prompt(batch["ids"][0], batch["types"][0], processor.tokenizer,
                         [float(side) for side in batch["frames"][0]]),
        about_the_answers(texts, lengths, samples.finished[0], shared, args),
        about_the_row(groups.packed, lengths, len(batch["ids"][0]), lens.M),
        about_the_queries(out, prompts, advantages.index(max(advantages))),
        about_the_masks(out, masks, r_mask),
        about_the_rewards(boxes, item, groups.r_format[0].tolist(), groups.r_box[0].tolist(),
                          scores, args, sigma),
        about_the_loss(terms, before, per_answer, lengths, advantages, args),
        about_the_update(before, after, r_mask, after_mask, advantages, samples.completions[0],
                         args)]
    dist.destroy_process_group()
    return sections, (item, masks, boxes, advantages)


def wrapped(text):
    """Paragraphs of plain text in lines of 110; code, tables, links and lists as they are."""
    blocks = re.split(r"(^(````?)text\n.*?^\2$)", text, flags=re.M | re.S)
    done = []
    for place, block in enumerate(blocks):
        if place % 3 == 0:
            done.append("\n\n".join(
                part if part.startswith(("|", "#", "!", "Code:")) else
                textwrap.fill(part, 110, break_on_hyphens=False, break_long_words=False)
                for part in block.split("\n\n")))
        elif place % 3 == 1:
            done.append(block)
    return "".join(done)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run's folder, of stage 1 or stage 2")
    parser.add_argument("--row", type=int, default=69, help="row of val")
    parser.add_argument("--group-size", type=int, default=4, help="G, answers to show")
    parser.add_argument("--output", default=str(ROOT / "docs"), help="folder of walk.md, walk.png")
    args = parser.parse_args()
    sections, drawn = walk(args.run.rstrip("/"), args.row, args.group_size)
    draw(*drawn, Path(args.output) / "walk.png")
    (Path(args.output) / "walk.md").write_text(wrapped("\n\n".join(sections)) + "\n")


if __name__ == "__main__":
    main()
