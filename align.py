"""Stage 1, pretraining alignment (Eq. 5): the context queries and the connector learn to prompt SAM 2.

    python align.py --preset tiny                                  # a laptop, about two minutes
    torchrun --nproc_per_node=16 align.py --output runs/align      # the paper's settings (Table A1)
    torchrun --nproc_per_node=16 align.py --output runs/align --resume

    L_align = L_seg(P_seg, M_gt)                                                                            (5)

The MLLM and SAM are frozen; only Q and the connector train. What the queries read is a finished response, and RefCOCO
holds none, so there are two ways to get one (`--context`):

    own    the frozen MLLM's own greedy answer, as at inference (Eq. 2). It never changes, so it is made once, kept in
           OUTPUT/answers.jsonl and shared by all processes.
    true   an answer block with the true box, without reasoning, as the released code forces it.

The parts of a training loop that both stages need (loss, schedule, metrics) stand here; train_rl.py imports them.
"""
import json
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import (Collator, LensError, TrainingStream, answer_text, extra, read_records, rescale_box, select, to_device,
                  training_batches, write_whole)
from model import (TINY, SharedArgs, build_lens, context_positions, export, flag, generate, load_checkpoint,
                   parse_settings, prompt_positions, read_answers, run, save_checkpoint, set_trainable, shard,
                   start_processes)
from rewards import mask_iou


@dataclass
class TrainArgs:
    """What both stages ask."""
    output: str = flag("runs/out", "folder for metrics.jsonl, checkpoints and the finished model")
    resume: bool = flag(False, "go on from OUTPUT's last checkpoint")
    export: bool = flag(False, "with --resume: write OUTPUT's last checkpoint as a finished model and stop")
    init: str = flag("", "a finished run to start from")
    batch: int = flag(128, "prompts per step, over all processes")
    micro_batch: int = flag(1, "prompts per forward and backward pass of one process")
    epochs: int = flag(25, "passes over the training objects")
    steps: int = flag(0, "steps of the whole run and its schedule; 0 follows --epochs")
    lr: float = flag(3e-5, "peak learning rate")
    warmup: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    adam_beta2: float = flag(0.999, "AdamW's beta2")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    focal: bool = flag(False, "focal loss in the place of binary cross-entropy")
    log_every: int = flag(10, "steps between printed lines")
    save_every: int = flag(100, "steps between checkpoints")
    keep: int = flag(2, "checkpoints to keep; older ones are removed")
    shard: Literal["full", "hybrid"] = flag("full", "hybrid: shard within a node, copies between nodes")
    reshard: bool = flag(True, "free a layer's gathered weights after its forward; off is faster and takes more memory")
    offload: bool = flag(False, "keep shards, gradients and optimizer in CPU memory (CUDA only)")
    log_to: Literal["", "wandb", "tensorboard"] = flag("", "also send metrics there, if that package is installed")

    def __post_init__(self):
        for name in ("batch", "micro_batch", "epochs", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise LensError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0 or not 0 < self.adam_beta2 < 1 or not self.max_grad_norm > 0:
            raise LensError("--lr and --max-grad-norm must be positive, --adam-beta2 between 0 and 1")
        if self.export and not self.resume:
            raise LensError("--export goes with --resume: it writes OUTPUT's last checkpoint as a finished model")
        if min(self.steps, self.warmup, self.weight_decay) < 0:
            raise LensError("--steps, --warmup and --weight-decay must not be negative")


@dataclass
class AlignArgs(TrainArgs):
    output: str = flag("runs/align", "folder for metrics.jsonl, checkpoints and the finished model")
    context: Literal["own", "true"] = flag("own", "the response the queries read: the MLLM's own, or the true box")


PRESETS = {"tiny": dict(TINY, output="runs/tiny/align", batch=32, micro_batch=32, steps=125, lr=2e-3, warmup=10,
                        save_every=50)}


# --- Pieces that both stages use ------------------------------------------------------------------

def segmentation_loss(logits, truth, focal=False, weights=None):
    """L_seg of Eqs. 5 and 12: dice + binary cross-entropy at weights 1 : 1 (the released code's; the paper names dice and
    focal as examples). logits (N, h, w) at the decoder's resolution S/4; truth (N, h, w) in [0, 1], area-averaged to it;
    weights (N, h, w) in [0, 1], the share of each cell that is not ignored. -> (N,), 0 where all is ignored"""
    p, weights = logits.sigmoid(), torch.ones_like(truth) if weights is None else weights
    dice = 1 - (2 * (weights * p * truth).sum((1, 2)) + 1) / ((weights * (p + truth)).sum((1, 2)) + 1)
    pixel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if focal:                                                        # Lin et al. 2017, gamma 2, alpha 0.25
        pixel = pixel * (p - truth).abs() ** 2 * (0.25 * truth + 0.75 * (1 - truth))
    return dice + (weights * pixel).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)


