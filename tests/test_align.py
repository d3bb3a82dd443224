"""Stage 1, and what both stages share: settings, processes, interrupted runs, bad input."""
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import (ENVIRONMENT, ROOT, TORCHRUN, call, contents, largest_move, numbers,
                      random_lens, refused, rows, run)
from torch.distributed.fsdp import fully_shard
from training_worker import whole_batch

import align
import evaluate
import rewards
import train_rl
from align import SharedArgs, TrainArgs, learning_rate, plan_steps, segmentation_loss
from data import LensError, fingerprint, read_records
from model import context_positions, prefill, prompt_positions, set_trainable

# --- The loss and the step of stage 1 -------------------------------------------------------------

def test_segmentation_loss_by_hand():
    """Two pixels with logits 0 and ln 3, so p = 1/2 and 3/4; ground truth 1 and 0. BCE: -ln(1/2) =
    0.6931 and -ln(1/4) = 1.3863, mean 1.0397. Dice: 1 - (2 * 1/2 + 1) / (5/4 + 1 + 1).

    Then with a third pixel that is always ignored, in four masks:
      only that one is ignored:    as before
      half of the second one, too: BCE (0.6931 + 1.3863 / 2) / 1.5, dice 1 - 2 / (1.5 + 0.375 + 1)
      half of the first one and all of the second: BCE 0.34657 / 1 (half a cell weighs less than a
                                   whole one, so the divisor is 1), dice 1 - 1.5 / 1.75
      all are ignored:             0
    An ignored pixel gets no gradient."""
    mask_logits = torch.tensor([[[0.0, 1.0986123, 5.0]]]).repeat(4, 1, 1).requires_grad_()
    gt = torch.tensor([[[1.0, 0.0, 0.3]]]).repeat(4, 1, 1)
    weights = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 0.5, 0.0]], [[0.5, 0.0, 0.0]],
                            [[0.0, 0.0, 0.0]]])
    expected = [1.0397208 + 1 - 2 / 3.25, 0.9241962 + 1 - 2 / 2.875, 0.3465736 + 1 - 1.5 / 1.75,
                0.0]
    plain = segmentation_loss(mask_logits[:1, :, :2], gt[:1, :, :2])
    assert plain.tolist() == pytest.approx(expected[:1], abs=1e-6)
    loss = segmentation_loss(mask_logits, gt, weights)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6) and loss[3] == 0
    loss.sum().backward()
    grad = mask_logits.grad
    assert (grad[weights == 0] == 0).all() and (grad[weights > 0] != 0).all()


FORCED = """<answer>
```json
[
  {"bbox_2d": [20, 32, 60, 96], "label": "the cup"}
]
```
</answer>"""
RELEASED = "<|object_ref_start|>the cup.<|object_ref_end|><|box_start|>(20,32),(60,96)<|box_end|>"


@pytest.mark.parametrize("prompt, opening, text", [
    ("paper", "", FORCED), ("released", "", RELEASED), ("released-cot", "", RELEASED),
    ("paper", "<think>\n", f"</think>\n{FORCED}")])
def test_forced_completions(prompt, opening, text):
    """The box (10, 10, 30, 30) of an image of 50 x 40, in an MLLM frame of 100 x 128; then the end
    token. If the prompt has opened a think block, the completion ends it first."""
    def tokenizer(text):
        return SimpleNamespace(input_ids=list(text.encode()))

    lens = SimpleNamespace(prompt=prompt, opening=opening, eos=7)
    batch = {"gt_boxes": [(10, 10, 30, 30)], "gt_masks": [torch.zeros(40, 50)],
             "mllm_frames": [(100, 128)], "expressions": ["the cup"]}
    completion, = align.forced_completions(lens, batch, tokenizer)
    assert completion.tolist() == [*text.encode(), 7]


