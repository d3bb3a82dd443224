"""What issue 11 made ready for sixteen GPUs, as far as a CPU can prove it: sampling in a cache of
fixed shape, devices, SIGTERM with loaders, stage 1's answers, large pictures, gradients reduced
once a step, looks at val, metrics, mapped weights."""
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (END, ENVIRONMENT, ROOT, SAM_SIDE, TORCHRUN, VOCABULARY, random_batch,
                      random_sam, rows, script)
from PIL import Image
from test_model import random_family
from test_train import contents, inside, kill_after          # noqa: F401
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import align
import data
import evaluate
import model
import train_rl
from align import AlignArgs, SharedArgs, choose_device
from data import Collator, TrainingStream, read_records
from model import (FixedCache, GrowingCache, Lens, build_lens, generate, pack_groups,
                   prompt_positions)
from train_rl import RLArgs

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
EIGHT = ((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)) * 2, (7, 11, 5, 9, 30, 3, 14, 8)
# ends come often among so few tokens
FEW = torch.tensor([token not in (END, *range(20, 40)) for token in range(VOCABULARY)])


def small_lens(mllm, forbidden=FEW):
    args = SimpleNamespace(num_queries=5, connector="vit", connector_heads=4, prompt_tokens="all",
                           prompt="paper", positions="mrope", multimask=False, precision="fp32")
    return Lens(mllm, random_sam(), args, forbidden, END)


@pytest.fixture
def mesh():
    """Of this process alone."""
    yield align.start_processes(SharedArgs(**align.TINY, preset="tiny", device="cpu"))[3]
    dist.destroy_process_group()


# Sampling


@pytest.fixture
def compactions(monkeypatch):
    """-> list of (cache, sequences before, sequences after) of every keep() that dropped some."""
    seen = []
    for cache in (GrowingCache, FixedCache):
        def keep(self, running, real=cache.keep):
            before = len(self.attention if isinstance(self, GrowingCache) else self.mask)
            kept = real(self, running)
            if kept is not None:
                seen.append((type(self), before, len(kept)))
            return kept
        monkeypatch.setattr(cache, "keep", keep)
    return seen


