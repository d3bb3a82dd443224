"""Training: the same numbers on one process and two, resume after a kill, bad input, both scripts from the command line."""
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ENVIRONMENT, ROOT, TORCHRUN, rows, run, script

import align
import data
import evaluate
import model
import train_rl
from align import learning_rate, plan_steps, segmentation_loss

# One process and two


def without_time(folder):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows(folder)]


def worker(what, processes, folder):
    out = folder / f"{what}{processes}.pt"
    run(*TORCHRUN, f"--nproc_per_node={processes}", "tests/worker.py", what, out)
    return torch.load(out, weights_only=True)


def test_two_processes_equal_one(tmp_path):
    """Loss parts and every gradient of the same four groups with the same completions, in fp32, within 1e-5; the two
    processes also recompute the MLLM's layers in the backward pass, the one does not."""
    one, two = worker("gradients", 1, tmp_path), worker("checkpointed", 2, tmp_path)
    assert torch.allclose(one["sums"], two["sums"], atol=1e-5, rtol=1e-5)
    assert set(one["grads"]) == set(two["grads"]) and len(one["grads"]) > 100
    for name, expected in one["grads"].items():
        scale = expected.abs().max().clamp(min=1.0)
        assert (two["grads"][name] - expected).abs().max() / scale < 1e-5, name


