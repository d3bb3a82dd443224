"""Stage 1, alignment (Eq. 5): the context queries and the connector learn to prompt SAM 2.

    python tests/tiny/world.py runs/shapes                   # draw the laptop's images, once
    torchrun --nproc_per_node=2 align.py --preset tiny       # on a laptop, in minutes
    torchrun --nproc_per_node=16 align.py                    # the paper's settings (Table A1)
    torchrun --nproc_per_node=16 align.py --resume           # go on after an interruption

The MLLM and SAM 2 are frozen. Only the queries Q and the connector train, by the loss of the mask:

    L_align = L_seg(P_seg, M_gt)                                                              (5)

P_seg are the mask logits, M_gt is the ground truth. The queries must have a completion to read, but
RefCOCO holds no reasoning. So stage 1 makes one up, the forced completion: an answer block with the
ground-truth box, and no think block. The released code does the same.

The first part of this file is stage 1. The second part is what both stages share: settings,
processes, the update, metrics, checkpoints.
"""
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers.hf_argparser import HfArgumentParser

from data import (LOADER_HELP, Collator, LensError, TrainingStream, fingerprint, read_records,
                  rescale_box, select, take_evenly, to_device, training_batches, write_whole)
from model import (ARCHITECTURE, build_lens, context_positions, export, prefill, prompt_positions,
                   read_run, set_trainable, shard)
from rewards import answer_text, mask_iou


def segmentation_loss(mask_logits, gt, weights=None):
    """L_seg of Eqs. 5 and 12: dice loss + binary cross-entropy, 1 : 1 as in the released code (the
    paper says "e.g. dice, focal"). -> (N,)

    mask_logits (N, h, w): one logit for each cell of SAM's S/4 x S/4 grid. gt (N, h, w) in [0, 1]:
    the ground truth averaged over these cells. weights (N, h, w) in [0, 1]: how much of a cell is
    not ignored. A mask that is all ignored has loss 0.
    """
    weights = torch.ones_like(gt) if weights is None else weights
    p = mask_logits.sigmoid()
    overlap = (weights * p * gt).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / ((weights * (p + gt)).sum((1, 2)) + 1)  # + 1 for empty masks
    bce = F.binary_cross_entropy_with_logits(mask_logits, gt, reduction="none")
    return dice + (weights * bce).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)


def forced_completions(lens, batch, tokenizer):
    """The completions that the queries read in stage 1: for each of B prompts an answer block with
    the ground-truth box in the MLLM frame, and the end token. -> list of B (T_b,) on the CPU"""
    completions = []
    for box, mask, frame, expression in zip(batch["gt_boxes"], batch["gt_masks"],
                                            batch["mllm_frames"], batch["expressions"]):
        box = rescale_box(box, mask.shape[::-1], frame)  # image frame -> MLLM frame
        text = answer_text(box, expression, prompt=lens.prompt)
        if lens.opening:  # the prompt has opened a think block: close it, empty
            text = f"</think>\n{text}"
        completions.append(torch.tensor(tokenizer(text).input_ids + [lens.eos]))
    return completions


def align_step(lens, batch, completions, world, args):
    """Forward and backward of one micro-batch. Gradients add up over the micro-batches of a step.
    -> tensor (2,): the sums of the loss and of the mask IoU (at S/4)"""
    positions = context_positions(prompt_positions(lens.mllm, batch), lens.mask_pass)
    # nothing before the queries is trained, and the MLLM is not sharded: it may run by itself
    with torch.no_grad():
        prefilled = prefill(lens.mllm, batch, positions, completions)
    mask_logits = lens.align_forward(prefilled, lens.encode_images(batch["sam_pixels"]))
    gt, weights = batch["low_res_masks"], batch["low_res_weights"]
    loss = segmentation_loss(mask_logits, gt, weights).sum()
    # each rank has a share of the batch, and FSDP averages over ranks: this gives the batch's mean
    (loss * world / args.batch).backward()
    iou = mask_iou(mask_logits > 0, gt > 0.5, ignore=weights < 0.5)
    return torch.stack([loss.detach(), iou.sum()])


