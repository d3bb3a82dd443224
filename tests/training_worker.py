"""Training on random weights and stored completions, to compare one process with several. The tests
call these functions, in one process or in two. tests/evidence/scale.py starts

    torchrun --nproc_per_node=2 tests/training_worker.py OUT fp32 full    # or bf16, or hybrid

which makes ten updates and saves their numbers and the weights behind them.
"""
import os
import sys

import torch
import torch.distributed as dist
from conftest import SAM_SIDE, random_batch, random_completions, random_lens, random_mllm

import train_rl
from align import SharedArgs, apply_update, run, start_processes
from data import select
from model import checkpoint_layers, prompt_positions, set_trainable, shard
from train_rl import Reference, RLArgs, Samples, copy_mllm, refresh

BOX = '<think>\na\n</think>\n<answer>\n[{"bbox_2d": [%d, 20, 80, 100]}]\n</answer>'


def whole_batch(dtype=torch.float32):
    """-> a batch of four prompts of different lengths, with ground truth; three completions for
    each; their texts, one without a box; which of them are finished: all but the last"""
    batch = random_batch(((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)), (7, 11, 5, 9), dtype=dtype)
    g, low = torch.Generator().manual_seed(9), SAM_SIDE // 4
    batch["gt_masks"] = [torch.rand(40, 50, generator=g) > 0.6 for _ in range(4)]
    batch["ignore_masks"] = [torch.rand(40, 50, generator=g) > 0.9 for _ in range(4)]
    batch["low_res_masks"], batch["low_res_weights"] = torch.rand(2, 4, low, low, generator=g,
                                                                     dtype=dtype)
    batch["gt_boxes"], batch["mllm_frames"] = [(10, 10, 30, 30)] * 4, [(128, 128)] * 4
    texts = [["no box", BOX % (10 + b), BOX % (20 + b)] for b in range(4)]
    return batch, random_completions(4, 3), texts, [[True, True, False]] * 4


def settings(micro_batch=1, **other):
    """Weights other than 1, so that the weight of each term is seen."""
    return RLArgs(**{**dict(batch=4, micro_batch=micro_batch, group_size=3, temperature=0.8,
                            beta=0.5, alpha=1.5), **other})


def build(precision, mesh, stage="rl"):
    """-> Lens and Reference, both sharded, and the sampler. The reference is another policy, so
    that the KL is not 0."""
    lens = random_lens()
    frozen = set_trainable(lens.train(), stage)
    sampler = copy_mllm(lens.mllm, precision)
    reference = Reference(copy_mllm(random_mllm(seed=1), precision), lens.forbidden)
    shard(lens, mesh, precision, frozen)
    return lens, shard(reference, mesh, precision), sampler


def micro_batches(lens, reference, args, rank=0, world=1, whole=None):
    """This rank's share of the four groups -> list of MicroBatch"""
    batch, completions, texts, finished = whole or whole_batch()
    share = range(rank * 4 // world, (rank + 1) * 4 // world)
    batch = select(batch, share)
    completions, texts, finished = ([groups[b] for b in share]
                                    for groups in (completions, texts, finished))
    return train_rl.make_micro_batches(lens, reference, batch, prompt_positions(lens.mllm, batch),
                                       Samples(completions, finished), texts, args)


def forward_backward(lens, micro, args, world=1):
    """Steps 2 to 4 of train_rl.py for a micro-batch. -> the forward's output, {name: sum}"""
    out = lens(micro.batch["pixel_values"], micro.batch["grid_thw"], micro.packed, micro.features,
               args.temperature)
    train_rl.score(out, micro, args)
    return out, train_rl.backward(out, micro, args, world)


def all_groups(lens, reference, args, rank=0, world=1):
    """Forward and backward of the four groups, over all processes -> sums over all groups"""
    sums = 0
    for micro in micro_batches(lens, reference, args, rank, world):
        sums = sums + torch.stack(list(forward_backward(lens, micro, args, world)[1].values()))
    dist.all_reduce(sums)
    return sums


def gradients(lens):
    return {name: p.grad.full_tensor() for name, p in lens.named_parameters() if p.grad is not None}


def on_rank_0(path, **results):
    if dist.get_rank() == 0:
        torch.save(results, path)
    dist.barrier()


# --- What runs in several processes, each with its own rank in the environment --------------------

def save_gradients(path, kind, checkpointing):
    """Sums and gradients of the four groups, in fp32. "hybrid" takes each process for a machine."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    rank, world, _, mesh = start_processes(SharedArgs(precision="fp32"), kind)
    assert mesh.shape == {"full": (world,), "hybrid": (world, 1)}[kind]
    lens, reference, _ = build("fp32", mesh)
    if checkpointing:
        checkpoint_layers(lens.mllm)
    sums = all_groups(lens, reference, settings(), rank, world)
    on_rank_0(path, sums=sums, gradients=gradients(lens))
    dist.destroy_process_group()


def save_whether_refreshed(path, stale):
    """After an update in bf16: is each rank's sampler the cast weights? With `stale`, rank 1 only
    takes part in the collectives."""
    rank, world, _, mesh = start_processes(SharedArgs(precision="bf16"))
    lens, reference, sampler = build("bf16", mesh)
    all_groups(lens, reference, settings(), rank, world)
    torch.optim.AdamW([p for p in lens.parameters() if p.requires_grad], lr=1e-2).step()
    spare = copy_mllm(random_mllm(seed=2), "bf16")
    refresh(spare if stale and rank == 1 else sampler, lens)
    equal = True
    for copied, parameter in zip(sampler.parameters(), lens.mllm.parameters()):
        whole = parameter.full_tensor()  # a collective, so for every parameter
        equal = equal and copied.dtype == torch.bfloat16 and torch.equal(copied, whole.bfloat16())
    assert sampler.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    everyone = [None] * world
    dist.all_gather_object(everyone, equal)
    on_rank_0(path, equal=everyone)
    dist.destroy_process_group()


def bytes_held(tensors):
    """This process's share of sharded tensors."""
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def ten_updates(path, precision, kind):
    """Ten updates on the four groups, at ten times the paper's rate. Saves "rows" (10, ...), which
    holds sums (the loss first) and the gradient norm, "weights", and "bytes" of each process."""
    rank, world, _, mesh = start_processes(SharedArgs(precision="fp32"), kind)
    lens, reference, _ = build(precision, mesh)
    args, rows = settings(), []
    optimizer = torch.optim.AdamW(train_rl.parameter_groups(lens, args), lr=1e-3)
    for step in range(10):
        sums = all_groups(lens, reference, args, rank, world)
        norm = apply_update(lens, optimizer, 10.0, args, sums[0].item(), step)
        rows.append(torch.cat([sums, torch.tensor([norm])]))
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items()
              if name != "step"]
    trained = {name: p for name, p in lens.named_parameters() if p.requires_grad}
    sizes = [None] * world
    dist.all_gather_object(sizes, {"parameters": bytes_held(trained.values()),
                                   "optimizer": bytes_held(states),
                                   "reference": bytes_held(reference.parameters())})
    weights = {name: p.full_tensor() for name, p in trained.items()}
    on_rank_0(path, rows=torch.stack(rows), weights=weights, bytes=sizes)


if __name__ == "__main__":
    run(lambda: ten_updates(*sys.argv[1:]))
