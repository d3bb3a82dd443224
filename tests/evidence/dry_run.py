"""One update of stage 2 at full size, on a CPU, in minutes and 1 GB, beside the plan's formulas.

    python tests/evidence/dry_run.py --gpus 16                  # one case, printed
    python tests/evidence/dry_run.py --gpus 16 --shard hybrid   # any flag of train_rl.py
    python tests/evidence/dry_run.py --write                    # all cases; docs/evidence/dry_run.*

No number is computed. Tensors are fake (a shape and a type, no memory), and so are the processes:
there is rank 0, and its collectives return at once. Everything else is the code of train_rl.py,
from its models to its update. torch's FSDPMemTracker adds up the bytes of all live tensors, and
tests/tools/plan.py stands beside it.

What fake tensors cannot follow is replaced:
    numbers read from tensors   item() gives 1 and a condition is false: AdamW reads its step
    the image's grid            a NumPy array; what the vision tower derives from it is made before,
                                from real numbers. All its windows are taken as one, which moves the
                                same bytes (seen with 10 windows and with 1) in a tenth of the time
    SAM's image encoder         not run: its feature maps are given, in the types of a GPU's
    sampling and texts          not run: every completion has full length, rewards are given
    micro-batches               one, the last of a step in mid-run: the gradients of those before it
                                and Adam's state are there
    the device                  a CPU: attention is fused, no kernel needs room of its own, there
                                are no fragments and no NCCL
"""
import json
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]

import numpy as np
import plan
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from align import SharedArgs, apply_update, flag, make_optimizer, parse_settings, run
from data import LensError
from grpo import pack_groups
from model import checkpoint_layers, context_positions, prompt_positions, set_trainable, shard
from train_rl import (PRESETS, MicroBatch, Reference, RLArgs, backward, copy_mllm, parameter_groups,
                      score)

CASES = [(16, "full"), (16, "hybrid"), (8, "full"), (8, "hybrid")]


@dataclass
class DryRunArgs:
    gpus: int = flag(16, "GPUs to pretend")
    write: bool = flag(False, "run all cases and write docs/evidence/dry_run.json and dry_run.md")