def main():
    shared, args = parse_settings([SharedArgs, TrainArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(shared, args.shard)
    folder, records, total = open_run(shared, args, rank, world)
    compute = torch.bfloat16 if shared.precision == "bf16" else torch.float32
    lens, processor = build_lens(shared, args.init, compute)
    frozen = set_trainable(lens, "align")  # the parameters that `shard` leaves whole
    lens.sam.eval()  # --mask-pass released: SAM replaces an unstable mask in eval mode only
    shard(lens, mesh, shared.precision, frozen, args.offload)
    trained = [p for p in lens.parameters() if p.requires_grad]
    optimizer = make_optimizer([{"params": trained, "peak_lr": args.lr}], args, device)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    received = watch_signals()  # the loader looks at it too, see watch_signals
    loader = training_batches(TrainingStream(records, shared.seed),
                              make_collator(shared, lens, processor), start, total, args.batch,
                              rank, world, shared.workers, device, received)
    metrics = Metrics(folder, start, total, rank)
    began = time.time()
    for step, batch in enumerate(loader, start):
        batch = to_device(batch, device)
        completions = forced_completions(lens, batch, processor.tokenizer)
        sums = 0
        for i in range(0, len(completions), args.micro_batch):
            rows = range(i, i + args.micro_batch)
            sums = sums + align_step(lens, select(batch, rows), [completions[j] for j in rows],
                                     world, args)
        dist.all_reduce(sums)
        loss, iou = (sums / args.batch).tolist()
        factor = learning_rate(step, total, args.warmup, "cosine")
        norm = apply_update(lens, optimizer, factor, args, loss, step)
        row = {"step": step + 1, "loss": loss, "mask_iou": iou, "grad_norm": norm,
               "lr": args.lr * factor, "seconds": round(time.time() - began, 3)}  # loading too
        began = time.time()
        metrics.write(row, ("loss", "mask_iou"))
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared)
    metrics.say(f"Stage 1 is done: {folder}")


# === What both stages share =======================================================================
#
# --- Settings: one dataclass field per flag; train_rl.py and evaluate.py have one more class each -

def flag(default, help):
    """A dataclass field with the text that --help shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class SharedArgs:
    """The flags of every script. A finished run keeps them as lens.json."""
    preset: Literal["", "tiny", "2b", "3b"] = flag(
        "", "tiny: defaults for a laptop; 2b, 3b: which MLLM (3b is the default)")
    profile: Literal["paper", "released"] = flag(
        "paper", "whose choices are the default where paper and released code differ")
    mllm: str = flag("Qwen/Qwen2.5-VL-3B-Instruct",
                     "Hugging Face id or folder of the multimodal LLM")
    sam: str = flag("weights/sam2_hiera_large.pt",
                    "SAM 2 or 2.1: a checkpoint under its official file name, or a folder "
                    "(config.yaml, model.pt)")
    num_queries: int = flag(64, "M, the number of context queries (Table 3)")
    connector: Literal["vit", "mlp"] = flag("vit", "kind of the connector (Table 4)")
    sam_tokens: Literal["all", "one"] = flag(
        "all", "prompt embeddings for SAM: all M, or one squeezed from them (released code)")
    prompt: Literal["paper", "released", "released-cot"] = flag(
        "paper", "prompt text: Fig. 4's, or the released code's without and with reasoning")
    mask_pass: Literal["paper", "released"] = flag(
        "paper", "how the mask is computed; released: 1-D positions, and outside stage 2 SAM may "
                 "replace an unstable mask by the best of its others")
    data: str = flag("datasets", "folder that holds the datasets (docs/data.md)")
    datasets: list[str] = flag(["refcoco", "refcoco+", "refcocog"],
                               "names of the datasets to read; training mixes them")
    max_pixels: int = flag(1_000_000, "largest image for the MLLM, in pixels (the released code's "
                                      "limit); 0 keeps the processor's own limit")
    max_prompt: int = flag(2048, "longest prompt in tokens; a longer one is an error, never cut")
    max_completion: int = flag(768, "longest completion in tokens")
    precision: Literal["bf16", "fp32"] = flag(
        "bf16", "precision in which the MLLM and SAM's image encoder compute")
    limit: int = flag(0, "use only this many training objects or evaluation rows, taken evenly; "
                         "0 uses all")
    seed: int = flag(42, "seed of everything random: data order, initial weights, samples")
    workers: int = flag(4, "processes that load images")

    def __post_init__(self):
        at_least(1, self, "num_queries", "max_prompt", "max_completion")
        at_least(0, self, "workers", "max_pixels", "limit")


@dataclass
class TrainArgs:
    """The flags of both stages, with the defaults of stage 1."""
    output: str = flag("runs/align", "folder for metrics.jsonl, checkpoints and the finished run")
    resume: bool = flag(False, "go on from the last checkpoint in OUTPUT, with the settings of "
                               "that run; flags that you give win")
    init: str = flag("", "a finished run to start from")
    batch: int = flag(128, "prompts per step, over all processes")
    micro_batch: int = flag(1, "prompts per forward and backward of one process")
    epochs: int = flag(25, "how often every training object is used")
    steps: int = flag(0, "number of steps of the whole run; 0 follows --epochs")
    lr: float = flag(3e-5, "peak learning rate")
    warmup: int = flag(0, "steps of linear warm-up")
    save_every: int = flag(100, "steps between checkpoints; the last two are kept")
    shard: Literal["full", "hybrid"] = flag(
        "full", "shard over all processes, or within each machine with copies between machines")
    offload: bool = flag(False, "keep weights, gradients and optimizer in CPU memory (GPUs only)")

    def __post_init__(self):
        at_least(1, self, "batch", "micro_batch", "epochs", "save_every")
        at_least(0, self, "steps", "warmup")
        if not self.lr > 0:
            raise LensError("--lr must be positive")


def at_least(lowest, args, *names):
    for name in names:
        if getattr(args, name) < lowest:
            raise LensError(f"--{name.replace('_', '-')} must be at least {lowest}, not "
                            f"{getattr(args, name)}")


MODELS = {"2b": {"mllm": "Qwen/Qwen2-VL-2B-Instruct"}}
TINY = dict(mllm="tests/tiny/mllm", sam="tests/tiny/sam", data="runs/shapes", datasets=["shapes"],
            num_queries=8, max_completion=104, precision="fp32", workers=0)
PRESETS = {"tiny": dict(TINY, output="runs/tiny/align", batch=32, micro_batch=16, steps=300,
                        lr=1e-3, warmup=10, save_every=50)}
PROFILES = {"paper": {}, "released": dict(
    prompt="released", mask_pass="released", sam_tokens="one",
    iou_power=2.0, deviation="sample", lambda_format=0.0)}  # these three are train_rl.py's alone


# What a run takes over from the finished run that it starts from (--init); ARCHITECTURE names
# num_queries, connector and sam_tokens
INHERITED = (*ARCHITECTURE, "profile", "mllm", "sam", "prompt", "mask_pass", "max_pixels")


def parse_settings(classes, presets, description):
    """The command line -> one instance of each dataclass.

    The strongest first: a flag, what an earlier run remembers, --profile, --preset, the default of
    the class. An unknown flag or a value out of range ends with the usage and one line.
    """
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    early = parser.parse_args()  # each parse sees the defaults set so far, the weakest first
    parser.set_defaults(**{**MODELS, **presets}.get(early.preset, {}))
    parser.set_defaults(**PROFILES[early.profile])
    try:
        parser.set_defaults(**remembered_settings(parser.parse_args()))
        values = vars(parser.parse_args())  # it may hold defaults for which there is no flag here
        return [cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in classes]
    except LensError as error:
        parser.error(str(error))


def remembered_settings(flags):
    """What the run that is evaluated, resumed or started from remembers: {name: value}."""
    if getattr(flags, "checkpoint", ""):  # evaluate.py's flag; each evaluation has its own --limit
        return without(read_run(flags.checkpoint), "limit")
    if getattr(flags, "resume", False):
        path = Path(flags.output) / "settings.json"
        return json.loads(path.read_text()) if path.exists() else {}
    init = getattr(flags, "init", "")
    if init and (Path(init) / "lens.json").exists():  # without it, build_lens refuses the folder
        saved = read_run(init)  # it lacks stage 2's flags: the profile of that run sets those
        return {**PROFILES[saved["profile"]], **{name: saved[name] for name in INHERITED}}
    return {}


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


# --- Processes ------------------------------------------------------------------------------------

def run(main):
    """Run a script's main. An error that a user can mend is one line, not a traceback."""
    try:
        main()
    except LensError as error:
        # an error in a loader process arrives with its traceback as text; the message is last
        message = str(error).rpartition("LensError: ")[2].strip()
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # one that was killed during a step
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {LOADER_HELP} ({error})")
    except OSError as error:
        # disk full, quota used up, not permitted, read-only
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    finally:  # Python would wait for the loader processes, which ignore SIGTERM
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when they end
        for loader in multiprocessing.active_children():
            loader.kill()
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another is still in a collective
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads are still releasing tensors; without this they may abort


def choose_device(shared):
    """The device of this process: a GPU each, or the CPU where there is none. The tiny preset also
    falls back to the CPU if there are fewer GPUs than processes; anything larger is refused."""
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if gpus >= local:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if gpus and shared.preset != "tiny":
        raise LensError(f"{local} processes here, but {gpus} GPUs. Start one process per GPU "
                        f"(torchrun --nproc_per_node={gpus}), or hide the GPUs with "
                        f"CUDA_VISIBLE_DEVICES= to use the CPU.")
    return torch.device("cpu")


def start_processes(shared, kind="full"):
    """Join the processes that torchrun has started. Without it there is one, which runs the same
    code. -> rank, world size, device, mesh

    The mesh of kind "hybrid" is (machines, processes of a machine): shards lie within a machine,
    copies between machines."""
    device = choose_device(shared)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # where bf16 is allowed, what stays in fp32 (SAM's head) may use TF32
        torch.backends.cudnn.allow_tf32 = shared.precision == "bf16"
        torch.set_float32_matmul_precision("high" if shared.precision == "bf16" else "highest")
    # gloo for what is on the CPU: signals, checkpoints
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape, names = (world,), ("shards",)
    if kind == "hybrid":
        shape, names = (world // local, local), ("copies", "shards")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return dist.get_rank(), world, device, mesh


def watch_signals():
    """SIGTERM and SIGUSR1, which schedulers send as a warning, end the run after its current step,
    with a checkpoint; while it waits for data, at once and without one. -> a list that is filled
    when one arrives

    SIGTERM may go to torchrun, which passes it on, waits for 30 seconds and then kills. After
    SIGUSR1 nothing kills the run, however long its step takes, but it must go to the training
    processes alone (pkill -USR1 -P TORCHRUN_PID), since torchrun itself would die from it. Loader
    processes ignore both.
    """
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda arrived, frame: received.append(arrived))
    return received


# --- The run and its update -----------------------------------------------------------------------

def open_run(shared, args, rank, world):
    """-> the run's folder, its training records, the number of its steps"""
    records = take_evenly(read_records(shared.data, shared.datasets, ["train"]), shared.limit)
    total = plan_steps(args, world, len(records))
    return open_output(shared, args, records, rank), records, total


def make_collator(shared, lens, processor):
    return Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                    shared.prompt)