def test_a_step_of_stage_1_by_hand(float64):
    """Loss and IoU are those of the masks; in the second row all is ignored. One micro-batch of
    four rows gives the gradients of four of one."""
    lens, (batch, completions, *_) = float64(random_lens()), whole_batch(torch.float64)
    set_trainable(lens, "align")
    completions = [group[0] for group in completions]
    batch["low_res_weights"][1] = 0
    with torch.no_grad():
        positions = context_positions(prompt_positions(lens.mllm, batch), "paper")
        logits = lens.align_forward(prefill(lens.mllm, batch, positions, completions),
                                    lens.encode_images(batch["sam_pixels"]))
    gt, weights = batch["low_res_masks"], batch["low_res_weights"]
    losses = segmentation_loss(logits, gt, weights)
    ious = [rewards.mask_iou(logits[b] > 0, gt[b] > 0.5, weights[b] < 0.5) for b in range(4)]
    sums, grads = [], []
    for size in 4, 1:
        total = 0
        for i in range(0, 4, size):
            part = range(i, i + size)
            total = total + align.align_step(lens, align.select(batch, part),
                                             [completions[j] for j in part], 1, TrainArgs(batch=4))
        sums.append(total.tolist())
        grads.append([p.grad for p in lens.parameters() if p.requires_grad])
        lens.zero_grad()
    assert losses[1] == 0 and losses[0] > 0
    assert sums[0] == pytest.approx([losses.sum().item(), sum(ious)])
    assert sums[1] == pytest.approx(sums[0])
    assert all((a - b).abs().max() < 1e-8 for a, b in zip(*grads, strict=True))
    with torch.enable_grad():  # the gradient is that of the mean over the batch, of all processes
        align.align_step(lens, batch, completions, 2, TrainArgs(batch=16))
    assert (lens.queries.grad - grads[0][0] / 2).abs().max() < 1e-8 < grads[0][0].abs().max()


def test_learning_rate_by_hand():
    linear = [learning_rate(s, 12, 2, "linear") for s in (0, 1, 2, 7, 12)]
    assert linear == [0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = [1.0, 0.5 + 0.5 ** 0.5 / 2, 0.5, 0.0]
    assert [learning_rate(s, 8, 0, "cosine") for s in (0, 2, 4, 8)] == pytest.approx(cosine)


def test_plan_steps():
    def plan(world, objects, **changes):
        return plan_steps(TrainArgs(**{"batch": 64, "epochs": 16, **changes}), world, objects)
    assert plan(16, 126_908) == 31_727  # 16 * 126,908 / 64
    assert plan(16, 126_908, steps=3) == 3 and plan(1, 3, epochs=1) == 1
    with pytest.raises(LensError, match="--batch 64 .* 3 processes .*: take a multiple of 3"):
        plan(3, 1000)
    with pytest.raises(LensError, match="2 processes in micro-batches of 3: .* multiple of 6"):
        plan(2, 1000, micro_batch=3)


# --- Settings -------------------------------------------------------------------------------------

def parsed(script, *flags):
    """-> {name: value} of all settings, and train_rl's own class or whichever it is"""
    own = {align: TrainArgs, train_rl: train_rl.RLArgs, evaluate: evaluate.EvaluateArgs}[script]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *map(str, flags)])
        parts = align.parse_settings([SharedArgs, own], script.PRESETS, "")
    return {name: value for part in parts for name, value in vars(part).items()}


def within(part, whole):
    return {name: whole[name] for name in part} == part


PAPER = {"prompt": "paper", "mask_pass": "paper", "sam_tokens": "all", "max_pixels": 1_000_000}
RELEASED_MODEL = {"prompt": "released", "mask_pass": "released", "sam_tokens": "one",
                  "max_pixels": 1_000_000}
RELEASED_REWARDS = {"iou_power": 2.0, "deviation": "sample", "lambda_format": 0.0}
PAPER_REWARDS = {"iou_power": 1.0, "deviation": "population", "lambda_format": 1.0}


