"""A rehearsal on a GPU that is only pretended (pretend_gpu.py): nearly every line that a training
step, a validation and an evaluation run on a GPU runs here on tensors that say they are on cuda:0.
A line that mixes devices raises, as it would there. The numbers must be those of the CPU to the
last bit, because the CPU computes both.

Not in it are FSDP, NCCL, compiled code and what else pretend_gpu.py names. So each model is whole,
and a sum over all processes is that of one.
"""
import pytest
import torch
import torch.distributed as dist
from conftest import END, FAMILIES, random_lens, random_mllm, random_sam
from pretend_gpu import pretend_gpu
from training_worker import BOX, settings, whole_batch

import evaluate
import train_rl
from align import SharedArgs, align_step, apply_update, forced_completions, make_optimizer
from data import select, to_device
from model import Lens, SamHead, prompt_positions, set_trainable

CPU, LONGEST = torch.device("cpu"), 10


class Tokenizer:
    """Every third text is without a box, whatever the tokens are. A text has as many tokens as
    characters."""

    def batch_decode(self, completions, **options):
        return ["no box" if n % 3 == 2 else BOX % (10 + n) for n in range(len(completions))]

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [3 + ord(character) % 200 for character in text]})


# --- The pretended GPU ----------------------------------------------------------------------------

MIXTURES = {
    "sum": lambda gpu, cpu: gpu + cpu,
    "sum in place": lambda gpu, cpu: cpu.add_(gpu),
    "into a number": lambda gpu, cpu: cpu.sum().add_(gpu.sum()),
    "matmul": lambda gpu, cpu: cpu @ gpu,
    "cat": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "stack of numbers": lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
    "where": lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
    "gather": lambda gpu, cpu: gpu.gather(0, cpu.long()),
    "index from the GPU": lambda gpu, cpu: cpu[gpu.long()],
    "values by index": lambda gpu, cpu: gpu.index_put_((gpu.long(),), cpu),
    "NumPy": lambda gpu, cpu: gpu.numpy()}
ALLOWED = {
    "number": lambda gpu, cpu: gpu * cpu.sum(),
    "index from the CPU": lambda gpu, cpu: gpu[cpu.long()],
    "copy": lambda gpu, cpu: gpu.copy_(cpu),
    "move": lambda gpu, cpu: cpu.to(gpu.device) + gpu,
    "made there": lambda gpu, cpu: torch.tensor([1.0, 0.0], device=gpu.device) + gpu,
    "module": lambda gpu, cpu: torch.nn.Linear(2, 1).to(gpu.device)(gpu)}


@pytest.mark.parametrize("name", [*MIXTURES, *ALLOWED])
def test_the_pretended_gpu_is_as_strict_as_a_real_one(name):
    with pretend_gpu() as device:
        gpu, cpu = torch.ones(2, device=device), torch.ones(2)
        assert gpu.device == device and cpu.device == gpu.cpu().device == CPU
        if name in MIXTURES:
            with pytest.raises((RuntimeError, TypeError), match="device"):
                MIXTURES[name](gpu, cpu)
        else:
            assert ALLOWED[name](gpu, cpu).device == device


# --- The rehearsal --------------------------------------------------------------------------------

@pytest.fixture
def alone(monkeypatch):
    """One process without FSDP: its sums are those of all processes, and its tensors are whole."""
    monkeypatch.setattr(dist, "all_reduce", lambda *tensors, **options: None)
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda tensor: tensor, raising=False)
    monkeypatch.setattr(Lens, "reshard", lambda lens: None, raising=False)