def dry_run(shared, args, gpus, P=0, patches=0):
    """-> the case: bytes on rank 0, planned and counted. P and patches as in plan.sizes."""
    began, mode = time.time(), FakeTensorMode()
    lens = plan.build(shared)
    if lens.mllm.config.model_type != "qwen2_5_vl":
        raise LensError(f"--mllm {shared.mllm}: the dry run knows Qwen2.5-VL's vision tower only")
    z = plan.sizes(lens, shared, args, gpus, P, patches)
    grid = image_grids(z)
    batch, packed = make_rows(lens, z, grid)
    vision = tree_map_only(torch.Tensor, mode.from_tensor, vision_tables(lens, grid))
    with fake_processes(gpus, args.shard) as mesh, fake_numbers(vision), mode:
        frozen, sampler, reference, optimizer = build_training(shared, args, lens, mesh)
        images = make_images(z, z.prompts)
        micro_batches = [make_micro_batch(z, batch, fake_copy(mode, packed))
                         for _ in range(z.prompts // z.B)]
        earlier_steps(lens, optimizer)
        tracker = Tracker(lens, optimizer, layers=lens.mllm.model.language_model.layers)
        held = {"frozen parts": frozen, "sampling copy": [*sampler.parameters()],
                "reference": [*reference.parameters()],
                "images": [*images.values(), *tensors_in(micro_batches)]}
        for tensors in held.values():
            tracker.track_inputs(tuple(tensors))
        peaks = last_micro_batch(lens, optimizer, tracker, micro_batches[0], args, gpus)
        after = by_name(tracker.get_tracker_snapshot("current")[torch.device("cpu")])
        held = {name: bytes_of(tensors) for name, tensors in held.items()}
    assert sum(held.values()) == after["Inputs"], "a tensor is forgotten or counted twice"
    planned = plan.memory(z, args)
    for parts in planned.values():
        parts.pop("cache", None)                     # sampling is not run
    return {"gpus": gpus, "shard": args.shard, "seconds": round(time.time() - began),
            "sizes": asdict(z), "held": held, "peaks": peaks, "after": after, "planned": planned,
            "planned moments": plan.training_moments(z, args),
            "planned kept": plan.kept(z, args.gradient_checkpointing)}


def build_training(shared, args, lens, mesh):
    """What train_rl.load_models does, on fake tensors. -> frozen parameters, sampler, reference,
    optimizer"""
    materialize(lens)
    frozen = set_trainable(lens, "rl")
    sampler = copy_mllm(lens.train().mllm, shared.precision)
    reference = Reference(copy_mllm(lens.mllm, shared.precision), lens.forbidden)
    if args.gradient_checkpointing:
        checkpoint_layers(lens.mllm)
    shard(lens, mesh, shared.precision, frozen)
    shard(reference, mesh, shared.precision)
    optimizer = make_optimizer(parameter_groups(lens, args), args, torch.device("cuda"))
    return frozen, sampler, reference, optimizer


def earlier_steps(lens, optimizer):
    """Leave what an update and the micro-batches behind it leave: Adam's state, and gradients."""
    for parameter in lens.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def last_micro_batch(lens, optimizer, tracker, micro, args, world):
    """Forward, rewards, loss, backward and update, as train_rl.update does them. -> {moment: bytes
    by category at its peak}"""
    with tracker:
        out = lens(micro.batch["pixel_values"], micro.batch["grid_thw"], micro.packed,
                   micro.features, args.temperature)
        score(out, micro, args)
        tracker.moment = "logits"
        backward(out, micro, args, world)
    del out
    micro.old_log_probs = micro.r_mask = micro.reward = micro.advantages = None
    tracker.moment = "update"
    with tracker:
        apply_update(lens, optimizer, 1.0, args, 0.0, 0)
    return {moment: by_name(peak) for moment, peak in tracker.peaks.items()}


class Tracker(FSDPMemTracker):
    """FSDPMemTracker that keeps the peaks of the moments that plan.py names, instead of those of
    every unit, which takes most of its time."""

    def __init__(self, *args, layers):
        super().__init__(*args)
        self.layers, self.moment, self.peaks = set(layers), "forward", {}

    def _update_peak_stats(self, peak_state):
        for now in self._curr_mem_snap.values():
            if now["Total"] > self.peaks.get(self.moment, {"Total": 0})["Total"]:
                self.peaks[self.moment] = dict(now)

    def _fsdp_param_group_pre_backward(self, unit, original):
        return self.entering(unit in self.layers, "layer",
                             super()._fsdp_param_group_pre_backward(unit, original))

    def _fsdp_param_group_post_backward(self, unit, original):
        return self.entering(unit is self._root_mod, "root",
                             super()._fsdp_param_group_post_backward(unit, original))

    def entering(self, begins, moment, action):
        def marked(*args, **kwargs):
            self.moment = moment if begins else self.moment
            return action(*args, **kwargs)
        return marked


def by_name(peak):
    """FSDPMemTracker's categories by their names."""
    return {getattr(kind, "value", kind): size for kind, size in peak.items()}


def bytes_of(tensors):
    """Of the local shards, each storage once."""
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


# --- The prompts, their completions, their images -------------------------------------------------

def image_grids(z):
    """-> (B, 3) grids of z.patches patches, each as near to a square as possible"""
    tokens, step = z.patches // z.merge, int(z.merge ** 0.5)
    side = max(k for k in range(1, int(tokens ** 0.5) + 1) if tokens % k == 0)
    return np.array([[1, step * side, step * (tokens // side)]] * z.B)


def make_rows(lens, z, grid):
    """B prompts of z.P tokens with G completions of z.T, packed: real tensors, since a layout is
    made of numbers. -> the part of a batch that is text, PackedGroups"""
    ids = torch.zeros(z.P, dtype=torch.long)
    ids[1:1 + z.patches // z.merge] = lens.mllm.config.image_token_id
    types = (ids == lens.mllm.config.image_token_id).long()
    batch = {"prompt_ids": [ids] * z.B, "token_types": [types] * z.B}
    positions = prompt_positions(lens.mllm, {**batch, "grid_thw": torch.from_numpy(grid)})
    completions = [[torch.zeros(z.T, dtype=torch.long)] * z.G] * z.B
    packed = pack_groups(batch["prompt_ids"], context_positions(positions, lens.mask_pass),
                         completions, z.M)
    return {**batch, "grid_thw": grid}, packed


def make_images(z, n):
    return {"pixel_values": torch.empty(n * z.patches, z.patch),
            "sam_pixels": torch.empty(n, 3, z.S, z.S),
            "low_res_masks": torch.empty(n, z.S // 4, z.S // 4),
            "low_res_weights": torch.empty(n, z.S // 4, z.S // 4)}


def make_micro_batch(z, batch, packed):
    """As train_rl.make_micro_batches leaves it."""
    D = z.sam_map // (z.S // 16) ** 2
    size = z.S * 15 // 32, z.S * 5 // 8              # at a full-size SAM, COCO's 480 x 640
    masks = {name: [torch.empty(size, dtype=torch.bool) for _ in range(z.B)]
             for name in ("gt_masks", "ignore_masks")}
    # in bf16 as autocast gives them, but the last one is a sum that sam2 makes in fp32
    features = [torch.empty(z.B, D, z.S // 4, z.S // 4, dtype=torch.bfloat16),
                torch.empty(z.B, D, z.S // 8, z.S // 8, dtype=torch.bfloat16),
                torch.empty(z.B, D, z.S // 16, z.S // 16)]
    return MicroBatch(
        {**batch, **make_images(z, z.B), **masks}, packed, features,
        ref_log_probs=torch.empty(z.N, z.T),
        r_format=torch.empty(z.B, z.G), r_box=torch.empty(z.B, z.G),
        finished=torch.ones(z.B, z.G, dtype=torch.bool))


def tensors_in(micro_batches):
    """What the plan counts as "images": their tensors, SAM's maps, the masks of attention."""
    tensors = [value for micro in micro_batches for value in micro.batch.values()
               if torch.is_tensor(value)]
    for micro in micro_batches:
        tensors += [*micro.features, micro.packed.segment_mask]
    return tensors


# --- What is fake ---------------------------------------------------------------------------------

@contextmanager
def fake_processes(gpus, kind):
    """-> the mesh of `gpus` processes, of which only rank 0 exists"""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        if kind == "full":
            yield init_device_mesh("cpu", (gpus,), mesh_dim_names=("shards",))
        else:
            local = min(gpus, plan.NODE)
            yield init_device_mesh("cpu", (gpus // local, local),
                                   mesh_dim_names=("copies", "shards"))
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_numbers(vision):
    """What reads numbers out of tensors gets them from elsewhere. vision: {name of a function of
    Qwen's vision tower: what it returns}"""
    with ExitStack() as stack:
        def put(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        put(FakeTensor, "item", lambda tensor: 1.0)
        put(FakeTensor, "__bool__", lambda tensor: False)
        put(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode)    # a copy has the same mode
        put(PreTrainedModel, "to", lambda model, *args: model)          # all of it is there already
        for name, value in vision.items():
            put(qwen, name, lambda *args, value=value, **kwargs: value)
        # else DTensor's shape propagation makes tensors of the global shape, and they are counted
        stack.enter_context(mock.patch("torch.distributed.tensor._sharding_prop.detect_fake_mode",
                                       return_value=None))
        yield


def fake_copy(mode, packed):
    """PackedGroups of real tensors -> one of fake tensors of the same shapes."""
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}
    return replace(packed, **{name: mode.from_tensor(value).clone()
                              for name, value in values.items() if torch.is_tensor(value)})


def vision_tables(lens, grid):
    """{function of Qwen's vision tower: what it returns for the grid}, with one window for all."""
    tower, real = lens.mllm.model.visual, torch.from_numpy(grid)
    merge = tower.spatial_merge_size
    window_index, _ = qwen.get_vision_window_index(real, merge, tower.window_size,
                                                   tower.patch_size)
    ends = np.cumsum([0, *grid.prod(1)])
    return {"get_vision_position_ids": qwen.get_vision_position_ids(real, merge),
            "get_vision_attention_seqlens": (ends, None),
            "get_vision_window_index": (window_index, ends)}


def materialize(module):
    """Parameters and buffers on the meta device become fake tensors on the CPU; what is tied stays
    tied."""
    new = {}

    def on_cpu(tensor):
        if id(tensor) not in new:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            new[id(tensor)] = fake, tensor                       # held, so that no id is used twice
        return new[id(tensor)][0]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = on_cpu(tensor)


# --- Beside the plan ------------------------------------------------------------------------------

def compare(case):
    """-> {part: (bytes planned, bytes counted)}"""
    planned, peak, held = case["planned"], training_peak(case), case["held"]
    training = planned["training"]
    counted = {"weights": peak["Sharded Param"], "Adam": case["after"]["OptState"],
               "gradients": peak["Sharded Grad"], **held}
    rows = {part: (training[part], size) for part, size in counted.items()}
    coming = sum(size for part, size in training.items() if part not in counted)
    rows["activations, temporary"] = coming, temporary(peak)
    rows["all of training"] = sum(training.values()), peak["Total"]
    rows["all of the update"] = sum(planned["update"].values()), case["peaks"]["update"]["Total"]
    return rows


def compare_moments(case):
    """-> {moment of training: (bytes planned, bytes counted)}, without what is always there"""
    base = case["planned"]["training"]["gathered root"] + case["planned kept"]
    return {f"in the moment `{moment}`": (base + planned, temporary(case["peaks"][moment]))
            for moment, planned in case["planned moments"].items()}


def training_peak(case):
    return max((peak for moment, peak in case["peaks"].items() if moment != "update"),
               key=lambda peak: peak["Total"])


def temporary(peak):
    """What comes and goes: gathered weights and gradients, collectives' buffers, activations."""
    return peak["Total"] - sum(peak[name] for name in ("Sharded Param", "Sharded Grad", "OptState",
                                                       "Inputs"))


def section(case):
    """A case's part of the page."""
    z = case["sizes"]
    lines = [f"## {case['gpus']} GPUs, --shard {case['shard']}", "",
             f"P = {z['P']}, T = {z['T']}, G = {z['G']}. Each process has {z['prompts']} prompts "
             f"per step in micro-batches of {z['B']}, and 1/{z['shards']} of the weights.", "",
             "| GB on rank 0 | plan | dry run | plan is off by |", "|---|---:|---:|---:|"]
    for part, (planned, counted) in {**compare(case), **compare_moments(case)}.items():
        lines.append(f"| {part} | {planned / 1e9:.2f} | {counted / 1e9:.2f} | "
                     f"{100 * (planned / counted - 1):+.1f} % |")
    return "\n".join([*lines, ""])


PAGE = """# A dry run at full size, beside the plan

Written by `python tests/evidence/dry_run.py --write` ({versions}; no GPU,
nothing downloaded). Rank 0 of LENS-3B in stage 2: Qwen2.5-VL-3B and SAM2-Large, sharded as
train_rl.py does it, one micro-batch forward and backward with rewards and losses, one update, on
fake tensors and fake processes. "Dry run" is what torch's FSDPMemTracker counts, "plan" is the
formula of tests/tools/plan.py. The head of tests/evidence/dry_run.py says what is replaced. A GB is
10^9 bytes.

{sections}
## Where the plan is off, and why

- **logits**: while lm_head runs backward, its gradient exists three times in bf16 (0.62 GB each):
  the sum of the chunks so far, that of the new chunk, and their sum. Real tensors on a CPU do the
  same: four checkpointed chunks through one weight peak at 3.0 times its size, one chunk at 1.0.
- **root** is planned too high. The formula still adds what the MLLM kept, which is free by then.
  The plan takes the largest of its three moments, and root is never that.
- **hybrid** takes more at the end of the backward pass. FSDP holds what the copies of each unit
  average, fp32 gradients of its shard, until the pass ends. That is not in the plan, but it grows
  only as fast as what the MLLM kept goes.
- The tracker counts tensors. The workspace of CUDA's kernels, fragments and NCCL's buffers are in
  neither column. The plan adds 2 GB for them, a guess.
- Attention is fused here, as in the plan. tests/tools/plan.py prints what is added if a GPU has no
  fused kernel for a mask.
- Sampling is not run, so the plan's column for it, the cache above all, is not checked here.
"""


def write(cases, versions):
    (ROOT / "docs/evidence/dry_run.json").write_text(json.dumps(cases, indent=1) + "\n")
    page = PAGE.format(versions=versions, sections="\n".join(section(case) for case in cases))
    (ROOT / "docs/evidence/dry_run.md").write_text(page)


def main():
    shared, args, dry = parse_settings([SharedArgs, RLArgs, DryRunArgs], PRESETS,
                                       __doc__.splitlines()[0])
    if not dry.write:
        return print(section(dry_run(shared, args, dry.gpus)))
    cases = []
    for gpus, kind in CASES:
        cases.append(dry_run(shared, replace(args, shard=kind), gpus))
        print(f"{gpus} GPUs, {kind}: {cases[-1]['seconds']} s", flush=True)
    write(cases, f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    run(main)