def open_output(shared, args, records, rank):
    """-> the run's folder, with settings.json in it. A run that has saved something is never
    overwritten. It resumes only on the data that it began with. All machines must see the same
    folder. LensError otherwise."""
    folder = Path(args.output)
    checkpoints = list((folder / "checkpoints").glob("step_*"))
    if (checkpoints or (folder / "lens.json").exists()) and not args.resume:
        raise LensError(f"{folder} holds a run already. Go on with it (--resume), or name another "
                        f"--output, or remove it.")
    if args.resume and not checkpoints:
        raise LensError(f"--resume: no checkpoint in {folder / 'checkpoints'}. Name the --output "
                        f"of a run that saved one, or start again without --resume.")
    path, data = folder / "settings.json", fingerprint(records)
    if args.resume and path.exists() and json.loads(path.read_text())["data_fingerprint"] != data:
        raise LensError(f"{folder} was trained on other data: the training records have changed "
                        f"since. Restore them, or start a new run in another --output.")
    settings = json.dumps({**asdict(shared), **asdict(args), "data_fingerprint": data}, indent=2)
    dist.barrier()  # nobody writes before all have looked
    try:
        if rank == 0:
            write_whole(path, settings)
        dist.barrier()
        if path.read_text() != settings:  # on other storage it is missing, or an older run's
            raise OSError("it holds the settings of another run")
    except OSError as error:
        raise LensError(f"--output {folder}: this process cannot use it ({error}). It must be a "
                        f"folder that can be written, on storage that all machines see.") from None
    return folder