@pytest.fixture
def graphs(monkeypatch):
    """FixedCache compiles with the eager backend: no code is generated, but a graph break is an
    error, as is a host sync. -> its counter of graphs"""
    counter, compile = CompileCounter(), torch.compile

    def quick(function, dynamic, mode):
        return compile(function, dynamic=dynamic, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", quick)
    yield counter
    torch._dynamo.reset()


def sample(lens, batch, G, longest, eos=END, uniforms=None, fixed=None):
    return generate(lens.mllm, batch, prompt_positions(lens.mllm, batch), G, longest, eos,
                    lens.forbidden, uniforms, 0.8, fixed)


def same_samples(a, b):
    assert a.finished == b.finished
    for of_a, of_b in zip(a.completions, b.completions):
        assert all(torch.equal(x, y) for x, y in zip(of_a, of_b))
    assert (a.log_probs - b.log_probs).abs().max() < 1e-5


def an_early_end(completions):
    """A token that ends half of the completions, but not all, when compaction is looked at."""
    tokens = [row.tolist() for group in completions for row in group]

    def ends(token, before):
        return sum(token in row[:before] for row in tokens)
    return next(token for token in range(VOCABULARY)
                if any(len(tokens) // 2 <= ends(token, t) < len(tokens) for t in (8, 16, 24)))


def some_uniforms(N, longest):
    return torch.rand(N, longest, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("family, compiled", [*((family, False) for family in FAMILIES),
                                              ("qwen2_5_vl", True)])
def test_a_fixed_cache_samples_what_a_growing_one_does(family, compiled, compactions, graphs):
    """Greedily and from the same uniforms, through compactions, one cache for all: eight prompts
    of different lengths, then two with eight samples each, one of more than 512 tokens; in float64,
    since in float32 attention over another length rounds differently. The log-probs are the
    trainer's."""
    lens, longest = small_lens(random_family(family)), 26
    eight, two = random_batch(*EIGHT), random_batch(texts=(7, 530))
    lens.mllm.double()
    for batch in (eight, two):
        batch["pixel_values"] = batch["pixel_values"].double()
    fixed = FixedCache(lens.mllm, 16, 600, longest, compiled)
    for batch, G, drawn in (eight, 1, None), (two, 8, some_uniforms(16, longest)):
        eos = an_early_end(sample(lens, batch, G, longest, 255, drawn).completions)
        growing = sample(lens, batch, G, longest, eos, drawn)
        same_samples(growing, sample(lens, batch, G, longest, eos, drawn, fixed))
        sizes = {cache: [after for which, _, after in compactions if which is cache]
                 for cache in (GrowingCache, FixedCache)}
        assert all(sizes.values())                       # both were compacted
        assert set(sizes[FixedCache]) <= {8, 4, 2, 1}    # in few sizes
        compactions.clear()
    lengths = {len(row) for group in growing.completions for row in group}
    assert len(lengths) > 4
    if compiled:
        assert 0 < graphs.frame_count <= 8
    else:
        assert graphs.frame_count == 0
    packed = pack_groups(two["ids"], prompt_positions(lens.mllm, two), growing.completions, lens.M)
    lens.mllm.float()
    with torch.no_grad():
        out = lens(two["pixel_values"].float(), two["grid_thw"], packed,
                   lens.encode_pictures(two["sam_pixels"]), 0.8)
    T = packed.mask.shape[1]
    assert (growing.log_probs[:, :T] - out["log_probs"]).abs().max() < 2e-5
    assert (growing.log_probs[:, T:] == 0).all() and (growing.log_probs[:, 0] < 0).all()


def test_the_compiled_step_sees_weights_that_changed_in_place(graphs):
    """As train_rl.refresh changes them, and without another graph."""
    lens, longest, batch = small_lens(random_family("qwen2_5_vl")), 12, random_batch()
    fixed, uniforms = FixedCache(lens.mllm, 8, 64, longest), some_uniforms(8, longest)
    before = sample(lens, batch, 4, longest, END, uniforms, fixed)
    same_samples(before, sample(lens, batch, 4, longest, END, uniforms))
    made, g = graphs.frame_count, torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lens.mllm.model.language_model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=g))
    after = sample(lens, batch, 4, longest, END, uniforms, fixed)
    same_samples(after, sample(lens, batch, 4, longest, END, uniforms))
    assert (after.log_probs - before.log_probs).abs().max() > 0.01
    assert graphs.frame_count <= made + 2                # a compaction may come later or sooner


# Devices


@pytest.mark.parametrize("device, preset, gpus, local, expected", [
    ("auto", "tiny", 0, 2, "cpu"), ("auto", "3b", 0, 16, "cpu"), ("cpu", "tiny", 4, 2, "cpu"),
    ("cpu", "3b", 8, 16, "cpu"), ("auto", "3b", 16, 16, "cuda:1"), ("auto", "tiny", 2, 2, "cuda:1"),
    ("cuda", "3b", 4, 2, "cuda:1"), ("auto", "tiny", 1, 2, "fallback"),
    ("auto", "3b", 8, 16, "--nproc_per_node=8"), ("auto", "", 1, 2, "--nproc_per_node=1"),
    ("cuda", "tiny", 1, 2, "--nproc_per_node=1"), ("cuda", "tiny", 0, 1, "--device cpu"),
    ("cuda", "3b", 0, 2, "--device cpu"),
])
def test_devices(device, preset, gpus, local, expected, monkeypatch, capsys):
    """Only the tiny preset makes do with the CPU where GPUs are too few, and one process says so;
    else the error names what works."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    shared = SharedArgs(device=device, preset=preset)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        if expected.startswith("--"):
            with pytest.raises(data.LensError) as refused:
                choose_device(shared)
            message = str(refused.value)
            assert expected in message and "--device cpu" in message
            assert f"{gpus} GPU" in message
            # with no GPU at all, no number of processes works
            assert gpus or "--nproc_per_node" not in message
        else:
            found = choose_device(shared)
            assert str(found) == {"fallback": "cpu", "cuda:1": f"cuda:{rank}"}.get(expected,
                                                                                  expected)
    said = capsys.readouterr().out.splitlines()
    if expected == "fallback":
        assert len(said) == 1 and "2 processes, 1 GPU" in said[0] and "CPU" in said[0]
    else:
        assert not said


# Stage 1 by two processes with two loaders each: its answers, and SIGTERM

STEPS, BATCH = 16, 8


@pytest.fixture(scope="module")
def stage_1(world):
    return ["--data", world, "--steps", STEPS, "--batch", BATCH, "--micro-batch", 4, "--workers", 2,
            "--save-every", 100, "--max-completion", 40, "--context", "own"]


@pytest.fixture(scope="module")
def whole(stage_1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    script("align.py", *stage_1, "--output", folder, processes=2)
    return folder


def answer_lines(folder):
    """What a run keeps -> [(key, ids)], without the lines that were cut."""
    found = []
    for path in sorted(folder.glob("answers.*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                pass
    return found


def training_keys(world):
    stream = TrainingStream(read_records(world, ["shapes"], ["train"]), 42)
    return {f"{record['id']}/{text}" for record, text in map(stream.choose, range(STEPS * BATCH))}


def numbers(folder):
    times = ("seconds", "speed")
    return [{name: value for name, value in row.items() if not name.startswith(times)}
            for row in rows(folder)]


def test_sigterm_to_torchrun_with_loaders(stage_1, whole, tmp_path):
    """Two processes with two loaders each: the step is finished and saved, nothing but it is lost,
    and --resume gives the numbers of an uninterrupted run to the last bit, without another
    answer."""
    broken = tmp_path / "broken"
    start = [*TORCHRUN, "--nproc_per_node=2", "align.py", "--preset", "tiny"]
    kill_after(2, broken, *start, *stage_1, "--output", broken, number=signal.SIGTERM)
    done = len(rows(broken))
    assert 2 <= done < STEPS and not (broken / "lens.json").exists()
    assert [path.name for path in (broken / "checkpoints").glob("*")] == [f"step_{done:06d}"]
    answers = answer_lines(broken)
    script("align.py", *stage_1, "--output", broken, "--resume", processes=2)
    assert numbers(broken) == numbers(whole) and len(numbers(whole)) == STEPS
    assert answer_lines(broken) == answers
    for file in ("context.safetensors", "sam.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_each_answer_is_made_once_by_one_of_two(whole, world):
    files = sorted(whole.glob("answers.*.jsonl"))
    assert [re.sub(r"\.[0-9a-f]{8}\.", ".", file.name) for file in files] == [
        "answers.0.jsonl", "answers.1.jsonl"]
    keys = [key for key, _ in answer_lines(whole)]
    assert len(keys) == len(set(keys)) and set(keys) == training_keys(world)
    halves = [len(file.read_text().split()) for file in files]
    assert min(halves) > 0.4 * sum(halves)


def test_answers_are_those_of_generate_one_by_one(whole, world):
    shared = SharedArgs(**{**align.TINY, "max_completion": 40, "data": str(world)})
    lens, processor = build_lens(shared)
    collate = Collator(processor, "qwen2_5_vl", lens.sam_size, shared.max_prompt)
    made = dict(answer_lines(whole))
    stream, lengths = TrainingStream(read_records(world, ["shapes"], ["train"]), 42), set()
    for k in range(0, 40, 4):
        batch = collate([stream[k]])
        alone = generate(lens.mllm, batch, prompt_positions(lens.mllm, batch), 1, 40, lens.eos,
                         lens.forbidden)
        key, = batch["keys"]
        assert made[key] == alone.completions[0][0].tolist()
        lengths.add(len(made[key]))
    assert len(lengths) > 1


@pytest.fixture
def watched(monkeypatch):
    """-> list of what stage 1 does: the keys of every batch it answers, and "step"."""
    seen, real, step = [], align.generate, align.align_step

    def answered(mllm, batch, *args, **options):
        seen.append(batch["keys"])
        return real(mllm, batch, *args, **options)

    def stepped(*args):
        seen.append("step")
        return step(*args)
    monkeypatch.setattr(align, "generate", answered)
    monkeypatch.setattr(align, "align_step", stepped)
    return seen


def test_an_interrupted_pass_goes_on(stage_1, whole, world, inside, watched, tmp_path):
    """What two processes kept, the second killed in the middle of a line, the third of a line
    without an end: one process makes the rest before its first step, and nothing twice."""
    folder, expected = tmp_path / "run", dict(answer_lines(whole))
    folder.mkdir()
    for path, share in zip(sorted(whole.glob("answers.*.jsonl")), (3, 2)):
        text = path.read_text()
        (folder / path.name).write_text(text[:len(text) // share])
    kept = dict(answer_lines(folder))
    assert 10 < len(kept) < len(expected) - 5
    inside(align, *stage_1, "--output", folder, "--workers", 0)
    answered = [key for keys in watched if keys != "step" for key in keys]
    assert watched[-STEPS * 2:] == ["step"] * STEPS * 2          # two passes a step
    assert len(answered) == len(set(answered)) == len(expected) - len(kept)
    assert set(answered) == training_keys(world) - set(kept)
    lines = answer_lines(folder)
    assert len(lines) == len(expected) and dict(lines) == expected
    assert [row["loss"] for row in rows(folder)][:4] == pytest.approx(
        [row["loss"] for row in rows(whole)][:4], abs=1e-4)


def test_with_the_true_box_no_answer_is_made(stage_1, inside, watched, tmp_path):
    inside(align, *stage_1, "--output", tmp_path / "run", "--context", "true", "--steps", 1,
           "--workers", 0)
    assert watched == ["step", "step"] and not list((tmp_path / "run").glob("answers*"))


def test_the_largest_prompts_are_answered_first(tmp_path):
    """By the pixels of the picture, then by the expression; each text of an object once."""
    records = [{"id": name, "texts": texts, "size": size} for name, texts, size in
               (("small", ["a"], (10, 10)), ("large", ["a", "much longer"], (20, 20)),
                ("unknown", ["abc"], None))]
    found = TrainingStream(records, 0).rows(0, 60)
    assert [found.key(k) for k in range(len(found))] == ["large/1", "large/0", "small/0",
                                                         "unknown/0"]


# Pictures of any size


@pytest.fixture
def processor_of(tmp_path):
    """A processor whose own cap is so many pixels, with Qwen's patches -> what build_lens makes of
    it."""
    def call(own, *max_pixels):
        folder = tmp_path / "mllm"
        shutil.copytree(ROOT / "tests/tiny/mllm", folder, dirs_exist_ok=True)
        path = folder / "processor_config.json"
        config = json.loads(path.read_text())
        config["image_processor"] |= {"patch_size": 14, "size": {"longest_edge": own,
                                                                 "shortest_edge": 3136}}
        path.write_text(json.dumps(config))
        tiny = {**align.TINY, "mllm": str(folder)}
        shared = SharedArgs(**tiny, **dict(zip(("max_pixels",), max_pixels)))
        return build_lens(shared)[1], shared
    return call


def prompt_length(processor, shared, size):
    item = {"id": "x/0", "text": "the cup " * 40, "image": Image.new("RGB", size), "box": None,
            "mask": torch.zeros(1, 1).numpy() > 0, "ignore": torch.zeros(1, 1).numpy() > 0}
    batch = Collator(processor, "qwen2_5_vl", 128, shared.max_prompt)([item])
    return len(batch["ids"][0]), int(batch["grid_thw"].prod()) * 14 * 14


def test_a_large_picture_stays_within_the_prompt(processor_of):
    """Qwen's own cap is 12,845,056 pixels, 16,384 tokens of 28 x 28."""
    processor, shared = processor_of(12_845_056)
    assert shared.max_pixels == 1_000_000
    assert processor.image_processor.size["longest_edge"] == 1_000_000
    for size in (4000, 3000), (3000, 4000), (6000, 800):
        tokens, pixels = prompt_length(processor, shared, size)
        assert tokens < shared.max_prompt == 2048 and 900_000 < pixels <= 1_000_000
    # a small picture is as the processor's own
    assert prompt_length(processor, shared, (560, 560))[1] == 560 * 560


def test_the_cap_never_raises_the_processors_own(processor_of):
    processor, shared = processor_of(500_000)
    assert processor.image_processor.size["longest_edge"] == 500_000
    assert prompt_length(processor, shared, (4000, 3000))[1] <= 500_000


def test_without_a_cap_the_processors_own_holds(processor_of):
    processor, shared = processor_of(12_845_056, 0)
    assert processor.image_processor.size["longest_edge"] == 12_845_056
    with pytest.raises(data.LensError, match="the limit is 2048.*--max-prompt or .*--max-pixels"):
        prompt_length(processor, shared, (4000, 3000))


# One update: gradients reduced once, vital signs, speed


def four_groups(lens, args):
    """Of three random completions each -> passes of --micro-batch groups, the Samples."""
    grids, texts = ((1, 4, 6), (1, 6, 4), (1, 4, 4), (1, 6, 6)), (7, 11, 5, 9)
    batch, g = random_batch(grids, texts), torch.Generator().manual_seed(9)
    batch["masks"] = [torch.rand(40, 50, generator=g) > 0.6 for _ in grids]
    batch["ignores"] = [torch.zeros(40, 50) > 0 for _ in grids]
    batch["low_masks"], batch["low_weights"] = torch.rand(2, 4, SAM_SIDE // 4, SAM_SIDE // 4,
                                                          generator=g)
    batch["boxes"], batch["frames"] = [(10, 10, 30, 30)] * 4, [(128, 128)] * 4
    samples = sample(lens, batch, 3, 9, END, some_uniforms(12, 9))
    texts = [["none", f'[{{"bbox_2d": [{20 + 9 * b}, 20, 80, 100]}}]', "[]"] for b in range(4)]
    positions = prompt_positions(lens.mllm, batch)
    passes = train_rl.make_groups(lens, None, batch, positions, samples, texts, args)
    return passes, samples


def sharded_lens(mesh):
    lens = small_lens(random_family("qwen2_5_vl"))
    frozen = align.set_trainable(lens.train(), "rl")
    return lens, lambda: align.shard(lens, mesh, "fp32", frozen)


@pytest.fixture
def reductions(monkeypatch):
    seen, real = [], _fsdp_param_group.foreach_reduce

    def counted(params, *args, **options):
        seen.append(len(params))
        return real(params, *args, **options)
    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", counted)
    return seen


def test_gradients_reduced_once_are_those_reduced_every_pass(mesh, reductions, monkeypatch):
    """Four passes of one group, twice, so that the flag of the last pass does not stay: every
    gradient within fp32 rounding, a quarter of the reductions."""
    found, counts = [], []
    for once in (False, True):
        args = RLArgs(batch=4, micro_batch=1, group_size=3, temperature=0.8, beta=0.0, alpha=1.5,
                      updates_per_batch=2, reduce_once=once)
        lens, shard = sharded_lens(mesh)
        passes, _ = four_groups(lens, args)
        shard()
        grads = []

        def no_update(lens, *given):
            grads.append({name: p.grad.full_tensor().clone() for name, p in lens.named_parameters()
                          if p.grad is not None})
            lens.zero_grad()
            return 0.0
        monkeypatch.setattr(train_rl, "apply_update", no_update)
        train_rl.train_on(lens, None, passes, 1.0, args, 1, 0)
        found.append(grads)
        counts.append(len(reductions))
        reductions.clear()
    assert len(passes) == 4 and counts[0] == 4 * counts[1] > 0
    for every, once in zip(*found):
        assert set(every) == set(once) and len(every) > 60
        for name, expected in every.items():
            scale = expected.abs().max().clamp(min=1e-3)
            assert (once[name] - expected).abs().max() / scale < 1e-5, name
    for name, grad in found[0][0].items():               # nothing is left of the first update
        assert torch.allclose(grad, found[0][1][name], atol=1e-5, rtol=1e-3), name


def test_vital_signs_and_speed_by_hand(mesh, monkeypatch):
    args = RLArgs(batch=4, micro_batch=2, group_size=3, temperature=0.8, beta=0.04)
    lens, shard = sharded_lens(mesh)
    passes, samples = four_groups(lens, args)
    shard()
    groups = passes[1]                                   # prompts 2 and 3
    out = lens(groups.batch["pixel_values"], groups.batch["grid_thw"], groups.packed,
               groups.features, args.temperature)
    scores = train_rl.score(out, groups, args)
    signs = {name: value.item() for name, value in
             train_rl.vital_signs(out, groups, scores).items()}
    assert signs["sampler_gap"] < 1e-5                   # sampled by these very weights
    ended = [done for group in samples.finished[2:] for done in group]
    assert 0 < sum(ended) < 6 and signs["cut"] == pytest.approx(1 - sum(ended) / 6)
    by_hand = torch.tensor([torch.std(row, correction=0) for row in scores.reward]).mean()
    assert signs["reward_spread"] == pytest.approx(by_hand.item(), abs=1e-6) and by_hand > 0.01
    # the sampler 0.5 off on one token of the longest of six: 0.5 / its tokens / 6; off where there
    # is none: nothing
    lengths = [len(row) for group in samples.completions[2:] for row in group]
    wrong = groups.sampler_log_probs.clone()
    wrong[lengths.index(max(lengths)), 0] -= 0.5
    wrong[lengths.index(min(lengths)), -1] = 7 if min(lengths) < wrong.shape[1] else wrong[0, -1]
    gap = train_rl.vital_signs(out, replace(groups, sampler_log_probs=wrong), scores)["sampler_gap"]
    assert min(lengths) < wrong.shape[1]
    assert gap.item() == pytest.approx(0.5 / max(lengths) / 6, rel=1e-3)

    row = train_rl.speed(lens, passes, samples, 2.0, 4.0, args, 1)
    tokens = sum(len(ids) for group in samples.completions for ids in group)
    trained = sum(part.packed.ids.numel() for part in passes)
    assert row["speed_sampled"] == round(tokens / 2)
    assert row["speed_trained"] == round(trained / 4)
    assert not {"speed_mfu", "gpu_memory"} & set(row)
    # a model so small has no TFLOPs: an hour of updates in a nanosecond
    small = random_family("qwen2_5_vl")
    layers = sum(p.numel() for p in small.model.language_model.layers.parameters())
    fast = train_rl.speed(lens, passes, samples, 2.0, 1e-6, replace(args, gpu_tflops=100.0), 1)
    # 6 and 2 for the reference; the head for completion tokens alone
    flops = 8 * (layers * trained + small.lm_head.weight.numel() * tokens) / 1e-6
    assert fast["speed_tflops"] == pytest.approx(flops / 1e12, rel=1e-2)
    assert fast["speed_mfu"] == pytest.approx(flops / 100e12, rel=1e-2)


# Stage 2 by two processes and by one: looks at val, the best model, the metrics

VALUES = ("val_giou", "val_box_iou", "val_acc50")


@pytest.fixture(scope="module")
def stage_2(world, whole):
    """5 rows of val do not split over two processes; rewards are IoU squared, but what is looked
    at is not."""
    return ["--data", world, "--init", whole, "--steps", 2, "--batch", 4, "--micro-batch", 1,
            "--group-size", 2, "--max-completion", 64, "--val-every", 2, "--val-rows", 5,
            "--iou-power", 2, "--save-every", 1]


@pytest.fixture(scope="module")
def by_two(stage_2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    script("train_rl.py", *stage_2, "--output", folder, "--reduce-once", processes=2)
    return folder


def best_row(folder):
    return max((row for row in rows(folder) if "val_giou" in row), key=lambda row: row["val_giou"])


def test_looks_at_val_are_those_of_evaluate(stage_2, by_two, world, inside, tmp_path):
    """OUTPUT/best under evaluate.py gives the numbers of its row; every second step has them."""
    assert [all(name in row for name in VALUES) for row in rows(by_two)] == [False, True]
    inside(evaluate, "--checkpoint", by_two / "best", "--data", world, "--splits", "val", "--limit",
           5, "--json", tmp_path / "val.json")
    found = json.loads((tmp_path / "val.json").read_text())["val"]
    best = best_row(by_two)
    assert found["n"] == 5 and found["box_iou"] > 0.1 and found["giou"] > 0.02
    for name in VALUES:
        assert best[name] == pytest.approx(found[name.removeprefix("val_")], abs=1e-4), name


def test_one_process_is_like_two_that_reduce_once(stage_2, by_two, inside, tmp_path):
    """The same rows of val, the same updates, and metrics that show a healthy run."""
    one = tmp_path / "one"
    inside(train_rl, *stage_2, "--output", one)
    for a, b in zip(rows(one), rows(by_two), strict=True):
        assert set(a) == set(b)
        for name in ("loss", "grad_norm", "reward", "cut", "reward_spread", *VALUES):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), abs=2e-4), name
        for row in a, b:
            assert 0 <= row["sampler_gap"] < 1e-5
            assert row["speed_sampled"] > 0 and row["speed_trained"] > 0
            assert row["seconds"] >= row["seconds_sampling"] + row["seconds_refresh"] > 0
            assert not {"speed_mfu", "gpu_memory"} & set(row)
    assert best_row(one)["step"] == best_row(by_two)["step"]


@pytest.mark.parametrize("of_old, rewritten", [(0.999, False), (-0.5, True)])
def test_the_best_survives_resuming(of_old, rewritten, stage_2, by_two, inside, tmp_path):
    """Gone on from step 1, whose look at val was better, or worse, than that at step 2 will be."""
    folder = tmp_path / "run"
    shutil.copytree(by_two, folder)
    shutil.rmtree(folder / "checkpoints/step_000002")
    of_run = rows(folder)
    of_run[0]["val_giou"] = of_old
    lines = [json.dumps(row) + "\n" for row in of_run]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "best/context.safetensors").write_bytes(b"of step 1")
    inside(train_rl, *stage_2, "--output", folder, "--resume")
    context = (folder / "best/context.safetensors").read_bytes()
    assert len(rows(folder)) == 2 and rows(folder)[0]["val_giou"] == of_old
    if rewritten:
        assert context == (folder / "context.safetensors").read_bytes()
    else:
        assert context == b"of step 1"