def learning_rate(step, total, warmup, shape):
    """Factor of the peak rate at `step`: linear warm-up, then `cosine` (stage 1) or `linear` (stage 2) to zero."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


def plan_steps(args, world, objects):
    """-> steps of the whole run. A batch must split evenly over processes, and a share over passes."""
    if args.batch % world or args.batch // world % args.micro_batch:
        fits = [b for b in range(world, args.batch + 2 * world * args.micro_batch) if b % (world * args.micro_batch) == 0]
        raise LensError(f"--batch {args.batch} does not split over {world} processes in passes of --micro-batch "
                        f"{args.micro_batch}. With these, --batch can be {', '.join(map(str, fits[-3:]))} or another "
                        f"multiple of {world * args.micro_batch}.")
    return args.steps or max(1, args.epochs * objects // args.batch)


def open_output(args, settings, rank):
    """The run's folder with settings.json. An earlier run there is never overwritten silently."""
    folder = Path(args.output)
    if (folder / "metrics.jsonl").exists() and not args.resume:
        raise LensError(f"{folder} holds a run already. Go on with it (--resume), name another --output, or remove it.")
    if args.export and not list((folder / "checkpoints").glob("step_*")):
        raise LensError(f"--export: there is no checkpoint in {folder / 'checkpoints'}")
    if rank == 0 and not args.export:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps({k: v for s in settings for k, v in asdict(s).items()}, indent=2))
    dist.barrier()
    return folder


class Metrics:
    """metrics.jsonl, one object per step, and a progress bar; only rank 0 writes. A resumed run first cuts the lines
    after the restored step, so that the file reads as if nothing had happened."""

    def __init__(self, folder, start, total, rank, log_to=""):
        self.path, self.rank, self.send = folder / "metrics.jsonl", rank, None
        if rank:
            return
        lines = self.path.read_text().splitlines()[:start] if self.path.exists() else []
        write_whole(self.path, "".join(line + "\n" for line in lines))
        self.bar = tqdm(total=total, initial=start, desc=folder.name, dynamic_ncols=True)
        if log_to:
            self.send = extra("trackers").sender(log_to, folder)

    def write(self, row, show):
        """show: names of the numbers beside the progress bar."""
        if self.rank:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.set_postfix({name: f"{row[name]:.3f}" for name in show}, refresh=False)
        self.bar.update()
        if self.send:
            self.send(row)

    def say(self, text):
        if not self.rank:
            tqdm.write(text)


def watch_signals():
    """SIGTERM and SIGUSR1, a scheduler's warnings, end the run after the step with a checkpoint. -> a list, filled then."""
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def end_of_step(folder, step, total, lens, optimizer, args, received, metrics):
    """Save when it is time, or when any process was told to stop. -> whether to stop. A collective."""
    told = torch.tensor(float(bool(received)))
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    if step % args.save_every == 0 or step == total or told:
        save_checkpoint(folder, step, lens, optimizer, args.keep)
    if told and step < total:
        metrics.say(f"stopped by a signal after step {step}, which is saved: go on with --resume")
    return bool(told) and step < total


def apply_update(lens, optimizer, factor, args, loss, step):
    """Clip, step, clear; `factor` scales each group's own peak rate. -> gradient norm before clipping.

    NaN or infinity must not reach the weights: then it stops here, and the last checkpoint stays the last good one."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    norm = torch.nn.utils.clip_grad_norm_([p for p in lens.parameters() if p.requires_grad], args.max_grad_norm)
    norm = norm.full_tensor().item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise LensError(f"step {step + 1}: the loss is {loss}, the gradient norm {norm}; stopped before the update. "
                        f"{args.output}/checkpoints holds the last good state: start anew with a lower --lr, or --resume.")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --- The response that the queries read -----------------------------------------------------------

def true_answers(batch, tokenizer, prompt):
    """The answer block with the true box, spoken in the MLLM frame, and the end token: list of B (T,)."""
    answers = []
    for box, mask, frame, text in zip(batch["boxes"], batch["masks"], batch["frames"], batch["texts"]):
        box = rescale_box(box, mask.shape[::-1], frame)
        answers.append(torch.tensor(tokenizer(answer_text(box, text, prompt=prompt)).input_ids + [tokenizer.eos_token_id]))
    return answers


class OwnAnswers:
    """The frozen MLLM's greedy answers by item key. Every process holds all; rank 0 keeps them on disk."""

    def __init__(self, path, rank):
        self.path, self.rank, self.known = path, rank, {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                key, ids = json.loads(line)
                self.known[key] = torch.tensor(ids)
            except ValueError:
                pass                                                     # a line cut by a kill: made again

    def __call__(self, lens, batch, positions, max_new):
        """-> list of B (T,), generating only what is new. A collective: every rank calls it every step."""
        new = [i for i, key in enumerate(batch["keys"]) if key not in self.known]
        made = {}
        if new:
            completions, _ = generate(lens.mllm, select(batch, new), [positions[i] for i in new], 1, max_new, lens.eos,
                                      lens.forbidden)
            made = {batch["keys"][i]: group[0].tolist() for i, group in zip(new, completions)}
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, made)
        made = {key: ids for part in everyone for key, ids in part.items()}
        self.known.update({key: torch.tensor(ids) for key, ids in made.items()})
        if self.rank == 0 and made:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(item) + "\n" for item in made.items()))
        return [self.known[key] for key in batch["keys"]]


