"""What tests/test_train.py runs under torchrun: training steps on random weights and stored
completions.

    torchrun --nproc_per_node=2 tests/worker.py gradients OUT
        one pass over four groups -> losses and every gradient
    torchrun --nproc_per_node=2 tests/worker.py checkpointed OUT
        the same with gradient checkpointing
    torchrun --nproc_per_node=2 tests/worker.py refresh OUT
        bf16: is each rank's sampling copy the cast weights?
    torchrun --nproc_per_node=2 tests/worker.py stale OUT
        the same, but rank 1 does not refresh its copy
    torchrun --nproc_per_node=2 tests/worker.py steps OUT fp32 full
        ten updates; also bf16, and hybrid sharding
"""
import os
import sys
from types import SimpleNamespace

from conftest import (END, SAM_SIDE, VOCABULARY, random_batch, random_completions, random_mllm,
                      random_sam,
                      stored_samples)

import torch
import torch.distributed as dist

import train_rl
from align import SharedArgs, apply_update, run, set_trainable, shard, start_processes
from data import select
from model import Lens, prompt_positions
from train_rl import Reference, copy_mllm, refresh

torch.set_num_threads(1)
GRIDS, TEXTS = ((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)), (7, 11, 5, 9)


def whole_batch():
    """Four prompts of different lengths with truth, stored completions, their texts, and which of
    them were finished."""
    batch, g = random_batch(GRIDS, TEXTS), torch.Generator().manual_seed(9)
    batch["masks"] = [torch.rand(40, 50, generator=g) > 0.6 for _ in GRIDS]
    batch["ignores"] = [torch.rand(40, 50, generator=g) > 0.9 for _ in GRIDS]
    batch["low_masks"], batch["low_weights"] = torch.rand(2, 4, SAM_SIDE // 4, SAM_SIDE // 4,
                                                          generator=g)
    batch["boxes"], batch["frames"] = [(10, 10, 30, 30)] * 4, [(128, 128)] * 4
    box = '<think>\na\n</think>\n<answer>\n[{"bbox_2d": [%d, 20, 80, 100]}]\n</answer>'
    texts = [["no answer", box % (10 + b), box % (20 + b)] for b in range(4)]
    return batch, random_completions(4, 3), texts, [[True, True, False]] * 4


def build(precision, mesh, stage="rl"):
    """-> Lens and Reference, sharded, and the sampling copy of the Lens's MLLM. The reference is
    another policy, so that the KL is not 0."""
    torch.manual_seed(0)
    shape = SimpleNamespace(num_queries=5, precision="fp32", connector="vit", connector_heads=4,
                            prompt_tokens="all", prompt="paper", positions="mrope", multimask=False)
    forbidden = torch.arange(VOCABULARY) >= 250
    lens = Lens(random_mllm(), random_sam(), shape, forbidden, END)
    frozen = set_trainable(lens, stage)
    sampler = copy_mllm(lens.mllm, precision)
    reference = Reference(copy_mllm(random_mllm(seed=1), precision), forbidden)
    shard(lens, mesh, precision, replicated=frozen)
    return lens, sampler, shard(reference, mesh, precision)


def settings(micro_batch=1, **other):
    """Weights unlike 1, so that each term's is seen."""
    return train_rl.RLArgs(batch=4, micro_batch=micro_batch, group_size=3, temperature=0.8,
                           beta=0.5, alpha=1.5, **other)


def policy_pass(lens, groups, args, world):
    """train_rl's first update on some groups, up to the gradients. -> Scores, {name: sum}"""
    out = lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
               groups.features, args.temperature)
    scores = train_rl.score(out, groups, args)
    return scores, train_rl.backward_pass(out, groups, scores, args, world)