def test_gradients_do_not_depend_on_the_number_of_passes(tmp_path, monkeypatch):
    """One pass of four groups gives what four passes of one give."""
    sys.path.insert(0, str(ROOT / "tests"))
    import worker as w
    _, _, _, mesh = w.start_processes()
    try:
        found = []
        for size in (1, 4):
            lens, _, reference = w.build("fp32", mesh)
            args = w.SimpleNamespace(batch=4, micro_batch=size, group_size=3, temperature=0.8, clip_eps=0.2, beta=0.5, alpha=1.5,
                                     iou_power=1.0, lambda_format=1.0, lambda_box=1.0, lambda_mask=1.0, focal=False)
            sums = w.one_pass(lens, reference, 0, 1, args)
            found.append((sums, {n: p.grad.full_tensor() for n, p in lens.named_parameters() if p.grad is not None}))
        assert torch.allclose(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
        for name, expected in found[0][1].items():
            assert (found[1][1][name] - expected).abs().max() / expected.abs().max().clamp(min=1.0) < 1e-5, name
    finally:
        dist.destroy_process_group()


def test_bf16_sampling_copy_is_refreshed_on_every_rank(tmp_path):
    assert worker("refresh", 2, tmp_path)["equal"] == [True, True]
    assert worker("stale", 2, tmp_path)["equal"] == [True, False]         # what the assertion would see, were it skipped


# Interrupt and resume


def kill_after(lines, folder, *command):
    """Start a run and kill -9 it as soon as metrics.jsonl has so many lines."""
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 200
    while time.time() < until and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= lines:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(rows(folder))


@pytest.mark.parametrize("name, extra", [("train_rl.py", ("--group-size", 4, "--updates-per-batch", 2)), ("align.py", ())])
def test_killed_and_resumed_equals_uninterrupted(name, extra, world, aligned, tmp_path):
    """Ten steps; ten steps killed after the sixth or later and resumed from the checkpoint of the fifth: every number of
    metrics.jsonl but the time, to the last bit."""
    flags = ["--data", world, "--steps", 10, "--batch", 4, "--micro-batch", 2, "--save-every", 5, *extra]
    flags += ["--init", aligned] if name == "train_rl.py" else []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script(name, *flags, "--output", whole)
    killed = kill_after(6, broken, sys.executable, name, "--preset", "tiny", *flags, "--output", broken)
    assert 6 <= killed < 10
    assert [p.name for p in (broken / "checkpoints").glob("step_*")] == ["step_000005"]
    script(name, *flags, "--output", broken, "--resume")
    assert len(rows(whole)) == 10 and without_time(whole) == without_time(broken)
    for file in ("context.safetensors", "sam.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    for needed in ("loss", "lr", "grad_norm", "seconds"):
        assert needed in rows(whole)[0]


def test_resume_on_another_number_of_processes(world, aligned, tmp_path):
    """Two processes save, one goes on; the first steps' numbers are those of one process throughout (fp32 rounding)."""
    flags = ["--data", world, "--init", aligned, "--steps", 4, "--batch", 4, "--micro-batch", 2, "--save-every", 2, "--group-size", 4]
    alone, both = tmp_path / "alone", tmp_path / "both"
    script("train_rl.py", *flags, "--output", alone)
    script("train_rl.py", *flags, "--output", both, processes=2)
    first, second = rows(alone), rows(both)
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(first, second))
    assert all(abs(a["reward"] - b["reward"]) < 1e-4 for a, b in zip(first, second))
    (both / "checkpoints/step_000004").rename(both / "checkpoints/gone")
    script("train_rl.py", *flags, "--output", both, "--resume")
    assert len(rows(both)) == 4 and abs(rows(both)[3]["loss"] - first[3]["loss"]) < 1e-4
    needed = ("step loss reward reward_format reward_box reward_mask kl entropy completion_length grad_norm lr seconds").split()
    assert all(set(needed) <= set(row) for row in rows(both))
    for name in ("mllm/config.json", "mllm/model.safetensors", "mllm/tokenizer.json", "context.safetensors", "sam.safetensors"):
        assert (both / name).exists()


# Pieces


def test_segmentation_loss_by_hand():
    """Two pixels, logits 0 and ln 3, truth 1 and 0: p = 1/2, 3/4.
    BCE: -ln(1/2) = 0.6931, -ln(1/4) = 1.3863, mean 1.0397. Dice: 1 - (2 * 1/2 + 1) / (5/4 + 1 + 1) = 1 - 2 / 3.25."""
    logits, truth = torch.tensor([[[0.0, 1.0986123]]]), torch.tensor([[[1.0, 0.0]]])
    assert segmentation_loss(logits, truth).item() == pytest.approx(1.0397208 + 1 - 2 / 3.25, abs=1e-6)
    # Focal: (1/2)^2 * 0.25 * 0.6931 = 0.04332; (3/4)^2 * 0.75 * 1.3863 = 0.58484; mean 0.31408
    assert segmentation_loss(logits, truth, focal=True).item() == pytest.approx(0.31408 + 1 - 2 / 3.25, abs=1e-5)


def test_learning_rate_by_hand():
    assert [learning_rate(s, 12, 2, "linear") for s in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert [round(learning_rate(s, 8, 0, "cosine"), 6) for s in (0, 2, 4, 8)] == [1.0, round(0.5 + 0.5 ** 0.5 / 2, 6), 0.5, 0.0]


class Plan:
    def __init__(self, **values):
        self.__dict__.update({"batch": 64, "micro_batch": 1, "epochs": 16, "steps": 0, **values})


def test_plan_steps():
    assert plan_steps(Plan(), 16, 126_908) == 31_727                     # 16 * 126,908 / 64
    assert plan_steps(Plan(steps=3), 16, 126_908) == 3
    with pytest.raises(data.LensError, match="--batch 64 .* 3 processes .*63, 66.*"):
        plan_steps(Plan(), 3, 1000)
    with pytest.raises(data.LensError, match="--micro-batch 3"):
        plan_steps(Plan(micro_batch=3), 2, 1000)


# Bad input: one line that says what to do


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run a script in this process -> what it says when it refuses, which must be one message and no traceback."""
    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, flags)])
        monkeypatch.chdir(ROOT)
        try:
            with pytest.raises(SystemExit) as stopped:
                model.run(script.main)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return str(stopped.value) + capsys.readouterr().err
    return call


@pytest.mark.parametrize("module, flags, parts", [
    (train_rl, ("--learning-rat", 1), ("--learning-rat",)),
    (train_rl, ("--group-size", 1), ("--group-size", "at least 2")),
    (train_rl, ("--temperature", 0), ("--temperature",)),
    (train_rl, ("--beta", -1), ("--beta", "negative")),
    (train_rl, ("--batch", 0), ("--batch must be at least 1",)),
    (align, ("--batch", 3, "--micro-batch", 2), ("--batch 3", "multiple of 2")),
    (align, ("--connector", "cnn"), ("--connector", "vit")),
    (align, ("--steps", "many"), ("--steps", "many")),
    (align, ("--mllm", "nowhere"), ("nowhere", "Download it", "--preset tiny")),
    (align, ("--sam", "sam2_hiera_large.pt"), ("sam2_hiera_large.pt is missing", "Download it", "--preset tiny")),
    (align, ("--sam", "docs"), ("docs/config.yaml is missing", "config.yaml and model.pt")),
    (align, ("--sam", "sam9.pt"), ("sam9.pt", "sam2_hiera_large.pt")),
    (align, ("--connector-heads", 7), ("--connector-heads 7", "hidden size")),
    (align, ("--max-prompt", 50), ("tokens, the limit is 50", "--max-prompt", "--max-pixels")),
    (train_rl, ("--init", "nowhere"), ("nowhere", "lens.json is missing", "align.py")),
    (evaluate, (), ("--checkpoint is missing",)),
    (evaluate, ("--prompt-with", "box", "--splits", "test"), ("no object of split 'test'",)),
    (evaluate, ("--prompt-with", "box", "--image", "none.png", "--text", "x"), ("none.png",)),
    (evaluate, ("--curves", "nowhere"), ("nowhere",)),
])
def test_bad_input_is_one_clear_error(module, flags, parts, world, tmp_path, refused):
    output = () if module is evaluate else ("--output", tmp_path / "run", "--steps", 1)
    message = refused(module, "--preset", "tiny", "--data", world, *flags, *output)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("module", [align, train_rl])
def test_without_preset_and_data_it_says_what_to_download(module, tmp_path, refused):
    message = refused(module, "--output", tmp_path / "run")
    assert all(part in message for part in ("datasets/refer_seg/refcoco", "Download", "--preset tiny"))


def test_from_the_shell_an_error_is_one_line(tmp_path):
    done = run(sys.executable, "align.py", "--output", tmp_path / "run", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("align.py: error: datasets/refer_seg")


def test_a_run_is_never_overwritten(world, aligned, refused):
    message = refused(align, "--preset", "tiny", "--data", world, "--output", aligned)
    assert all(part in message for part in (str(aligned), "--resume", "--output"))


def test_checkpoint_of_another_architecture(world, aligned, tmp_path, refused):
    other = tmp_path / "other"
    other.mkdir()
    for file in ("context.safetensors", "sam.safetensors"):
        (other / file).write_bytes((aligned / file).read_bytes())
    (other / "lens.json").write_text((aligned / "lens.json").read_text().replace('"num_queries": 8', '"num_queries": 4'))
    message = refused(train_rl, "--preset", "tiny", "--data", world, "--init", other, "--output", tmp_path / "run")
    assert "context.safetensors" in message and "another architecture" in message


def test_a_flag_that_contradicts_the_checkpoint(world, aligned, tmp_path, refused):
    message = refused(train_rl, "--preset", "tiny", "--data", world, "--init", aligned, "--num-queries", 4, "--output", tmp_path / "run")
    assert str(aligned) in message and "--num-queries 8, not 4" in message


def test_defaults_come_from_class_preset_run_and_flags_in_this_order(aligned, tmp_path, monkeypatch):
    settings = (aligned / "lens.json").read_text().replace('"num_queries": 8', '"num_queries": 5')
    (tmp_path / "lens.json").write_text(settings.replace('"limit": 0', '"limit": 3'))
    def parse(module, own, *flags):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, flags)])
        return model.parse_settings([model.SharedArgs, own], module.PRESETS, "")
    shared, args = parse(train_rl, train_rl.RLArgs)
    assert (shared.num_queries, shared.mllm, args.batch, args.lr) == (64, "Qwen/Qwen2.5-VL-3B-Instruct", 64, 3e-6)
    shared, args = parse(train_rl, train_rl.RLArgs, "--preset", "tiny", "--init", tmp_path, "--lr", 0.5)
    assert (shared.num_queries, shared.datasets, args.batch, args.lr, args.group_size) == (5, ["shapes"], 16, 0.5, 8)
    shared, args = parse(evaluate, evaluate.EvaluateArgs, "--checkpoint", tmp_path)
    assert (shared.num_queries, shared.mllm, shared.limit, args.eval_batch) == (5, "tests/tiny/mllm", 0, 8)
    shared, _ = parse(evaluate, evaluate.EvaluateArgs, "--preset", "tiny", "--checkpoint", tmp_path, "--num-queries", 6)
    assert (shared.num_queries, shared.limit) == (6, 1000)


def test_resuming_with_another_architecture(world, aligned, tmp_path, refused):
    flags = ["--preset", "tiny", "--data", world, "--output", aligned, "--resume", "--steps", 4, "--batch", 8, "--micro-batch", 4]
    message = refused(align, *flags, "--num-queries", 4)
    assert "step_000002 does not fit" in message and "settings of that run" in message


@pytest.mark.parametrize("rate", [1e30, 1e10])
def test_nan_stops_before_the_update_and_keeps_the_checkpoint(rate, world, aligned, tmp_path, refused):
    out = tmp_path / "run"
    message = refused(train_rl, "--preset", "tiny", "--data", world, "--init", aligned, "--output", out, "--steps", 6, "--batch", 2,
                      "--micro-batch", 2, "--group-size", 2, "--save-every", 1, "--lr", rate, "--warmup", 0)
    assert all(part in message for part in ("nan", "stopped before the update", "checkpoints", "--resume"))
    assert list((out / "checkpoints").glob("step_*")) and not (out / "lens.json").exists()


@pytest.mark.parametrize("module", [align, train_rl, evaluate])
def test_help_explains_every_field(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--preset", "--num-queries", "--seed"))
    shared, own = model.SharedArgs, {align: "AlignArgs", train_rl: "RLArgs", evaluate: "EvaluateArgs"}[module]
    for field in [*shared.__dataclass_fields__.values(), *getattr(module, own).__dataclass_fields__.values()]:
        assert field.metadata["help"].split()[0] in text and len(field.metadata["help"]) > 8
