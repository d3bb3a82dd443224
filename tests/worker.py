"""What tests/test_train.py runs under torchrun: training steps on random weights and stored completions.

    torchrun --nproc_per_node=2 tests/worker.py gradients OUT      # one pass over four groups -> losses and every gradient
    torchrun --nproc_per_node=2 tests/worker.py checkpointed OUT   # the same with gradient checkpointing
    torchrun --nproc_per_node=2 tests/worker.py refresh OUT        # bf16: is each rank's sampling copy the cast weights?
    torchrun --nproc_per_node=2 tests/worker.py stale OUT          # the same, but rank 1 does not refresh its copy
    torchrun --nproc_per_node=2 tests/worker.py steps OUT fp32 full        # ten updates; also bf16, and hybrid sharding
"""
import os
import sys
from types import SimpleNamespace

from conftest import END, VOCABULARY, random_batch, random_completions, random_mllm, random_sam

import torch
import torch.distributed as dist

import train_rl
from align import apply_update
from data import select
from model import (Lens, Reference, copy_mllm, prompt_positions, refresh, set_trainable, shard, start_processes)

torch.set_num_threads(1)
GRIDS, TEXTS = ((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)), (7, 11, 5, 9)


def whole_batch():
    """Four prompts of different lengths with truth, stored completions and their texts."""
    batch, g = random_batch(GRIDS, TEXTS), torch.Generator().manual_seed(9)
    batch["masks"] = [torch.rand(40, 50, generator=g) > 0.6 for _ in GRIDS]
    batch["ignores"] = [torch.rand(40, 50, generator=g) > 0.9 for _ in GRIDS]
    batch["low_masks"], batch["low_weights"] = torch.rand(2, 4, 32, 32, generator=g)
    batch["boxes"], batch["frames"] = [(10, 10, 30, 30)] * 4, [(128, 128)] * 4
    box = '<think>\na\n</think>\n<answer>\n[{"bbox_2d": [%d, 20, 80, 100]}]\n</answer>'
    texts = [[box % (10 * g + b) if g else "no answer" for g in range(3)] for b in range(4)]
    return batch, random_completions(4, 3), texts, [[True, True, False]] * 4


def build(precision, mesh, stage="rl"):
    torch.manual_seed(0)
    shape = SimpleNamespace(num_queries=5, connector="vit", connector_heads=4, prompt_tokens="all", prompt="paper",
                            positions="mrope", multimask=False)
    forbidden = torch.arange(VOCABULARY) >= 250
    lens = Lens(random_mllm(), random_sam(), shape, forbidden, END)
    frozen = set_trainable(lens, stage)
    sampler = copy_mllm(lens.mllm, precision)
    reference = Reference(copy_mllm(random_mllm(seed=1), precision), forbidden)    # another policy, so that the KL is not 0
    shard(lens, mesh, precision, replicated=frozen)
    return lens, sampler, shard(reference, mesh, precision)


def settings(micro_batch=1, **other):
    """Weights unlike 1, so that each term's is seen."""
    return train_rl.RLArgs(batch=4, micro_batch=micro_batch, group_size=3, temperature=0.8, beta=0.5, alpha=1.5, **other)


def one_pass(lens, reference, rank, world, args):
    """This rank's share of the four groups, in passes of --micro-batch. -> sums over the share."""
    batch, completions, texts, finished = whole_batch()
    share = range(rank * 4 // world, (rank + 1) * 4 // world)
    mine = select(batch, share)
    pick = lambda groups: [groups[b] for b in share]
    positions = prompt_positions(lens.mllm, mine)
    parts = train_rl.make_parts(lens, mine, positions, pick(completions), pick(texts), pick(finished), args)
    sums = sum(train_rl.policy_pass(lens, reference, part, args, world) for part in parts)
    dist.all_reduce(sums)
    return sums


def steps(lens, reference, rank, world):
    """Ten updates on the four groups. -> their sums and gradient norms (10, ...), this process's bytes"""
    args, rows = settings(updates_per_batch=1), []
    optimizer = torch.optim.AdamW(train_rl.parameter_groups(lens, args), lr=1e-3)
    for step in range(10):
        sums = one_pass(lens, reference, rank, world, args)
        norm = apply_update(lens, optimizer, 10.0, args, sums[0].item(), step)          # ten times the paper's rate
        rows.append(torch.cat([sums, torch.tensor([norm])]))
    local = lambda tensors: sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)
    state = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return torch.stack(rows), {"parameters": local(p for p in lens.parameters() if p.requires_grad), "optimizer": local(state),
                               "reference": local(reference.parameters())}


def main(what, out, precision="", kind="full"):
    if what == "checkpointed":
        os.environ["LOCAL_WORLD_SIZE"] = "1"                             # with hybrid, as if every process were a node
    rank, world, _, mesh = start_processes(kind)
    precision = precision or ("fp32" if what in ("gradients", "checkpointed") else "bf16")
    lens, sampler, reference = build(precision, mesh)
    if what == "steps":
        rows, size = steps(lens, reference, rank, world)
        weights = {n: p.full_tensor() for n, p in lens.named_parameters() if p.requires_grad}
        sizes = [None] * world
        dist.all_gather_object(sizes, size)
        if rank == 0:
            torch.save({"rows": rows, "weights": weights, "bytes": sizes}, out)
        dist.barrier()
        return dist.destroy_process_group()
    if what == "checkpointed":
        assert mesh.shape == ((2,) if kind == "full" else (2, 1))
        lens.train().mllm.gradient_checkpointing_enable({"use_reentrant": False})
    sums = one_pass(lens, reference, rank, world, settings())
    if precision == "fp32":
        grads = {n: p.grad.full_tensor() for n, p in lens.named_parameters() if p.grad is not None}
        if rank == 0:
            torch.save({"sums": sums, "grads": grads}, out)
    else:
        torch.optim.AdamW([p for p in lens.parameters() if p.requires_grad], lr=1e-2).step()
        spare = copy_mllm(random_mllm(seed=2), precision)                # the stale rank takes part in the collectives only
        refresh(spare if what == "stale" and rank == 1 else sampler, lens)
        equal = all([torch.equal(a, p.full_tensor().to(torch.bfloat16))
                     for a, p in zip(sampler.parameters(), lens.mllm.parameters())])
        assert all(p.dtype == torch.bfloat16 for p in sampler.parameters())
        assert sampler.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
        everyone = [None] * world
        dist.all_gather_object(everyone, equal)
        if rank == 0:
            torch.save({"equal": everyone, "sums": sums}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