def one_pass(lens, reference, rank, world, args):
    """This rank's share of the four groups, in passes of --micro-batch. -> sums over all groups"""
    batch, completions, texts, finished = whole_batch()
    share = range(rank * 4 // world, (rank + 1) * 4 // world)
    mine = select(batch, share)
    completions, texts, finished = ([groups[b] for b in share]
                                    for groups in (completions, texts, finished))
    positions = prompt_positions(lens.mllm, mine)
    sums = 0
    samples = stored_samples(completions, finished)
    for groups in train_rl.make_groups(lens, reference, mine, positions, samples, texts, args):
        _, found = policy_pass(lens, groups, args, world)
        sums = sums + torch.stack(list(found.values()))
    dist.all_reduce(sums)
    return sums


def bytes_held(tensors):
    """Of sharded tensors, this process's share."""
    return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in tensors)


def steps(lens, reference, rank, world):
    """Ten updates on the four groups, at ten times the paper's rate. -> their sums (the loss
    first) and gradient norms (10, ...), this process's bytes"""
    args, rows = settings(updates_per_batch=1), []
    optimizer = torch.optim.AdamW(train_rl.parameter_groups(lens, args), lr=1e-3)
    for step in range(10):
        sums = one_pass(lens, reference, rank, world, args)
        norm = apply_update(lens, optimizer, 10.0, args, sums[0].item(), step)
        rows.append(torch.cat([sums, torch.tensor([norm])]))
    state = [tensor for state in optimizer.state.values() for name, tensor in state.items()
             if name != "step"]
    trained = [p for p in lens.parameters() if p.requires_grad]
    return torch.stack(rows), {"parameters": bytes_held(trained), "optimizer": bytes_held(state),
                               "reference": bytes_held(reference.parameters())}


def save_steps(lens, reference, rank, world, out):
    rows, size = steps(lens, reference, rank, world)
    weights = {name: p.full_tensor() for name, p in lens.named_parameters() if p.requires_grad}
    sizes = [None] * world
    dist.all_gather_object(sizes, size)
    if rank == 0:
        torch.save({"rows": rows, "weights": weights, "bytes": sizes}, out)


def save_gradients(lens, reference, rank, world, out):
    sums = one_pass(lens, reference, rank, world, settings())
    grads = {name: p.grad.full_tensor() for name, p in lens.named_parameters()
             if p.grad is not None}
    if rank == 0:
        torch.save({"sums": sums, "grads": grads}, out)


def save_refreshed(lens, sampler, reference, rank, world, out, stale):
    """After an update: is each rank's sampling copy the cast weights? With `stale` rank 1 takes
    part in the collectives only."""
    sums = one_pass(lens, reference, rank, world, settings())
    torch.optim.AdamW([p for p in lens.parameters() if p.requires_grad], lr=1e-2).step()
    spare = copy_mllm(random_mllm(seed=2), "bf16")
    refresh(spare if stale and rank == 1 else sampler, lens)
    equal = True
    for copied, parameter in zip(sampler.parameters(), lens.mllm.parameters()):
        whole = parameter.full_tensor().to(torch.bfloat16)       # a collective, so for every one
        equal = equal and torch.equal(copied, whole)
    assert all(p.dtype == torch.bfloat16 for p in sampler.parameters())
    assert sampler.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    everyone = [None] * world
    dist.all_gather_object(everyone, equal)
    if rank == 0:
        torch.save({"equal": everyone, "sums": sums}, out)


def main(what, out, precision="", kind="full"):
    if what == "checkpointed":
        os.environ["LOCAL_WORLD_SIZE"] = "1"         # with hybrid, as if every process were a node
    rank, world, _, mesh = start_processes(SharedArgs(precision="fp32"), kind)
    precision = precision or ("fp32" if what in ("gradients", "checkpointed") else "bf16")
    lens, sampler, reference = build(precision, mesh)
    if what == "checkpointed":
        assert mesh.shape == ((2,) if kind == "full" else (2, 1))
        lens.train().mllm.gradient_checkpointing_enable({"use_reentrant": False})
    if what == "steps":
        save_steps(lens, reference, rank, world, out)
    elif what in ("gradients", "checkpointed"):
        save_gradients(lens, reference, rank, world, out)
    else:
        save_refreshed(lens, sampler, reference, rank, world, out, stale=what == "stale")


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
