"""Stage 1, alignment (Eq. 5): the context queries and the connector learn to prompt SAM 2.

    python tests/tiny/world.py runs/shapes                         # the laptop's pictures, once
    torchrun --nproc_per_node=2 align.py --preset tiny             # a laptop, about four minutes
    torchrun --nproc_per_node=16 align.py --output runs/align      # the paper's settings (Table A1)
    torchrun --nproc_per_node=16 align.py --output runs/align --resume

    L_align = L_seg(P_seg, M_gt)                                                              (5)

The MLLM and SAM are frozen; only Q and the connector train. What the queries read is a finished
response, and RefCOCO holds none, so there are two ways to get one (`--context`):

    own    the frozen MLLM's own greedy answer, as at inference (Eq. 2). It never changes, so it is
           made once, before the first step, and kept in OUTPUT/answers.*.jsonl.
    true   an answer block with the true box, without reasoning, as the released code forces it.

train_rl.py imports from here what any run needs: settings, processes, FSDP2, checkpoints, metrics.
"""
import argparse
import hashlib
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
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from data import (Collator, LensError, TrainingStream, load_batches, read_records,
                  rescale_box, select, to_device, training_batches, write_whole)
from grpo import segmentation_loss
from model import (INHERITED, FixedCache, Lens, build_lens, context_module, context_positions,
                   generate, prompt_positions, read_answers, read_run)
from rewards import answer_text, mask_iou

# --- Settings: what every script shares, what both stages ask, stage 1's own ----------------------