def test_a_val_of_boxes_alone_has_a_best_model_too(stage_2, inside, tmp_path, monkeypatch):
    """Rows without a mask are "ignore" all over. No look has a mask IoU then, and the box IoU
    decides: the first look is the best one, and the second if its boxes are better."""
    real, exported = train_rl.validate, []
    boxes_alone = lambda rows: [{**row, "ignore": row["ignore"] | True} for row in rows]
    monkeypatch.setattr(train_rl, "validate", lambda lens, sampler, fixed, rows, *more:
                        real(lens, sampler, fixed, boxes_alone(rows), *more))
    monkeypatch.setattr(train_rl, "export", lambda folder, *_: exported.append(folder.name))
    inside(train_rl, *stage_2, "--val-every", 1, "--output", tmp_path / "run")
    looks = rows(tmp_path / "run")
    assert not any("val_giou" in row for row in looks)
    better = looks[1]["val_box_iou"] > looks[0]["val_box_iou"] > 0
    assert exported == ["best"] * (1 + better) + ["run"]


# Weights as the files have them


def mapped_at(tensor, file):
    """Does the tensor's memory lie in the file's mapping?"""
    for line in open("/proc/self/maps"):
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name.strip() == str(file)
    return False


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "fp32"), (torch.bfloat16, "bf16"),
                                              (torch.float32, "fp32")])