def step_of_stage_2(family, device):
    """The lines of train_rl.main for one step on `device`, with both caches, then a validation.
    -> everything that it measured"""
    batch, *_ = whole_batch()
    lens, args = random_lens(random_mllm(family)), settings(2)
    set_trainable(lens.train(), "rl")
    sampler = train_rl.copy_mllm(lens.mllm, "fp32", device)
    reference = train_rl.Reference(random_mllm(family, seed=1), lens.forbidden).to(device)
    lens.to(device)
    optimizer = make_optimizer(train_rl.parameter_groups(lens, args), args, device)
    cpu_batch, batch = batch, to_device(batch, device)
    positions = prompt_positions(lens.mllm, batch)
    uniforms = train_rl.draw_uniforms(1, 0, range(4), args.group_size, LONGEST)
    fixed = train_rl.FixedCache(sampler, 12, 64, LONGEST, compiled=False)
    samples, again = (train_rl.generate(sampler, batch, positions, args.group_size, LONGEST, END,
                                        lens.forbidden, uniforms.to(device), args.temperature,
                                        cache) for cache in (None, fixed))
    tokens = [row.tolist() for group in samples.completions for row in group]
    assert tokens == [row.tolist() for group in again.completions for row in group]
    texts = train_rl.completion_texts(lens, samples, Tokenizer())
    micro_batches = train_rl.make_micro_batches(lens, reference, batch, positions, samples, texts,
                                                args)
    means, norm = train_rl.update(lens, optimizer, micro_batches, 1.0, args, 1, 0)
    train_rl.refresh(sampler, lens)
    validation = train_rl.validate(lens, sampler, fixed, range(4),
                                   lambda rows: select(cpu_batch, rows), Tokenizer(),
                                   SharedArgs(max_completion=LONGEST), args, 0, 1, device)
    assert {x.device for x in (*lens.parameters(), *lens.buffers(), *sampler.parameters(),
                               *sampler.buffers(), fixed.memory)} == {device}
    return tokens, means, norm, validation


def step_of_stage_1(family, device):
    """The lines of align.main for one step on `device`. -> the sums, the gradient norm"""
    batch, *_ = whole_batch()
    batch["expressions"] = ["the cup"] * 4
    lens, args = random_lens(random_mllm(family)), settings(2)
    set_trainable(lens, "align")
    lens.sam.eval()
    lens.to(device)
    trained = [p for p in lens.parameters() if p.requires_grad]
    optimizer = make_optimizer([{"params": trained, "peak_lr": args.lr}], args, device)
    batch, sums = to_device(batch, device), 0
    completions = forced_completions(lens, batch, Tokenizer())
    for rows in range(2), range(2, 4):
        sums = sums + align_step(lens, select(batch, rows), [completions[b] for b in rows], 1, args)
    return sums.tolist(), apply_update(lens, optimizer, 1.0, args, sums[0].item(), 0)


def evaluated(family, device):
    """evaluate.py's way from a batch to its rows, on `device`, with the cache of a GPU."""
    batch, *_ = whole_batch()
    batch |= {"row_ids": list("abcd"), "expressions": ["the cup"] * 4}
    lens, stock_sam = random_lens(random_mllm(family)).eval(), SamHead(random_sam(seed=3)).eval()
    lens, stock_sam = lens.to(device), stock_sam.to(device)
    cache = train_rl.FixedCache(lens.mllm, 4, 64, LONGEST, compiled=False)
    predictions = evaluate.predict_both(batch, lens, stock_sam, Tokenizer(), LONGEST, cache)
    args = evaluate.EvaluateArgs(checkpoint="runs/rl")
    return [evaluate.make_row(batch, b, prediction, args)
            for b, prediction in enumerate(predictions)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_stage_2_and_a_validation(family, alone):
    with pretend_gpu() as device:
        on_gpu = step_of_stage_2(family, device)
    on_cpu = step_of_stage_2(family, CPU)
    assert on_gpu[:3] == on_cpu[:3]
    assert on_gpu[3] == pytest.approx(on_cpu[3], abs=1e-3)  # after the update, which a GPU fuses


@pytest.mark.parametrize("path", [step_of_stage_1, evaluated])
def test_a_step_of_stage_1_and_an_evaluation(path, alone):
    """With the family that has the most to move: features of inner vision layers, too."""
    with pretend_gpu() as device:
        on_gpu = path("qwen3_vl", device)
    assert on_gpu == path("qwen3_vl", CPU)