def flag(default, help):
    """A dataclass field with the text that --help shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def at_least_one(args, *names):
    for name in names:
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise LensError(f"--{flag} must be at least 1, not {getattr(args, name)}")


@dataclass
class SharedArgs:
    """What every script asks; a finished run keeps it as lens.json."""
    preset: Literal["", "tiny", "2b", "3b"] = flag("", "defaults for a whole set-up")
    profile: Literal["paper", "released"] = flag(
        "paper", "whose choices are the defaults where the paper and the released code differ")
    mllm: str = flag("Qwen/Qwen2.5-VL-3B-Instruct",
                     "Hugging Face id or folder of the multimodal LLM")
    sam: str = flag("weights/sam2_hiera_large.pt",
                    "SAM 2 or 2.1: a checkpoint under its official name, a hub id "
                    "(facebook/sam2.1-hiera-large) or a folder (config.yaml, model.pt)")
    num_queries: int = flag(64, "M, context queries (Table 3)")
    connector: Literal["vit", "mlp"] = flag("vit", "connector between MLLM and SAM (Table 4)")
    connector_heads: int = flag(16, "heads of the ViT connector; divides the MLLM's hidden size")
    prompt_tokens: Literal["all", "one"] = flag(
        "all", "tokens SAM is prompted with: all M, or one squeezed from them (released code)")
    prompt: Literal["paper", "released", "released-cot"] = flag(
        "paper", "Fig. 4's prompt, or the released code's without and with reasoning")
    positions: Literal["mrope", "1d"] = flag("mrope", "of the context pass; 1d: released code")
    multimask: bool = flag(False, "outside stage 2, let SAM fall back on its multi-mask "
                           "tokens where one mask is unstable (released code)")
    data: str = flag("datasets", "folder that holds the datasets, laid out as data.py says")
    datasets: list[str] = flag(["refcoco", "refcoco+", "refcocog"],
                               "datasets to read below it, mixed in training")
    max_pixels: int = flag(1_000_000, "cap on the pixels of the MLLM's picture (released code's); "
                                      "0 keeps the processor's own")
    max_prompt: int = flag(2048, "longest prompt, in tokens; a longer one is an error, never cut")
    max_completion: int = flag(768, "longest completion, in tokens")
    precision: Literal["bf16", "fp32"] = flag(
        "bf16", "compute precision of MLLM and SAM's image encoder; masters are fp32")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto takes GPUs where there are any")
    compile: Literal["auto", "on", "off"] = flag("auto", "compile the decoding step; auto: on GPUs")
    limit: int = flag(0, "use only so many training objects, or evaluation rows; 0 uses all")
    seed: int = flag(42, "the only source of randomness: data order, initial queries, samples")
    workers: int = flag(4, "processes that load pictures")

    def __post_init__(self):
        at_least_one(self, "num_queries", "connector_heads", "max_prompt", "max_completion")
        if min(self.workers, self.max_pixels, self.limit) < 0:
            raise LensError("--workers, --max-pixels and --limit must not be negative")


@dataclass
class TrainArgs:
    """What both stages ask."""
    output: str = flag("runs/out", "folder for metrics.jsonl, checkpoints and the finished model")
    resume: bool = flag(False, "go on from OUTPUT's last checkpoint as that run did; flags win")
    export: bool = flag(False, "with --resume: write the last checkpoint as a finished model")
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
    shard: Literal["full", "hybrid"] = flag("full", "hybrid: shards in a node, copies between")
    reshard: bool = flag(True, "free a layer's gathered weights after its forward; off takes more "
                               "memory and less traffic")
    offload: bool = flag(False, "keep shards, gradients and optimizer in CPU memory (CUDA only)")
    reduce_once: bool = flag(False, "reduce gradients once a step, not once a pass: 4 bytes per "
                                    "parameter more on every GPU, less traffic (tests/plan.py)")
    log_to: Literal["", "wandb", "tensorboard"] = flag(
        "", "also send metrics there, if that package is installed")

    def __post_init__(self):
        at_least_one(self, "batch", "micro_batch", "epochs", "log_every", "save_every", "keep")
        if not self.lr > 0 or not 0 < self.adam_beta2 < 1 or not self.max_grad_norm > 0:
            raise LensError("--lr and --max-grad-norm must be positive, --adam-beta2 in (0, 1)")
        if self.export and not self.resume:
            raise LensError("--export writes OUTPUT's last checkpoint: it goes with --resume")
        if min(self.steps, self.warmup, self.weight_decay) < 0:
            raise LensError("--steps, --warmup and --weight-decay must not be negative")


@dataclass
class AlignArgs(TrainArgs):
    output: str = flag("runs/align", "folder for metrics.jsonl, checkpoints and the finished model")
    context: Literal["own", "true"] = flag(
        "own", "the response the queries read: the MLLM's own, or the true box")


MODELS = {"2b": {"mllm": "Qwen/Qwen2-VL-2B-Instruct"}, "3b": {"mllm": SharedArgs.mllm}}
TINY = dict(mllm="tests/tiny/mllm", sam="tests/tiny/sam", data="runs/shapes", datasets=["shapes"],
            num_queries=8, connector_heads=4, max_completion=104, precision="fp32", workers=0)
PRESETS = {"tiny": dict(TINY, output="runs/tiny/align", batch=32, micro_batch=16, steps=400,
                        lr=1e-3, warmup=10, save_every=50, context="true")}
PROFILES = {"paper": {}, "released": dict(
    prompt="released", positions="1d", multimask=True, prompt_tokens="one", max_pixels=1_000_000,
    context="true", iou_power=2.0, deviation="sample", lambda_format=0.0)}


def parse_settings(classes, presets, description):
    """Command line -> one instance per dataclass. A flag wins over what the run to go on with, to
    evaluate or to start from remembers; that over --profile, this over --preset, this over the
    class's default. An unknown flag or a value out of range ends with one line."""
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    # the flags that change the defaults are looked at first
    deciding = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "profile", "checkpoint", "init", "output"):
        deciding.add_argument(f"--{name}")
    deciding.add_argument("--resume", nargs="?", const=True, type=string_to_bool)
    early, _ = deciding.parse_known_args()
    parser.set_defaults(**{**MODELS, **presets}.get(early.preset, {}))
    parser.set_defaults(**PROFILES.get(early.profile or "paper", {}))

    def chosen(name):
        return getattr(early, name) or parser.get_default(name)
    try:
        if chosen("checkpoint"):
            saved = read_run(chosen("checkpoint"))
            parser.set_defaults(**without(saved, "limit", "device", "compile"))
        elif early.resume:
            path = Path(chosen("output")) / "settings.json"
            remembered = json.loads(path.read_text()) if path.exists() else {}
            parser.set_defaults(**without(remembered, "resume", "export"))
        elif chosen("init") and (Path(chosen("init")) / "lens.json").exists():
            saved = read_run(chosen("init"))
            parser.set_defaults(**{name: saved[name] for name in INHERITED})
        values = vars(parser.parse_args())
        return [cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in classes]
    except LensError as error:
        parser.error(str(error))


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