# --- The stage ------------------------------------------------------------------------------------

def align_step(lens, batch, answers, world, args):
    """Forward and backward of one pass of B prompts; gradients add up over passes. -> loss sum, mask IoU sum (tensors)."""
    positions = context_positions(prompt_positions(lens.mllm, batch), lens.positions)
    read = read_answers(lens.mllm, batch, positions, answers)
    logits = lens(batch, read, lens.encode_pictures(batch["sam_pixels"]), with_log_probs=False)["mask_logits"]
    loss = segmentation_loss(logits, batch["low_masks"], args.focal, batch["low_weights"]).sum()
    (loss * world / args.batch).backward()               # FSDP averages over ranks, so this is the mean over the batch
    iou = mask_iou(logits > 0, batch["low_masks"] > 0.5, batch["low_weights"] < 0.5)
    return torch.stack([loss.detach(), iou.sum()])


def main():
    shared, args = parse_settings([SharedArgs, AlignArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(args.shard)
    records = read_records(shared.data, shared.datasets, ["train"])[:shared.limit or None]
    total = plan_steps(args, world, len(records))
    dtype = torch.bfloat16 if shared.precision == "bf16" else torch.float32
    folder = open_output(args, (shared, args), rank)
    lens, processor = build_lens(shared, args.init, dtype)        # frozen weights need no fp32 masters
    frozen = set_trainable(lens, "align")
    lens.train().sam.eval()                                       # SAM is frozen here; only --multimask sees the difference
    shard(lens, mesh, shared.precision, frozen, args.reshard, args.offload)
    optimizer = torch.optim.AdamW([{"params": [p for p in lens.parameters() if p.requires_grad], "peak_lr": args.lr}],
                                  lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt, shared.prompt)
    loader = training_batches(TrainingStream(records, shared.seed), collate, start, total, args.batch, rank, world,
                              shared.workers)
    own = OwnAnswers(folder / "answers.jsonl", rank)
    if args.export:
        return export(folder, lens, shared)
    metrics = Metrics(folder, start, total, rank, args.log_to)
    received, began = watch_signals(), time.time()
    for step, batch in enumerate(loader, start):
        batch = to_device(batch, device)
        if args.context == "own":
            answers = own(lens, batch, prompt_positions(lens.mllm, batch), shared.max_completion)
        else:
            answers = true_answers(batch, processor.tokenizer, shared.prompt)
        passes = [range(i, i + args.micro_batch) for i in range(0, len(answers), args.micro_batch)]
        sums = sum(align_step(lens, select(batch, part), [answers[j] for j in part], world, args) for part in passes)
        dist.all_reduce(sums)
        loss, iou = (sums / args.batch).tolist()
        factor = learning_rate(step, total, args.warmup, "cosine")
        norm = apply_update(lens, optimizer, factor, args, loss, step)
        row = {"step": step + 1, "loss": loss, "mask_iou": iou, "grad_norm": norm, "lr": args.lr * factor,
               "seconds": round(time.time() - began, 3)}
        began = time.time()
        metrics.write(row, ("loss", "mask_iou"))
        if step % args.log_every == 0:
            metrics.say(f"step {step + 1}: loss {loss:.3f}, mask IoU {iou:.3f}\n"
                        f"  {batch['texts'][0]!r} -> {processor.tokenizer.decode(answers[0], skip_special_tokens=True)!r}")
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared)
    metrics.say(f"Stage 1 is done: {folder}")


if __name__ == "__main__":
    run(main)