def test_each_source_of_settings_wins_over_those_before_it(tmp_path):
    """Class, preset, profile, run, flags."""
    settings = parsed(train_rl, "--init", "none")
    assert within({**PAPER, **PAPER_REWARDS, "num_queries": 64, "batch": 64, "lr": 3e-6}, settings)
    for preset, name in ("2b", "Qwen/Qwen2-VL-2B-Instruct"), ("3b", "Qwen/Qwen2.5-VL-3B-Instruct"):
        assert within({"mllm": name, "sam": "weights/sam2_hiera_large.pt", "batch": 128},
                      parsed(align, "--preset", preset))
    tiny = ("--preset", "tiny", "--init")
    assert within({"num_queries": 8, "mllm": "tests/tiny/mllm", "batch": 12, "lr": 0.5},
                  parsed(train_rl, *tiny, "none", "--lr", 0.5))
    settings = parsed(train_rl, *tiny, "none", "--profile", "released", "--beta", 0.5)
    assert within({**RELEASED_MODEL, **RELEASED_REWARDS, "beta": 0.5, "batch": 12}, settings)
    settings = parsed(train_rl, *tiny, "none", "--profile", "released", "--mask-pass", "paper",
                      "--iou-power", 1)
    assert within({"mask_pass": "paper", "prompt": "released", "iou_power": 1.0}, settings)

    run = {"preset": "3b", "profile": "released", "prompt": "released-cot", "mask_pass": "paper",
           "sam_tokens": "all", "connector": "mlp", "num_queries": 5, "mllm": "my/mllm",
           "sam": "my/sam", "max_pixels": 5, "seed": 7, "limit": 3}
    (tmp_path / "lens.json").write_text(json.dumps(run))
    inherited = {name: run[name] for name in align.INHERITED}
    assert set(inherited) == set(run) - {"preset", "seed", "limit"}
    settings = parsed(train_rl, *tiny, tmp_path)  # with the model come its profile's rewards
    assert within({**inherited, **RELEASED_REWARDS, "seed": 42, "limit": 0, "batch": 12}, settings)
    settings = parsed(train_rl, *tiny, tmp_path, "--prompt", "paper", "--lambda-format", 1)
    assert within({"prompt": "paper", "lambda_format": 1.0, "mllm": "my/mllm"}, settings)
    settings = parsed(evaluate, "--checkpoint", tmp_path, "--mask-pass", "released")
    assert within({**run, "mask_pass": "released", "limit": 0}, settings)


@pytest.mark.parametrize("script", [align, train_rl, evaluate])
def test_help_explains_every_flag(script):
    said = refused(f"{script.__name__}.py", "--help")
    assert script.__doc__.splitlines()[0] in " ".join(said.split())
    own = {align: TrainArgs, train_rl: train_rl.RLArgs, evaluate: evaluate.EvaluateArgs}[script]
    for field in [*fields(SharedArgs), *fields(own)]:
        assert f"--{field.name}" in said
        assert field.metadata["help"].split()[0] in said and len(field.metadata["help"]) > 8


# --- Processes and devices ------------------------------------------------------------------------

@pytest.mark.parametrize("preset, gpus, local, expected", [
    ("tiny", 0, 2, "cpu"), ("3b", 0, 16, "cpu"), ("3b", 16, 16, "cuda:1"), ("tiny", 2, 2, "cuda:1"),
    ("tiny", 1, 2, "cpu"), ("3b", 8, 16, "--nproc_per_node=8"), ("", 1, 2, "--nproc_per_node=1")])