def plan_steps(args, world, objects):
    """-> the number of steps of the whole run. LensError if a batch does not split evenly."""
    unit = world * args.micro_batch
    if args.batch % unit:
        raise LensError(f"--batch {args.batch} does not split over {world} processes in "
                        f"micro-batches of {args.micro_batch}: take a multiple of {unit}.")
    return args.steps or max(1, args.epochs * objects // args.batch)


def make_optimizer(groups, args, device):
    """AdamW over [{"params", "peak_lr"}], without weight decay. apply_update sets each rate."""
    return torch.optim.AdamW(groups, weight_decay=0.0,
                             fused=device.type == "cuda" and not args.offload)


def learning_rate(step, total, warmup, shape):
    """The factor on the peak learning rates in `step`, counted from 0: linear warm-up, then
    "cosine" (stage 1) or "linear" down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress


MAX_GRAD_NORM = 1.0


def apply_update(lens, optimizer, factor, args, loss, step):
    """Clip the gradients, update, clear the gradients. `factor` scales the peak rate of each
    parameter group. -> the gradient norm before clipping

    NaN and infinity must not reach the weights. If the loss or the norm of `step` (counted from 0)
    is not finite, the run ends here with LensError, and its last checkpoint is still good.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    trained = [p for p in lens.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    norm = norm.full_tensor().item()  # over the shards of all ranks
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise LensError(f"step {step + 1}: the loss is {loss}, the gradient norm {norm}; stopped "
                        f"before the update. {args.output}/checkpoints holds the last good state, "
                        f"if one was saved: --resume with a lower --lr, or start anew.")
    optimizer.step()
    optimizer.zero_grad()
    return norm


class Metrics:
    """metrics.jsonl, with one object per step, and a progress bar. Only rank 0 writes. On --resume,
    the lines after the checkpoint are dropped, since those steps run again."""

    def __init__(self, folder, start, total, rank):
        self.path, self.rank = folder / "metrics.jsonl", rank
        lines = self.path.read_text().splitlines()[:start] if self.path.exists() else []
        # the steps before `start`; train_rl.py needs them on every rank
        self.rows = [json.loads(line) for line in lines]
        dist.barrier()  # all have read what rank 0 now cuts
        if rank == 0:
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self.bar = tqdm(total=total, initial=start, desc=folder.name, dynamic_ncols=True)

    def write(self, row, show):
        """row: the numbers of one step; show: names of those beside the progress bar."""
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.bar.set_postfix({name: f"{row[name]:.3f}" for name in show}, refresh=False)
            self.bar.update()

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)


def end_of_step(folder, step, total, lens, optimizer, args, received, metrics):
    """Save a checkpoint when it is time, or when a signal has reached any process. `step` counts
    the finished steps. -> whether to stop. Every rank calls this."""
    signalled = torch.tensor(len(received))
    dist.all_reduce(signalled, op=dist.ReduceOp.MAX)
    stop = bool(signalled) and step < total
    if step % args.save_every == 0 or step == total or stop:
        save_checkpoint(folder, step, lens, optimizer)
    if stop:
        metrics.say(f"stopped by a signal after step {step}, which is saved: go on with --resume")
    return stop


# --- Checkpoints, for resuming --------------------------------------------------------------------

KEEP_CHECKPOINTS = 2
# not strict, since the frozen parameters are not saved
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(folder, step, lens, optimizer):
    """FOLDER/checkpoints/step_N holds the trained weights, the optimizer and the step. Everything
    else (data order, samples, learning rate) is a function of the seed and the step. The folder is
    written under another name, then renamed; the last two are kept. Every rank calls this."""
    target = folder / "checkpoints" / f"step_{step:06d}"
    building = target.with_name(f"building_{step:06d}")
    if dist.get_rank() == 0:
        for leftover in target.parent.glob("building_*"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        target.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights, state = get_state_dict(lens, optimizer, options=TRAINED)
    saved = {"weights": weights, "optimizer": state, "step": torch.tensor(step)}
    try:
        dcp.save(saved, checkpoint_id=str(building))
    except CheckpointException as error:  # a full disk, mostly
        reason = str(error).strip().splitlines()[-1]
        raise LensError(f"{target} could not be saved; is the disk full? ({reason}) Make room, "
                        f"then --resume: the checkpoint before it is good.") from None
    if dist.get_rank() == 0:
        building.rename(target)
        for old in sorted(target.parent.glob("step_*"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder, lens, optimizer):
    """Restore the last complete checkpoint, on any number of processes. -> its step

    Loading overwrites the settings in the optimizer's groups (betas, peak_lr), so those from the
    flags are put back."""
    from_flags = [without(group, "params") for group in optimizer.param_groups]
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    weights, state = get_state_dict(lens, optimizer, options=TRAINED)
    saved = {"weights": weights, "optimizer": state, "step": torch.tensor(0)}
    try:
        dcp.load(saved, checkpoint_id=str(last))
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        reason = str(error).strip().splitlines()[-1]
        raise LensError(f"{last} does not fit this model ({reason}). If the flags are those of "
                        f"that run, it is damaged: delete this folder and resume again, from the "
                        f"checkpoint before it.") from None
    set_state_dict(lens, optimizer, model_state_dict=saved["weights"],
                   optim_state_dict=saved["optimizer"], options=TRAINED)
    for group, settings in zip(optimizer.param_groups, from_flags):
        group.update(settings)
    return int(saved["step"])


if __name__ == "__main__":
    run(main)