def test_three_models_from_one_file(dtype, precision, mesh, tmp_path, monkeypatch):
    """The file's weights are mapped, not read; then policy (fp32 masters), sampler and reference
    (compute precision) hold them each for itself."""
    file, real, of_files = tmp_path / "mllm/model.safetensors", model.load_mllm, []
    tiny = AutoModelForImageTextToText.from_pretrained(ROOT / "tests/tiny/mllm", dtype=dtype)
    tiny.save_pretrained(file.parent)
    AutoProcessor.from_pretrained(ROOT / "tests/tiny/mllm").save_pretrained(file.parent)

    def load(*args):
        mllm, processor = real(*args)
        of_files.extend((name, p.dtype, mapped_at(p, file)) for name, p in mllm.named_parameters())
        return mllm, processor
    monkeypatch.setattr(model, "load_mllm", load)
    shared = SharedArgs(**{**align.TINY, "mllm": str(file.parent), "precision": precision})
    args = RLArgs(batch=2, micro_batch=2, init="none")
    lens, reference, sampler, _ = train_rl.load_models(shared, args, mesh, torch.device("cpu"))
    assert len(of_files) > 50 and {found for _, found, _ in of_files} == {dtype}
    assert sum(mapped for *_, mapped in of_files) > 0.9 * len(of_files)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    stored = dict(tiny.named_parameters())

    def local(parameter):
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter
    three = {"policy": lens.mllm, "sampler": sampler, "reference": reference.mllm}
    three = {who: {name: local(p.detach()) for name, p in mllm.named_parameters()}
             for who, mllm in three.items()}
    for who, parameters in three.items():
        assert set(parameters) == set(stored)
        for name, parameter in parameters.items():
            assert parameter.dtype == (torch.float32 if who == "policy" else compute), (who, name)
            assert torch.equal(parameter, stored[name].to(compute).to(parameter.dtype)
                               if who != "policy" else stored[name].float()), (who, name)
            assert not mapped_at(parameter, file), (who, name)
    for value, parameters in enumerate(three.values(), 2):
        for parameter in parameters.values():
            parameter.fill_(value)
    for value, parameters in enumerate(three.values(), 2):
        assert all((parameter == value).all() for parameter in parameters.values())
    for name, parameter in AutoModelForImageTextToText.from_pretrained(
            file.parent, dtype="auto").named_parameters():
        assert torch.equal(parameter, stored[name])      # the file is as it was
    train_rl.refresh(sampler, lens)
    assert all((parameter == 2).all() for parameter in sampler.parameters())


# A process that fails ends, with its loaders

FAILS = """
import torch
from torch.utils.data import Dataset
from align import run
from data import load_batches

class Numbers(Dataset):
    def __len__(self):
        return 400
    def __getitem__(self, k):
        if k == 20:
            raise RuntimeError("damaged")
        return torch.tensor(k)

def main():
    batches = [range(i, i + 4) for i in range(0, 400, 4)]
    for batch in load_batches(Numbers(), batches, torch.stack, 2, torch.device("cpu")):
        pass
run(main)
"""


def test_a_run_that_fails_does_not_wait_for_its_loaders(tmp_path):
    """They ignore SIGTERM, by which Python would end them before it ends itself."""
    (tmp_path / "fails.py").write_text(FAILS)
    done = subprocess.run([sys.executable, tmp_path / "fails.py"], cwd=ROOT, env=ENVIRONMENT,
                          timeout=100, capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: damaged" in done.stderr.splitlines()[-3:]