def run(main):
    """A script's entry: an error meant for the user is one line, not a traceback. (What a loader's
    process sends is the text of its traceback, which ends with the error's name and message.)"""
    try:
        main()
    except LensError as error:
        message = str(error).rpartition("LensError: ")[2].strip()
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
    finally:  # loaders ignore SIGTERM: after an error Python would wait for them forever
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises at their end
        for loader in multiprocessing.active_children():
            loader.kill()
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another is still in a collective
        dist.destroy_process_group()
        time.sleep(0.1)  # gloo's threads still let go of tensors; in Python's end they would abort


# --- Processes and FSDP2 --------------------------------------------------------------------------

def choose_device(shared):
    """-> the device of this process, after --device. The tiny preset makes do with the CPU where
    there are fewer GPUs than processes; anything larger is refused there."""
    local, found = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if shared.device == "cpu" or (shared.device == "auto" and not found):
        return torch.device("cpu")
    if found >= local:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if shared.device == "auto" and shared.preset == "tiny":
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{local} processes, {found} GPUs: the tiny preset runs on the CPU", flush=True)
        return torch.device("cpu")
    fits = f"Start one process a GPU (torchrun --nproc_per_node={found}), or" if found else "Here"
    raise LensError(f"{local} processes here, but {found} GPUs. {fits} take --device cpu.")


def start_processes(shared, kind="full"):
    """-> rank, world size, device, mesh. Under torchrun N processes; without it one, through the
    same code. The mesh of kind "hybrid" is (nodes, processes of a node): shards within a node,
    copies between nodes."""
    device = choose_device(shared)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # what stays in fp32 (SAM's head) may use TF32 where the rest is bf16, and nowhere else
        torch.backends.cudnn.allow_tf32 = shared.precision == "bf16"
        torch.set_float32_matmul_precision("high" if shared.precision == "bf16" else "highest")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(hours=2)  # a rank may have long answers to write while the others wait
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=patience, **alone)
    world, of_node = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape, names = (world,), ("shards",)
    if kind == "hybrid":
        shape, names = (world // of_node, of_node), ("copies", "shards")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return dist.get_rank(), world, device, mesh


# Parts of SAM's head that one mask from given prompt embeddings never runs a gradient through
NEVER_TRAINED = ("point_embed", "not_a_point", "mask_downscaling", "iou_prediction_head",
                 "pred_obj_score_head", "hypernetworks_mlps.1", "hypernetworks_mlps.2",
                 "hypernetworks_mlps.3")


def set_trainable(lens, stage):
    """Stage 1 ("align") trains the context queries and the connector; stage 2 ("rl") everything but
    SAM's image encoder (Fig. 2). -> the frozen parameters, whole on every rank (see `shard`)."""
    lens.requires_grad_(stage == "rl")
    lens.image_encoder.requires_grad_(False)
    context_module(lens).requires_grad_(True)
    for name, parameter in lens.sam.named_parameters():
        if any(part in name for part in NEVER_TRAINED):
            parameter.requires_grad_(False)
    return [p for p in lens.parameters() if not p.requires_grad]


def shard(module, mesh, precision, replicated=(), reshard=True, offload=False):
    """FSDP2: each transformer block a unit, SAM's head a unit in fp32, the rest in the root. fp32
    masters, compute in `precision`, gradients reduced in fp32.

    module: a Lens or a Reference, on the CPU, its weights as the files have them (mapped, so that
    the processes of a machine share them). It is cast, moved and cut unit by unit: no process ever
    holds the whole. `replicated` parameters (the frozen ones) stay whole on every rank; `reshard`
    frees a unit's gathered weights between its forward and its backward; `offload` keeps shards in
    CPU memory."""
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    trains = isinstance(module, Lens)
    replicated = set(replicated)
    options = {"mesh": mesh, "ignored_params": replicated,
               "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}

    def make_unit(unit, policy, reshard):
        own = [p for p in unit.parameters() if p not in replicated and not isinstance(p, DTensor)]
        for parameter in own:
            parameter.data = parameter.data.to(torch.float32 if trains else compute)
        if own:
            fully_shard(unit, mp_policy=policy, reshard_after_forward=reshard, **options)
    units = [*module.mllm.model.visual.blocks, *module.mllm.model.language_model.layers]
    if trains:
        make_unit(module.sam, MixedPrecisionPolicy(torch.float32, torch.float32), reshard)
        units += [*module.connector.blocks]
    for unit in units:
        make_unit(unit, policy, reshard)
    for parameter in replicated:  # FSDP moves all else, buffers too
        parameter.data = parameter.data.to(mesh.device_type)
    # the root's backward follows its forward at once: it stays gathered
    make_unit(module, policy, reshard and not trains)
    if trains:  # gather and reduce around stage 1's pass too
        register_fsdp_forward_method(module, "align_forward")
    return module


def make_optimizer(groups, args, device):
    """AdamW over [{"params", "peak_lr"}], as one fused kernel where the shards lie on a GPU."""
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.adam_beta2),
                             weight_decay=args.weight_decay,
                             fused=device.type == "cuda" and not args.offload)