def test_devices(preset, gpus, local, expected, monkeypatch):
    """The second process of a machine. Only the tiny preset takes the CPU if GPUs are too few;
    otherwise the error says what works."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("LOCAL_RANK", "1")
    shared = SharedArgs(preset=preset)
    if not expected.startswith("--"):
        assert str(align.choose_device(shared)) == expected
    else:
        with pytest.raises(LensError, match=f"{gpus} GPUs.*{expected}.*CUDA_VISIBLE_DEVICES="):
            align.choose_device(shared)


# --- A run that is interrupted, and goes on -------------------------------------------------------

def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module", params=["align.py", "train_rl.py"])
def whole(request, world, aligned, tmp_path_factory):
    """A run of either stage that nothing interrupts."""
    script, folder = request.param, tmp_path_factory.mktemp("runs") / "whole"
    flags, steps, stage = ["--data", world, "--batch", 2, "--micro-batch", 2], 5, 1
    if script == "train_rl.py":
        steps, stage = 3, 2
        flags += ["--init", aligned, "--group-size", 2, "--updates-per-batch", 2,
                  "--max-completion", 32]
    flags += ["--steps", steps, "--save-every", 2]
    assert f"Stage {stage} is done: {folder}" in call(script, *flags, "--output", folder)
    return SimpleNamespace(script=script, flags=flags, folder=folder, steps=steps)


class Killed(Exception):
    pass


def interrupt(monkeypatch, step, action):
    """Do something within a step, when its line has been written and nothing else of it."""
    write = align.Metrics.write

    def write_and_act(self, row, show):
        write(self, row, show)
        if row["step"] == step:
            action()
    monkeypatch.setattr(align.Metrics, "write", write_and_act)


def like_uninterrupted(folder, whole):
    """--resume alone, which knows all settings, makes every number but the times and every weight
    what they would have been, to the last bit."""
    call(whole.script, "--output", folder, "--resume")
    assert numbers(folder) == numbers(whole.folder) and len(rows(folder)) == whole.steps
    names = [name for name in contents(whole.folder) if name.endswith("safetensors")]
    assert len(names) == (2 if whole.script == "align.py" else 3)
    for name in names:
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_killed_and_resumed(whole, monkeypatch, tmp_path):
    """Killed in the third step. What lies on the disk is left, half a checkpoint among it. The last
    two checkpoints are kept."""
    folder = tmp_path / "run"

    def kill():
        (folder / "checkpoints/building_000003").mkdir()
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 3, kill)
        call(whole.script, *whole.flags, "--output", folder)
    assert checkpoints(folder) == ["building_000003", "step_000002"]
    assert len(rows(folder)) == 3 and not (folder / "lens.json").exists()
    like_uninterrupted(folder, whole)
    last = ["step_000004", "step_000005"] if whole.steps == 5 else ["step_000002", "step_000003"]
    assert checkpoints(folder) == last == checkpoints(whole.folder)


def test_stopped_by_a_signal_and_resumed(whole, monkeypatch, tmp_path):
    """What schedulers send as a warning: the step is finished and saved."""
    folder = tmp_path / "run"
    number = signal.SIGTERM if whole.script == "align.py" else signal.SIGUSR1
    with monkeypatch.context() as patch:
        interrupt(patch, 1, lambda: os.kill(os.getpid(), number))
        said = call(whole.script, *whole.flags, "--save-every", 100, "--output", folder)
    assert "stopped by a signal after step 1" in said
    assert checkpoints(folder) == ["step_000001"] and len(rows(folder)) == 1
    assert not (folder / "lens.json").exists()
    like_uninterrupted(folder, whole)


def test_sigterm_to_torchrun_with_loaders(world, tmp_path):
    """Two processes with two loaders each, which receive the signal too: the step is finished and
    saved, and nothing hangs."""
    process = subprocess.Popen(
        [*map(str, [*TORCHRUN, "--nproc_per_node=2", "align.py", "--preset", "tiny", "--data",
                    world, "--steps", 16, "--batch", 4, "--micro-batch", 2, "--workers", 2,
                    "--output", tmp_path])],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 200
    while time.time() < until and process.poll() is None:
        if (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=100)
    steps = len(rows(tmp_path))
    assert 2 <= steps < 16 and not (tmp_path / "lens.json").exists()
    assert checkpoints(tmp_path) == [f"step_{steps:06d}"]


def test_resuming_at_a_saved_step_writes_the_finished_run(whole, tmp_path):
    """From the last checkpoint, bit for bit what the run itself has written; from the one before
    it, an earlier model. Nothing else in the folder changes."""
    before, models = contents(whole.folder), []
    for steps in whole.steps, int(checkpoints(whole.folder)[0][-6:]):
        folder = tmp_path / f"{steps} steps"
        shutil.copytree(whole.folder, folder)
        shutil.rmtree(folder / "mllm", ignore_errors=True)
        for file in ("context.safetensors", "sam.safetensors", "lens.json"):
            (folder / file).unlink()
        if steps < whole.steps:
            shutil.rmtree(folder / f"checkpoints/step_{whole.steps:06d}")
        call(whole.script, "--output", folder, "--resume", "--steps", steps)
        assert len(rows(folder)) == steps
        models.append(contents(folder))
    assert models[0].keys() == before.keys()
    assert [name for name in before if models[0][name] != before[name]] == ["settings.json"]
    assert models[1]["lens.json"] == before["lens.json"]
    assert models[1]["context.safetensors"] != before["context.safetensors"]


def test_a_resumed_run_keeps_its_settings_unless_flags_change_them(world, tmp_path):
    """Two steps, and on to the fourth. The learning rate is the one that was asked for last."""
    start = tmp_path / "start"
    call("align.py", "--data", world, "--output", start, "--steps", 2, "--batch", 4,
         "--micro-batch", 2, "--lr", 1e-3, "--warmup", 0, "--max-completion", 60)
    before = json.loads((start / "settings.json").read_text())
    for name, flags in (("same", ()), ("still", ("--lr", 1e-12))):
        folder = tmp_path / name
        shutil.copytree(start, folder)
        call("align.py", "--output", folder, "--resume", "--steps", 4, *flags)
        settings = json.loads((folder / "settings.json").read_text())
        changed = {key for key in settings if settings[key] != before[key]}
        assert changed == {"output", "resume", "steps", *(["lr"] if flags else [])}
        shares = [0.5, 0.5 + math.cos(math.radians(135)) / 2]  # (1 + cos 90) / 2, (1 + cos 135) / 2
        assert [row["lr"] / settings["lr"] for row in rows(folder)[2:]] == pytest.approx(shares)
        assert numbers(folder)[:2] == numbers(start)
        moved = largest_move(start, folder, "context.safetensors")
        assert moved < 1e-9 if flags else 1e-4 < moved < 0.01


def test_a_run_resumes_only_on_its_own_data(world, aligned, tmp_path):
    """The fingerprint sees a changed expression, box or order, but not where the folder lies."""
    records = read_records(world, ["shapes"], ["train"])
    seen = {fingerprint(records), fingerprint(records[::-1]), fingerprint(records[:-1]),
            fingerprint([{**records[0], "expressions": ["x"]}, *records[1:]]),
            fingerprint([{**records[0], "gt_box": (1, 2, 3, 4)}, *records[1:]])}
    assert len(seen) == 5
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(aligned, run)
    shutil.copytree(world, moved)
    said = refused("align.py", "--output", run, "--resume", "--steps", 3, "--limit", 10)
    assert f"{run} was trained on other data" in said and "another --output" in said
    assert len(rows(run)) == 2
    call("align.py", "--output", run, "--resume", "--steps", 3, "--data", moved)
    assert len(rows(run)) == 3


# --- What stops a run -----------------------------------------------------------------------------

def test_only_a_run_that_saved_something_is_in_the_way(world, aligned, mesh, tmp_path):
    """A run that ended before its first checkpoint is started again; a checkpoint or a finished run
    stays. Every process must see the folder."""
    records = read_records(world, ["shapes"], ["train"])

    def open_output(folder, rank=0):
        args = TrainArgs(output=str(folder))
        return align.open_output(SharedArgs(), args, records, rank)
    (tmp_path / "metrics.jsonl").write_text("")
    assert open_output(tmp_path) == tmp_path
    assert json.loads((tmp_path / "settings.json").read_text())["lr"] == 3e-5
    (tmp_path / "checkpoints/step_000001").mkdir(parents=True)
    for folder in tmp_path, aligned:
        with pytest.raises(LensError, match=f"{folder} holds a run already.*--resume.*--output"):
            open_output(folder)
    (tmp_path / "file").write_text("")
    for folder, rank in (tmp_path / "file", 0), (tmp_path / "on another machine", 1):
        with pytest.raises(LensError, match=f"--output {folder}: this process cannot use it"):
            open_output(folder, rank)


@pytest.mark.parametrize("loss, gradient", [(0.5, 2.0), (math.nan, 1.0), (0.5, math.inf),
                                            (0.5, math.nan)])
def test_an_update_by_hand(loss, gradient, mesh):
    """The gradient is (2, 2) and 2 for the bias, its norm 12 ** 0.5. AdamW's first step moves every
    weight by the learning rate, here 0.25 of 0.1. A number that is not finite moves nothing."""
    layer = fully_shard(torch.nn.Linear(2, 1), mesh=mesh)
    before = layer.weight.full_tensor().clone()
    args = TrainArgs(output="my/run")
    optimizer = align.make_optimizer([{"params": layer.parameters(), "peak_lr": 0.1}], args,
                                     torch.device("cpu"))
    (layer(torch.ones(1, 2)).sum() * gradient).backward()
    if math.isfinite(loss * gradient):
        norm = align.apply_update(layer, optimizer, 0.25, args, loss, 7)
        assert norm == pytest.approx(12 ** 0.5) and layer.weight.grad is None
        assert (layer.weight.full_tensor() - before).tolist() == [[pytest.approx(-0.025)] * 2]
    else:
        with pytest.raises(LensError, match="^step 8: the loss is .*my/run/checkpoints"):
            align.apply_update(layer, optimizer, 0.25, args, loss, 7)
        assert torch.equal(layer.weight.full_tensor(), before)


def test_a_loss_of_nan_stops_before_the_update(world, tmp_path):
    """A learning rate far too large; the last checkpoint is still good."""
    said = refused("align.py", "--data", world, "--output", tmp_path, "--steps", 6, "--batch", 2,
                   "--micro-batch", 2, "--save-every", 1, "--lr", 1e30, "--warmup", 0)
    for part in ("nan", "stopped before the update", f"{tmp_path}/checkpoints", "--resume"):
        assert part in said
    assert checkpoints(tmp_path) and not (tmp_path / "lens.json").exists()


def test_a_checkpoint_that_cannot_be_saved_or_loaded(aligned, tmp_path):
    """A disk takes no file above a megabyte; another architecture; a damaged file."""
    folder = tmp_path / "run"
    shutil.copytree(aligned, folder)
    resume = ("align.py", "--output", folder, "--resume", "--steps", 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, before[1]))
        said = refused(*resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search("step_000003 could not be saved; is the disk full.*File too large", said)
    assert "step_000003" not in checkpoints(folder)
    assert "step_000002 does not fit this model" in refused(*resume, "--num-queries", 4)
    damaged = folder / "checkpoints/step_000002/.metadata"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert "it is damaged: delete this folder and resume again" in refused(*resume)


@pytest.mark.parametrize("script, flags, parts", [
    ("train_rl.py", ("--learning-rat", 1), ["--learning-rat"]),
    ("train_rl.py", ("--group-size", 1), ["--group-size must be at least 2, not 1"]),
    ("train_rl.py", ("--temperature", 0), ["--temperature"]),
    ("train_rl.py", ("--clip-eps", 1), ["--clip-eps must be between 0 and 1"]),
    ("train_rl.py", ("--beta", -1), ["--beta must be at least 0"]),
    ("train_rl.py", ("--batch", 0), ["--batch must be at least 1"]),
    ("train_rl.py", ("--resume",), ["--resume: no checkpoint in", "run/checkpoints"]),
    ("train_rl.py", ("--init", "nowhere"), ["nowhere", "lens.json is missing", "align.py"]),
    ("align.py", ("--resume",), ["--resume: no checkpoint in", "run/checkpoints"]),
    ("align.py", ("--batch", 3, "--micro-batch", 2), ["--batch 3", "multiple of 2"]),
    ("align.py", ("--lr", 0), ["--lr must be positive"]),
    ("align.py", ("--connector", "cnn"), ["--connector", "vit"]),
    ("align.py", ("--steps", "many"), ["--steps", "many"]),
    ("align.py", ("--profile", "theirs"), ["--profile", "released"]),
    ("align.py", ("--mask-pass", "2d"), ["--mask-pass", "paper", "released"]),
    ("align.py", ("--mllm", "nowhere"), ["nowhere", "Download it", "--preset tiny"]),
    ("align.py", ("--sam", "sam2_hiera_large.pt"),
     ["sam2_hiera_large.pt is missing", "Download it", "--preset tiny"]),
    ("align.py", ("--sam", "docs"), ["docs/config.yaml is missing", "config.yaml and model.pt"]),
    ("align.py", ("--sam", "sam9.pt"), ["sam9.pt", "sam2_hiera_large.pt"]),
    ("align.py", ("--max-prompt", 50), ["tokens, the limit is 50", "--max-pixels"])])
def test_bad_input_is_one_clear_line(script, flags, parts, world, tmp_path):
    said = refused(script, "--data", world, *flags, "--output", tmp_path / "run", "--steps", 1)
    assert all(part in said for part in parts) and "Traceback" not in said, said


@pytest.mark.parametrize("script", ["align.py", "train_rl.py"])
def test_without_a_preset_and_data_it_says_what_to_download(script, tmp_path):
    said = refused(script, "--output", tmp_path / "run", preset="")
    for part in ("datasets/refer_seg/refcoco", "Download", "--preset tiny"):
        assert part in said


def test_from_the_shell_a_damaged_image_is_one_line(world, tmp_path):
    """A process of its own meets it, whose error comes with its traceback. The run does not wait
    for these processes: they ignore SIGTERM, by which Python would end them."""
    shutil.copytree(world, tmp_path / "world")
    for image in (tmp_path / "world").rglob("*.jpg"):
        image.write_bytes(b"damaged")
    flags = ["--data", tmp_path / "world", "--output", tmp_path / "run", "--batch", 2]
    done = run(sys.executable, "align.py", "--preset", "tiny", *flags, "--micro-batch", 2,
               "--workers", 2, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error, = [line for line in done.stderr.splitlines() if "rror" in line]
    assert re.search(r"align.py: error: .*/COCO_train2014_\d+.jpg: no readable image", error)