# --- Checkpoints for resuming, folders for use ----------------------------------------------------

# not strict: the frozen parameters are not saved
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(folder, step, lens, optimizer, keep=2):
    """For resuming: FOLDER/checkpoints/step_N holds what is trained, the optimizer and the step.
    All else (data order, samples, learning rate) is a function of the seed and the step. Written
    under another name and renamed; then all but the last `keep` go."""
    target = Path(folder) / "checkpoints" / f"step_{step:06d}"
    building = target.with_name(f"building_{step:06d}")
    if dist.get_rank() == 0:
        for leftover in target.parent.glob("building_*"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        target.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights, state = get_state_dict(lens, optimizer, options=TRAINED)
    saved = {"weights": weights, "optimizer": state, "step": torch.tensor(step)}
    dcp.save(saved, checkpoint_id=str(building))
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
        for old in sorted(target.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder, lens, optimizer):
    """Restore the latest complete checkpoint, on any number of processes; rates, betas and weight
    decay stay those of `optimizer`, which the flags have chosen. -> its step"""
    asked = [without(group, "params") for group in optimizer.param_groups]
    last = sorted((Path(folder) / "checkpoints").glob("step_*"))[-1]
    weights, state = get_state_dict(lens, optimizer, options=TRAINED)
    saved = {"weights": weights, "optimizer": state, "step": torch.tensor(0)}
    try:
        dcp.load(saved, checkpoint_id=str(last))
    except (Exception, CheckpointException) as error:                # the latter is no Exception
        reason = str(error).strip().splitlines()[-1]
        raise LensError(f"{last} does not fit this model: written with other settings, or "
                        f"damaged. Use another --output, or that run's flags ({reason})") from None
    set_state_dict(lens, optimizer, model_state_dict=saved["weights"],
                   optim_state_dict=saved["optimizer"], options=TRAINED)
    for group, settings in zip(optimizer.param_groups, asked):
        group.update(settings)
    return int(saved["step"])


def full_state(module):
    """A sharded module's state dict with whole tensors on the CPU. A collective."""
    state = module.state_dict()
    for name, tensor in state.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.detach().cpu().contiguous()
    return state


def export(folder, lens, shared, mllm=None, processor=None):
    """Write a folder for use: context.safetensors, sam.safetensors, lens.json and, where it was
    trained, mllm/ (transformers and vLLM load it unchanged) from the unsharded copy. Written beside
    and moved in, lens.json last: what has a lens.json is whole. Every rank calls this."""
    context, sam = full_state(context_module(lens)), full_state(lens.sam)
    if dist.get_rank() == 0:
        folder = Path(folder)
        building = folder / "export.tmp"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save_file(context, building / "context.safetensors")
        save_file(sam, building / "sam.safetensors")
        if mllm is not None:
            mllm.save_pretrained(building / "mllm")
            processor.save_pretrained(building / "mllm")
        (folder / "lens.json").unlink(missing_ok=True)
        for path in sorted(building.iterdir()):
            shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
        write_whole(folder / "lens.json", json.dumps(asdict(shared), indent=2))
        building.rmdir()
    dist.barrier()


# --- A run: its folder, its length, its schedule, its metrics -------------------------------------

def open_output(args, settings, rank):
    """-> the run's folder, with settings.json in it. A run that saved anything stays as it is."""
    folder = Path(args.output)
    found = list((folder / "checkpoints").glob("step_*"))
    if (found or (folder / "lens.json").exists()) and not args.resume:
        raise LensError(f"{folder} holds a run already. Go on with it (--resume), or name another "
                        f"--output, or remove it.")
    if args.resume and not found:
        raise LensError(f"--resume: no checkpoint in {folder / 'checkpoints'}. Name the --output "
                        f"of a run that saved one; without any, start again without --resume.")
    dist.barrier()  # nobody writes before all have looked
    if rank == 0 and not args.export:
        together = {name: value for part in settings for name, value in asdict(part).items()}
        write_whole(folder / "settings.json", json.dumps(together, indent=2))
    return folder


def plan_steps(args, world, objects):
    """-> steps of the whole run. A batch must split evenly over processes and passes."""
    unit = world * args.micro_batch
    if args.batch % unit:
        above = args.batch // unit * unit + unit
        fits = f"{above - unit}, {above}" if above > unit else above
        raise LensError(f"--batch {args.batch} does not split over {world} processes in passes of "
                        f"--micro-batch {args.micro_batch}: take {fits} or another multiple of "
                        f"{unit}.")
    return args.steps or max(1, args.epochs * objects // args.batch)


def learning_rate(step, total, warmup, shape):
    """Factor of the peak rate: linear warm-up, then `cosine` (stage 1) or `linear` to zero."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


class Metrics:
    """metrics.jsonl, one object per step, and a progress bar; only rank 0 writes. A resumed run
    cuts the lines after the restored step: the file reads as if nothing had happened."""

    def __init__(self, folder, start, total, rank, log_to=""):
        self.path, self.rank = folder / "metrics.jsonl", rank
        lines = self.path.read_text().splitlines()[:start] if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]  # of the steps before `start`
        dist.barrier()  # all have read what rank 0 now cuts
        if rank:
            return
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.bar = tqdm(total=total, initial=start, desc=folder.name, dynamic_ncols=True)
        self.tracker = open_tracker(log_to, folder)

    def write(self, row, show):
        """show: names of the numbers beside the progress bar."""
        if self.rank:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.set_postfix({name: f"{row[name]:.3f}" for name in show}, refresh=False)
        self.bar.update()
        if self.tracker:
            self.tracker(row)

    def say(self, text):
        if not self.rank:
            tqdm.write(text)


def open_tracker(name, folder):
    """--log-to -> a function that takes one row of metrics, or None."""
    try:
        if name == "wandb":
            import wandb
            wandb.init(dir=str(folder), name=folder.name)
            return lambda row: wandb.log(row, step=row["step"])
        if name != "tensorboard":
            return None
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LensError(f"--log-to {name}: it is not installed (pip install {name})") from None
    writer = SummaryWriter(folder)

    def write(row):
        for key, value in row.items():
            writer.add_scalar(key, value, row["step"])
    return write


def watch_signals():
    """SIGTERM and SIGUSR1, a scheduler's warnings, end the run after the step with a checkpoint.
    -> a list, filled then.
    SIGTERM may go to torchrun, which passes it on, waits 30 seconds and kills: enough for a short
    step. SIGUSR1 waits as long as the step takes, but goes to the training processes alone (pkill
    -USR1 -P TORCHRUN_PID), since torchrun itself dies of it. Loaders' processes ignore both."""
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def end_of_step(folder, step, total, lens, optimizer, args, received, metrics):
    """Save when it is time, or when any process was told to stop. -> whether to stop. A
    collective."""
    told = torch.tensor(float(bool(received)))
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    if step % args.save_every == 0 or step == total or told:
        save_checkpoint(folder, step, lens, optimizer, args.keep)
    if told and step < total:
        metrics.say(f"stopped by a signal after step {step}, which is saved: go on with --resume")
    return bool(told) and step < total


# --- The update -----------------------------------------------------------------------------------

def apply_update(lens, optimizer, factor, args, loss, step):
    """Clip, step, clear; `factor` scales each group's own peak rate. -> gradient norm before
    clipping.

    NaN or infinity must not reach the weights: then it stops here, and the last checkpoint stays
    the last good one."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    trained = [p for p in lens.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm).full_tensor().item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise LensError(f"step {step + 1}: the loss is {loss}, the gradient norm {norm}; "
                        f"stopped before the update. {args.output}/checkpoints holds the last "
                        "good state, if one was saved: --resume with a lower --lr, or start anew.")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --- The response that the queries read -----------------------------------------------------------

def true_answers(batch, tokenizer, prompt):
    """The answer block with the true box, spoken in the MLLM frame, and the end token: list of B
    (T,)."""
    answers = []
    for box, mask, frame, text in zip(batch["boxes"], batch["masks"], batch["frames"],
                                      batch["texts"]):
        spoken = answer_text(rescale_box(box, mask.shape[::-1], frame), text, prompt=prompt)
        answers.append(torch.tensor(tokenizer(spoken).input_ids + [tokenizer.eos_token_id]))
    return answers


class OwnAnswers:
    """The frozen MLLM's greedy answers by item key, all made before the first step. Every process
    keeps what it makes in OUTPUT/answers.TAG.RANK.jsonl: a run that was stopped goes on from there;
    TAG names the settings that decide an answer."""

    def __init__(self, folder, shared, rank, world):
        decides = repr([shared.mllm, shared.prompt, shared.max_completion, shared.max_pixels])
        tag = hashlib.sha256(decides.encode()).hexdigest()[:8]
        self.path, self.rank, self.world = folder / f"answers.{tag}.{rank}.jsonl", rank, world
        mine = {}
        for path in sorted(folder.glob(f"answers.{tag}.*.jsonl"))[rank::world]:  # of all, a share
            for line in path.read_text().splitlines():
                try:
                    key, mine[key] = json.loads(line)
                except ValueError:
                    pass  # a line cut by a kill: made again
        self.known = self.gather(mine)

    def gather(self, mine):
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine)
        return {key: ids for part in everyone for key, ids in part.items()}

    def make(self, lens, rows, collate, shared, device):
        """rows: all that training will use, the largest prompts first, so that those of a batch are
        alike and the estimate beside the bar errs on the safe side. Each process takes every
        world-th of what is missing."""
        missing = [k for k in range(len(rows)) if rows.key(k) not in self.known]
        new = missing[self.rank::self.world]
        size = answer_batch(lens.mllm, shared, device)
        fixed = fixed_cache(lens.mllm, shared, size, device)
        batches = [new[i:i + size] for i in range(0, len(new), size)]
        loader = load_batches(rows, batches, collate, shared.workers, device)
        made = {}
        with self.path.open("a") as file, tqdm(total=len(new), desc="answers", unit="answer",
                                               disable=self.rank > 0) as bar:
            for batch in loader:
                batch = to_device(batch, device)
                answers = generate(lens.mllm, batch, prompt_positions(lens.mllm, batch), 1,
                                   shared.max_completion, lens.eos, lens.forbidden, fixed=fixed)
                for key, (ids,) in zip(batch["keys"], answers.completions):
                    made[key] = ids.tolist()
                    file.write("\n" + json.dumps([key, made[key]]))  # the last line may be cut
                file.flush()
                bar.update(len(answers.completions))
        self.known.update(self.gather(made))

    def __call__(self, batch):
        """-> list of B (T,)"""
        return [torch.tensor(self.known[key]) for key in batch["keys"]]


def fixed_cache(mllm, shared, N, device):
    """--compile -> the FixedCache that a GPU decodes N sequences in; None on a CPU, where the plain
    way is the default."""
    if device.type == "cpu" and shared.compile != "on":
        return None
    return FixedCache(mllm, N, shared.max_prompt, shared.max_completion, shared.compile != "off")


def answer_batch(mllm, shared, device):
    """Prompts to answer at once: 32 on a CPU; on a GPU what fits into half of its free memory."""
    if device.type == "cpu":
        return 32
    config = mllm.config.text_config
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = shared.max_prompt + shared.max_completion
    cache = (2 * config.num_hidden_layers * config.num_key_value_heads * d * tokens
             * mllm.lm_head.weight.element_size())
    states = 12 * config.intermediate_size * shared.max_prompt  # of the prompts' own pass
    return max(1, min(256, torch.cuda.mem_get_info()[0] // 2 // (2 * cache + states)))


# --- The stage ------------------------------------------------------------------------------------

def align_step(lens, batch, answers, world, args):
    """Forward and backward of one pass of B prompts; gradients add up over passes. -> loss sum,
    mask IoU sum (tensors)."""
    positions = context_positions(prompt_positions(lens.mllm, batch), lens.positions)
    read = read_answers(lens.mllm, batch, positions, answers)
    logits = lens.align_forward(read, lens.encode_pictures(batch["sam_pixels"]))
    loss = segmentation_loss(logits, batch["low_masks"], args.focal, batch["low_weights"]).sum()
    (loss * world / args.batch).backward()  # FSDP averages over ranks: this is the batch's mean
    iou = mask_iou(logits > 0, batch["low_masks"] > 0.5, batch["low_weights"] < 0.5)
    return torch.stack([loss.detach(), iou.sum()])


def main():
    shared, args = parse_settings([SharedArgs, AlignArgs], PRESETS, __doc__.splitlines()[0])
    rank, world, device, mesh = start_processes(shared, args.shard)
    records = read_records(shared.data, shared.datasets, ["train"])[:shared.limit or None]
    total = plan_steps(args, world, len(records))
    folder = open_output(args, (shared, args), rank)
    compute = torch.bfloat16 if shared.precision == "bf16" else torch.float32
    lens, processor = build_lens(shared, args.init, compute)  # frozen: no fp32 masters
    frozen = set_trainable(lens, "align")
    lens.train().sam.eval()  # SAM is frozen here; only --multimask sees the difference
    shard(lens, mesh, shared.precision, frozen, args.reshard, args.offload)
    trained = [p for p in lens.parameters() if p.requires_grad]
    optimizer = make_optimizer([{"params": trained, "peak_lr": args.lr}], args, device)
    start = load_checkpoint(folder, lens, optimizer) if args.resume else 0
    if args.export:
        return export(folder, lens, shared)
    collate = Collator(processor, lens.mllm.config.model_type, lens.sam_size, shared.max_prompt,
                       shared.prompt)
    stream = TrainingStream(records, shared.seed)
    loader = training_batches(stream, collate, start, total, args.batch, rank, world,
                              shared.workers, device)
    if args.context == "own":
        own = OwnAnswers(folder, shared, rank, world)
        own.make(lens, stream.rows(start * args.batch, total * args.batch), collate, shared, device)
    metrics = Metrics(folder, start, total, rank, args.log_to)
    received, began = watch_signals(), time.time()
    for step, batch in enumerate(loader, start):
        batch = to_device(batch, device)
        if args.context == "own":
            answers = own(batch)
        else:
            answers = true_answers(batch, processor.tokenizer, shared.prompt)
        sums = 0
        for i in range(0, len(answers), args.micro_batch):
            last = i + args.micro_batch == len(answers)
            lens.set_requires_gradient_sync(last or not args.reduce_once)
            part = range(i, i + args.micro_batch)
            sums = sums + align_step(lens, select(batch, part), [answers[j] for j in part], world,
                                     args)
        dist.all_reduce(sums)
        loss, iou = (sums / args.batch).tolist()
        factor = learning_rate(step, total, args.warmup, "cosine")
        norm = apply_update(lens, optimizer, factor, args, loss, step)
        row = {"step": step + 1, "loss": loss, "mask_iou": iou, "grad_norm": norm,
               "lr": args.lr * factor, "seconds": round(time.time() - began, 3)}
        began = time.time()
        metrics.write(row, ("loss", "mask_iou"))
        if step % args.log_every == 0:
            answer = processor.tokenizer.decode(answers[0], skip_special_tokens=True)
            metrics.say(f"step {step + 1}: loss {loss:.3f}, mask IoU {iou:.3f}\n"
                        f"  {batch['texts'][0]!r} -> {answer!r}")
        if end_of_step(folder, step + 1, total, lens, optimizer, args, received, metrics):
            return
    export(folder, lens, shared)
    metrics.say(f"Stage 1 is done: {folder}")


if __name__ == "__main__":
    run(main)
