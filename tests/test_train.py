"""Training: the same numbers on one process and two, resume after a kill, bad input, both scripts
from the command line."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from conftest import (ENVIRONMENT, IMAGE, ROOT, SAM_SIDE, TORCHRUN, VOCABULARY, rows, run,
                      script, stored_samples)
from safetensors.torch import load_file
from test_model import lens_of, random_family, whole_pass
from transformers import AutoModelForImageTextToText, AutoProcessor

import align
import data
import evaluate
import rewards
import model
import train_rl
from align import SharedArgs, learning_rate, plan_steps, segmentation_loss

# One process and two


def without_time(folder):
    times = ("seconds", "speed")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows(folder)]


def worker(what, processes, folder, *more):
    out = folder / f"{what}{processes}.pt"
    run(*TORCHRUN, f"--nproc_per_node={processes}", "tests/worker.py", what, out, *more)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("shards", ["full", "hybrid"])
def test_two_processes_equal_one(shards, tmp_path):
    """Loss parts and every gradient of the same four groups with the same completions, in fp32,
    within 1e-5; the two processes also recompute the MLLM's layers in the backward pass, the one
    does not. Hybrid: two nodes of one process."""
    one, two = worker("gradients", 1, tmp_path), worker("checkpointed", 2, tmp_path, "fp32", shards)
    assert torch.allclose(one["sums"], two["sums"], atol=1e-5, rtol=1e-5)
    assert set(one["grads"]) == set(two["grads"]) and len(one["grads"]) > 100
    for name, expected in one["grads"].items():
        scale = expected.abs().max().clamp(min=1.0)
        assert (two["grads"][name] - expected).abs().max() / scale < 1e-5, name


@pytest.fixture
def one_process():
    """-> tests/worker.py and a mesh of this process."""
    import worker
    yield worker, worker.start_processes(SharedArgs())[3]
    dist.destroy_process_group()


def gradients(lens):
    return {n: p.grad.full_tensor() for n, p in lens.named_parameters() if p.grad is not None}


def test_gradients_do_not_depend_on_the_number_of_passes(one_process):
    """One pass of four groups gives what four passes of one give."""
    (worker, mesh), found = one_process, []
    for size in (1, 4):
        lens, _, reference = worker.build("fp32", mesh)
        sums = worker.one_pass(lens, reference, 0, 1, worker.settings(size))
        found.append((sums, gradients(lens)))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for name, expected in found[0][1].items():
        scale = expected.abs().max().clamp(min=1.0)
        assert (found[1][1][name] - expected).abs().max() / scale < 1e-5, name


def test_bf16_sampling_copy_is_refreshed_on_every_rank(tmp_path):
    assert worker("refresh", 2, tmp_path)["equal"] == [True, True]
    # what the assertion would see, were it skipped
    assert worker("stale", 2, tmp_path)["equal"] == [True, False]


# Interrupt and resume


def kill_after(lines, folder, *command, number=signal.SIGKILL):
    """Start a run and send it a signal, kill -9 by default, as soon as metrics.jsonl has so many
    lines. -> lines then."""
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 200
    while time.time() < until and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(rows(folder)) >= lines:
            break
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(timeout=100)
    return len(rows(folder))


@pytest.mark.parametrize("name, extra",
                         [("train_rl.py", ("--group-size", 4, "--updates-per-batch", 2)),
                          ("align.py", ())])
def test_killed_and_resumed_equals_uninterrupted(name, extra, world, aligned, tmp_path):
    """Ten steps; ten steps killed after the sixth or later and resumed from the checkpoint of the
    fifth: every number of metrics.jsonl but the time, to the last bit."""
    flags = ["--data", world, "--steps", 10, "--batch", 4, "--micro-batch", 2, "--save-every", 5,
             *extra]
    flags += ["--init", aligned] if name == "train_rl.py" else []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script(name, *flags, "--output", whole)
    killed = kill_after(6, broken, sys.executable, name, "--preset", "tiny", *flags, "--output",
                        broken)
    assert 6 <= killed < 10
    assert [p.name for p in (broken / "checkpoints").glob("step_*")] == ["step_000005"]
    script(name, *flags, "--output", broken, "--resume")
    assert len(rows(whole)) == 10 and without_time(whole) == without_time(broken)
    for file in ("context.safetensors", "sam.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    for needed in ("loss", "lr", "grad_norm", "seconds"):
        assert needed in rows(whole)[0]


@pytest.mark.parametrize("number, processes", [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_the_run_goes_on(number, processes, world, aligned, tmp_path):
    """A scheduler's warning in the middle: the step is finished and saved, --keep holds, and with
    --resume the numbers are those of an uninterrupted run. torchrun passes SIGTERM on to its
    processes."""
    flags = ["--data", world, "--init", aligned, "--steps", 7, "--batch", 4, "--micro-batch", 2,
             "--save-every", 1, "--keep", 3, "--group-size", 4]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script("train_rl.py", *flags, "--output", whole, processes=processes)
    start = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    flags[flags.index("--save-every") + 1] = 100
    kill_after(2, broken, *start, "train_rl.py", "--preset", "tiny", *flags, "--output", broken,
               number=number)
    steps = len(rows(broken))
    assert 2 <= steps < 7 and not (broken / "lens.json").exists()
    assert [p.name for p in (broken / "checkpoints").glob("*")] == [f"step_{steps:06d}"]
    script("train_rl.py", *flags, "--output", broken, "--resume", processes=processes)
    assert without_time(whole) == without_time(broken)
    kept = sorted(path.name for path in (whole / "checkpoints").glob("*"))
    assert kept == ["step_000005", "step_000006", "step_000007"]


@pytest.fixture(scope="module")
def four_steps(world, aligned):
    return ["--data", world, "--init", aligned, "--steps", 4, "--batch", 4, "--micro-batch", 2,
            "--save-every", 2, "--group-size", 4]


@pytest.fixture(scope="module")
def trained_by_two(four_steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "both"
    script("train_rl.py", *four_steps, "--output", folder, processes=2)
    return folder


def test_resume_on_another_number_of_processes(four_steps, trained_by_two, tmp_path):
    """Two processes save, one goes on; the first steps' numbers are those of one process throughout
    (fp32 rounding)."""
    flags, alone, both = four_steps, tmp_path / "alone", tmp_path / "both"
    script("train_rl.py", *flags, "--output", alone)
    shutil.copytree(trained_by_two, both)
    first, second = rows(alone), rows(both)
    # the policy starts as its own reference
    assert abs(first[0]["kl"]) < 1e-6 < first[1]["kl"]
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(first, second))
    assert all(abs(a["reward"] - b["reward"]) < 1e-4 for a, b in zip(first, second))
    (both / "checkpoints/step_000004").rename(both / "checkpoints/gone")
    script("train_rl.py", *flags, "--output", both, "--resume")
    assert len(rows(both)) == 4 and abs(rows(both)[3]["loss"] - first[3]["loss"]) < 1e-4
    needed = {"step", "loss", "loss_seg", "reward", "reward_format", "reward_box", "reward_mask",
              "kl", "entropy", "completion_length", "clip_fraction", "zero_variance", "grad_norm",
              "lr", "seconds"}
    assert all(needed <= set(row) for row in rows(both))
    for name in ("mllm/config.json", "mllm/model.safetensors", "mllm/tokenizer.json",
                 "context.safetensors", "sam.safetensors"):
        assert (both / name).exists()


# --export: the last checkpoint as a finished model


@pytest.fixture
def inside(monkeypatch):
    """Run a script in this process."""
    def call(script, *flags):
        monkeypatch.setattr(sys, "argv",
                            [script.__name__ + ".py", "--preset", "tiny", *map(str, flags)])
        monkeypatch.chdir(ROOT)
        try:
            script.main()
        finally:
            dist.destroy_process_group()
    return call


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def forget_export(folder):
    """Remove what a finished run leaves beside its checkpoints."""
    shutil.rmtree(folder / "mllm", ignore_errors=True)
    for file in ("context.safetensors", "sam.safetensors", "lens.json"):
        (folder / file).unlink()


def test_exported_checkpoint_is_the_finished_run(four_steps, trained_by_two, aligned, world, inside,
                                                 tmp_path):
    """Bit for bit, and nothing else in the folder changes: stage 1, and stage 2 saved by two
    processes, written by one."""
    two_steps = ["--data", world, "--steps", 2, "--batch", 8, "--micro-batch", 4]
    runs = (align, aligned, two_steps), (train_rl, trained_by_two, four_steps)
    for module, finished, flags in runs:
        copied = tmp_path / module.__name__
        shutil.copytree(finished, copied)
        forget_export(copied)
        inside(module, *flags, "--output", copied, "--resume", "--export")
        assert contents(copied) == contents(finished)
    assert (copied / "mllm/model.safetensors").exists() and (copied / "lens.json").exists()


def test_an_unfinished_run_can_be_exported(four_steps, trained_by_two, aligned, world, inside,
                                           tmp_path):
    """At its last checkpoint, without another step: stage 1 at step 2 of 4, and stage 2 at step 2,
    whose weights are others than those of the finished run."""
    broken, stage_1 = tmp_path / "broken", tmp_path / "align"
    shutil.copytree(aligned, stage_1)
    inside(align, "--data", world, "--steps", 4, "--batch", 8, "--micro-batch", 4, "--output",
           stage_1, "--resume", "--export")
    assert contents(stage_1) == contents(aligned)
    shutil.copytree(trained_by_two, broken)
    forget_export(broken)
    shutil.rmtree(broken / "checkpoints/step_000004")
    inside(train_rl, *four_steps, "--output", broken, "--resume", "--export")
    ours, theirs = contents(broken), contents(trained_by_two)
    for file in ("mllm/model.safetensors", "context.safetensors", "sam.safetensors"):
        assert len(ours[file]) == len(theirs[file]) and ours[file] != theirs[file]
    assert ours["lens.json"] == theirs["lens.json"]
    assert ours["metrics.jsonl"] == theirs["metrics.jsonl"]


# --resume takes the run's own settings, and flags win


def largest_move(before, after, file):
    before, after = load_file(before / file), load_file(after / file)
    return max((after[name] - before[name]).abs().max().item() for name in before)


def test_a_resumed_run_has_its_own_settings_unless_flags_say_otherwise(world, inside, tmp_path):
    """Stage 1 after two steps, gone on to the fourth. What the first run was told is the default,
    before the preset; the learning rate that is asked for is the one it goes on with, and so is the
    weight decay: 500 * 5e-4 takes a quarter off every weight."""
    start = tmp_path / "start"
    inside(align, "--data", world, "--output", start, "--steps", 2, "--batch", 4, "--micro-batch",
           2, "--lr", 1e-3, "--warmup", 0, "--context", "true", "--max-completion", 60)
    told = json.loads((start / "settings.json").read_text())
    moves = {}
    goes_on = {"same": (), "still": ("--lr", 1e-12), "shrunk": ("--weight-decay", 500)}
    for name, flags in goes_on.items():
        folder = tmp_path / name
        shutil.copytree(start, folder)
        inside(align, "--output", folder, "--resume", "--steps", 4, *flags)
        settings = json.loads((folder / "settings.json").read_text())
        changed = {key for key in settings if settings[key] != told[key]}
        asked = {flag.strip("-").replace("-", "_") for flag in flags[:1]}
        assert changed == {"output", "resume", "steps"} | asked
        rates = [row["lr"] for row in rows(folder)]              # cosine: (1 + cos 90) / 2, cos 135
        assert rates[2:] == pytest.approx([settings["lr"] * 0.5, settings["lr"] * 0.1464466])
        assert without_time(folder)[:2] == without_time(start)
        moves[name] = largest_move(start, folder, "context.safetensors")
    assert moves["still"] < 1e-9 < 1e-4 < moves["same"] < 0.01
    assert moves["shrunk"] > 0.1


def test_a_resumed_stage_2_has_the_rates_it_is_asked_for(world, aligned, inside, tmp_path):
    """The MLLM's rate by a flag, the context module's and SAM's as they were."""
    start, still = tmp_path / "start", tmp_path / "still"
    inside(train_rl, "--data", world, "--init", aligned, "--output", start, "--steps", 1, "--batch",
           2, "--micro-batch", 2, "--group-size", 2, "--lr", 1e-3, "--lr-context", 3e-4)
    shutil.copytree(start, still)
    for folder, flags in (start, ()), (still, ("--lr", 1e-12)):
        before = tmp_path / f"before {folder.name}"
        shutil.copytree(folder, before)
        inside(train_rl, "--output", folder, "--resume", "--steps", 2, *flags)
        moved = largest_move(before, folder, "mllm/model.safetensors")
        assert moved < 1e-9 if flags else moved > 1e-5
        assert largest_move(before, folder, "context.safetensors") > 1e-5
        assert largest_move(before, folder, "sam.safetensors") > 1e-6


def test_exported_mllm_is_one_for_transformers(trained_by_two, world, inside, tmp_path):
    """AutoModel and AutoProcessor load it, and its own generate() writes the answers of our
    evaluation."""
    inside(evaluate, "--checkpoint", trained_by_two, "--data", world, "--limit", 4, "--predictions",
           tmp_path / "rows.jsonl")
    mllm = AutoModelForImageTextToText.from_pretrained(trained_by_two / "mllm")
    processor = AutoProcessor.from_pretrained(trained_by_two / "mllm")
    items = {item["id"]: item
             for item in data.EvaluationRows(data.read_records(world, ["shapes"], ["val"]), 4)}
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        item = items.pop(row["key"])
        text = processor.apply_chat_template(rewards.chat_messages(item["text"]),
                                             add_generation_prompt=True)
        inputs = processor(text=[text], images=[item["image"]], return_tensors="pt",
                           return_mm_token_type_ids=True)
        out = mllm.generate(**inputs, do_sample=False, max_new_tokens=align.TINY["max_completion"])
        out = out[0, inputs["input_ids"].shape[1]:]
        assert row["answer"] == processor.tokenizer.decode(out, skip_special_tokens=True)
        assert len(out) > 5
    assert not items


# Every family, and the released code's choices


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_go_through_both_stages(family, world, inside, tmp_path):
    """With random weights: two steps of each stage, the second of which must not be as the
    first."""
    mllm = random_family(family, True, vocabulary=1000, image=6, video=7, start=3, end=4)
    mllm.save_pretrained(tmp_path / "mllm")
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
                 "chat_template.jinja"):
        shutil.copy(ROOT / "tests/tiny/mllm" / file, tmp_path / "mllm")
    flags = ["--mllm", tmp_path / "mllm", "--data", world, "--steps", 2, "--batch", 2,
             "--micro-batch", 1, "--max-completion", 8]
    inside(align, *flags, "--output", tmp_path / "align", "--context", "true")
    inside(train_rl, *flags, "--output", tmp_path / "rl", "--init", tmp_path / "align",
           "--group-size", 2, "--gradient-checkpointing")
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "rl/mllm")
    assert trained.config.model_type == family
    for name in ("lm_head.weight", "model.visual.blocks.0.attn.qkv.weight",
                 "model.language_model.layers.2.mlp.up_proj.weight"):
        assert not torch.equal(trained.get_parameter(name), mllm.get_parameter(name))
    first, second = rows(tmp_path / "rl")
    assert abs(first["kl"]) < 1e-6 and second["loss_seg"] != first["loss_seg"]


def within(part, whole):
    return {name: whole[name] for name in part} == part


PROFILE = {"prompt": "released", "positions": "1d", "multimask": True, "prompt_tokens": "one",
           "max_pixels": 1_000_000}


def test_profile_released_trains(world, inside, tmp_path):
    """Stage 1 with it; stage 2 takes from --init what the two must share. Its context pass has 1-D
    positions and its reference has not, so the KL is not 0 although policy and reference are one
    (FACTS.md)."""
    flags = ["--data", world, "--steps", 2, "--batch", 4, "--micro-batch", 2]
    inside(align, *flags, "--profile", "released", "--output", tmp_path / "align")
    assert within(PROFILE, json.loads((tmp_path / "align/lens.json").read_text()))
    assert json.loads((tmp_path / "align/settings.json").read_text())["context"] == "true"
    assert not (tmp_path / "align/answers.jsonl").exists()
    inside(train_rl, *flags, "--init", tmp_path / "align", "--group-size", 4, "--output",
           tmp_path / "rl")
    assert within(PROFILE, json.loads((tmp_path / "rl/lens.json").read_text()))
    assert rows(tmp_path / "rl")[0]["kl"] > 1e-3


def parsed(monkeypatch, module, own, *flags):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, flags)])
    return align.parse_settings([SharedArgs, own], module.PRESETS, "")


def test_profiles_and_presets(monkeypatch, tmp_path):
    """Class, preset, profile, run, flags: each over those before it."""
    parse = partial(parsed, monkeypatch, train_rl, train_rl.RLArgs)
    shared, args = parse("--preset", "tiny", "--init", "none", "--profile", "released", "--beta",
                         0.5)
    assert within(PROFILE, vars(shared)) and shared.mllm == "tests/tiny/mllm"
    released = {"iou_power": 2.0, "deviation": "sample", "lambda_format": 0.0}
    assert within({**released, "lambda_box": 1.0, "beta": 0.5}, vars(args))
    shared, args = parse("--init", "none", "--profile", "released", "--positions", "mrope",
                         "--iou-power", 1)
    assert (shared.positions, shared.prompt, args.iou_power) == ("mrope", "released", 1.0)
    shared, args = parse("--init", "none", "--profile", "paper")
    paper = {"positions": "mrope", "prompt": "paper", "multimask": False, "prompt_tokens": "all",
             "max_pixels": 1_000_000}
    assert within(paper, vars(shared))
    assert (args.iou_power, args.deviation, args.lambda_format) == (1.0, "population", 1.0)
    assert parsed(monkeypatch, align, align.AlignArgs)[1].context == "own"
    for preset, name in ("2b", "Qwen/Qwen2-VL-2B-Instruct"), ("3b", "Qwen/Qwen2.5-VL-3B-Instruct"):
        shared, args = parsed(monkeypatch, align, align.AlignArgs, "--preset", preset)
        assert (shared.mllm, shared.sam, args.batch) == (name, "weights/sam2_hiera_large.pt", 128)
    run = {**vars(shared), "prompt": "released-cot", "positions": "1d", "multimask": True,
           "max_pixels": 5, "seed": 7, "mllm": "my/mllm", "sam": "my/sam"}
    (tmp_path / "lens.json").write_text(json.dumps(run))
    shared, _ = parse("--profile", "released", "--init", tmp_path)
    own = {"prompt": "released-cot", "positions": "1d", "multimask": True, "prompt_tokens": "all",
           "mllm": "my/mllm", "sam": "my/sam"}
    assert within(own, vars(shared))
    assert (shared.max_pixels, shared.seed) == (1_000_000, 42)   # not the architecture's
    shared, _ = parsed(monkeypatch, evaluate, evaluate.EvaluateArgs, "--checkpoint", tmp_path,
                       "--multimask", "no")
    assert within({**own, "multimask": False, "max_pixels": 5}, vars(shared))


def test_with_1d_positions_the_reference_keeps_the_mllms_own(one_process):
    """Hugging Face's forward of each completion, at positions 0, 1, 2, ... for the policy and at
    its own for the reference; both are one model here, so with the MLLM's own in both passes the KL
    is 0."""
    worker, _ = one_process
    batch, completions, texts, finished = worker.whole_batch()
    texts = [["(20,20),(60,60)"] * 3] * 4
    cuts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    args = worker.settings(4, deviation="sample")

    def hugging_faces(mllm, b, completion, **positions):
        ids, T = torch.cat([batch["ids"][b], completion])[None], len(completion)
        out = mllm(input_ids=ids, pixel_values=cuts[b], image_grid_thw=batch["grid_thw"][b:b + 1],
                   mm_token_type_ids=(ids == IMAGE).int(), **positions)
        logits = out.logits[0, -T - 1:-1] / args.temperature
        logits[:, torch.arange(VOCABULARY) >= 250] = float("-inf")
        return logits.log_softmax(-1)[torch.arange(T), completion]

    kls = {}
    for kind in "1d", "mrope":
        lens = lens_of(random_family("qwen2_5_vl"), positions=kind, prompt="released")
        reference = train_rl.Reference(train_rl.copy_mllm(lens.mllm, "fp32"), lens.forbidden)
        positions = model.prompt_positions(lens.mllm, batch)
        groups, = train_rl.make_groups(lens, reference, batch, positions,
                                       stored_samples(completions, finished), texts, args)
        scores, sums = worker.policy_pass(lens, groups, args, 1)
        kls[kind] = sums["kl"] / 4
        n = 0
        for b, group in enumerate(completions):
            for completion in group:
                T = len(completion)
                count = torch.arange(len(batch["ids"][b]) + T).expand(3, 1, -1)
                policy = {"position_ids": count} if kind == "1d" else {}
                with torch.no_grad():
                    ours = hugging_faces(lens.mllm, b, completion, **policy)
                    references = hugging_faces(lens.mllm, b, completion)
                assert (scores.old_log_probs[n, :T] - ours).abs().max() < 1e-4
                assert (groups.ref_log_probs[n, :T] - references).abs().max() < 1e-4
                n += 1
        answers = [[group[0]] for group in completions]          # stage 1, likewise
        if kind == "1d":
            positions = [torch.arange(len(ids)).expand(3, -1) for ids in batch["ids"]]
        packed = model.pack_groups(batch["ids"], positions, answers, lens.M)
        with torch.no_grad():
            masks = whole_pass(lens, batch, packed)["mask_logits"]
        expected = segmentation_loss(masks, batch["low_masks"], weights=batch["low_weights"]).sum()
        loss, _ = align.align_step(lens, batch, sum(answers, []), 1, args)
        assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert kls["1d"] > 1e-2 and abs(kls["mrope"]) < 1e-6
    # (20, 20, 60, 60) of 128 x 128 is (7.8, 6.25, 23.4, 18.75) of 50 x 40; true is (10, 10, 30, 30)
    union = (23.4375 - 7.8125) * 12.5 + 400 - 13.4375 * 8.75
    assert groups.r_box.flatten().tolist() == pytest.approx([13.4375 * 8.75 / union] * 12)
    assert groups.r_format.max() == 0
    centred = scores.reward - scores.reward.mean(1, keepdim=True)
    sigma = ((centred ** 2).sum(1, keepdim=True) / 2).sqrt()                 # deviation: 1/(G-1)
    assert torch.allclose(scores.advantages, centred / (sigma + 1e-4), atol=1e-5)
    assert scores.advantages.abs().max() > 0.1


@pytest.mark.parametrize("module, piece, training",
                         [(align, "align_step", False), (train_rl, "make_groups", True)])
def test_what_a_stage_makes_of_its_settings(module, piece, training, world, aligned, refused,
                                            monkeypatch, tmp_path):
    """SAM falls back on its multi-mask tokens in eval mode alone: it is in it in stage 1, where it
    is frozen, and not in stage 2; the MLLM trains in both. Prompts and forced answers are the
    released ones."""
    seen, asked, forbid = [], [], model.forbidden_tokens

    def look(*given):
        seen.extend(given)
        raise data.LensError("enough")

    def forbidden_for(tokenizer, size, prompt):
        asked.append(prompt)
        return forbid(tokenizer, size, prompt)

    monkeypatch.setattr(module, piece, look)
    monkeypatch.setattr(model, "forbidden_tokens", forbidden_for)
    own = ("--init", aligned, "--group-size", 2) if module is train_rl else ("--context", "true")
    refused(module, "--preset", "tiny", "--data", world, "--output", tmp_path / "run", "--batch", 2,
            "--micro-batch", 2, "--multimask", "--prompt", "released", *own)
    lens, second, third, *_ = seen
    batch, answers = (second, third) if module is align else (third, None)
    assert lens.sam.training == training and lens.mllm.training
    assert lens.prompt == "released" and asked == ["released"]
    assert lens.sam.sam_mask_decoder.dynamic_multimask_via_stability
    processor = AutoProcessor.from_pretrained("tests/tiny/mllm")
    pictures = {record["id"]: record["image"]
                for record in data.read_records(world, ["shapes"], ["train"])}
    for ids, text, key in zip(batch["ids"], batch["texts"], batch["keys"]):
        chat = processor.apply_chat_template(rewards.chat_messages(text, "released"),
                                             add_generation_prompt=True)
        picture = Image.open(pictures[key.rpartition("/")[0]])
        assert ids.tolist() == processor(text=[chat], images=[picture])["input_ids"][0]
    if module is align:
        forced = align.true_answers(batch, processor.tokenizer, "released")
        assert all(torch.equal(a, b) for a, b in zip(answers, forced))


# Pieces


def test_what_is_ignored_counts_nowhere(one_process):
    """The upper half of every picture is ignored: another truth there changes neither loss, reward,
    IoU nor gradient, in either stage; another truth below it does."""
    worker, mesh = one_process
    found = []
    for above, below in ((0, 0), (1, 0), (0, 1)):
        batch, completions, texts, finished = worker.whole_batch()
        for b in range(4):
            ignored = torch.arange(40)[:, None].expand(40, 50) < 20
            batch["ignores"][b] = ignored
            batch["masks"][b] ^= torch.where(ignored, bool(above), bool(below))
        side = SAM_SIDE // 4
        counted = torch.arange(side)[:, None] >= side // 2
        batch["low_weights"] = counted.expand(4, side, side).float()
        low = batch["low_masks"]
        batch["low_masks"] = torch.where(batch["low_weights"] == 0, (low + above) % 1.5,
                                         (low + below) % 1.5)
        lens, _, reference = worker.build("fp32", mesh)
        args, positions = worker.settings(4), model.prompt_positions(lens.mllm, batch)
        groups, = train_rl.make_groups(lens, reference, batch, positions,
                                       stored_samples(completions, finished), texts, args)
        _, sums = worker.policy_pass(lens, groups, args, 1)
        frozen = worker.build("fp32", mesh, "align")[0]
        answers = [group[0] for group in completions]
        sums["stage 1"] = align.align_step(frozen, batch, answers, 1, args)
        found.append((sums, [*gradients(lens).values(), *gradients(frozen).values()]))
    (sums, grads), (sums_above, grads_above), (sums_below, _) = found
    assert all(torch.equal(sums[name], sums_above[name]) for name in sums)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_above)) and len(grads) > 100
    assert sums["reward_mask"] != sums_below["reward_mask"]
    assert sums["loss_seg"] != sums_below["loss_seg"]
    assert (sums["stage 1"] != sums_below["stage 1"]).all()


def test_rewards_leave_out_what_is_ignored():
    """Logits above 0 in the left half of a 4 x 4 picture, truth in its upper half: 4 / 12. Without
    the lower rows 4 / 8, squared 1 / 4; without any row, 1."""
    logits = torch.tensor([[[9., 9., -9., -9.]] * 4])
    truth = torch.arange(4)[:, None].expand(4, 4) < 2

    def rewards(ignore, power=1.0):
        batch = {"masks": [truth], "ignores": [ignore]}
        return train_rl.mask_rewards(logits, batch, power).tolist()

    assert rewards(truth & False) == [[pytest.approx(4 / 12)]]
    assert rewards(~truth) == [[0.5]]
    assert rewards(~truth, 2.0) == [[0.25]]
    assert rewards(truth | True) == [[1.0]]


FORCED = """<answer>
```json
[
  {"bbox_2d": [20, 32, 60, 96], "label": "the cup"}
]
```
</answer>"""
THEIRS = "<|object_ref_start|>the cup.<|object_ref_end|><|box_start|>(20,32),(60,96)<|box_end|>"


@pytest.mark.parametrize("prompt, text", [("paper", FORCED), ("released", THEIRS),
                                          ("released-cot", THEIRS)])
def test_the_true_answer_of_stage_1(prompt, text):
    """Spoken in the MLLM frame, 100 x 128 here, for a box of a picture of 50 x 40; then the end
    token."""
    class Tokenizer:
        eos_token_id = 7

        def __call__(self, text):
            return SimpleNamespace(input_ids=list(text.encode()))

    batch = {"boxes": [(10, 10, 30, 30)], "masks": [torch.zeros(40, 50)], "frames": [(100, 128)],
             "texts": ["the cup"]}
    answer, = align.true_answers(batch, Tokenizer(), prompt)
    assert answer.tolist() == [*text.encode(), 7]


def test_segmentation_loss_by_hand():
    """Two pixels, logits 0 and ln 3, truth 1 and 0: p = 1/2, 3/4.
    BCE: -ln(1/2) = 0.6931, -ln(1/4) = 1.3863, mean 1.0397.
    Dice: 1 - (2 * 1/2 + 1) / (5/4 + 1 + 1) = 1 - 2 / 3.25."""
    logits, truth = torch.tensor([[[0.0, 1.0986123]]]), torch.tensor([[[1.0, 0.0]]])
    loss = segmentation_loss(logits, truth).item()
    assert loss == pytest.approx(1.0397208 + 1 - 2 / 3.25, abs=1e-6)
    # Focal: (1/2)^2 * 0.25 * 0.6931 = 0.04332; (3/4)^2 * 0.75 * 1.3863 = 0.58484; mean 0.31408
    loss = segmentation_loss(logits, truth, focal=True).item()
    assert loss == pytest.approx(0.31408 + 1 - 2 / 3.25, abs=1e-5)


def test_segmentation_loss_with_weights_by_hand():
    """The pixels above, and a third that is ignored;
    the second half ignored: BCE (0.6931 + 1.3863 / 2) / 1.5 = 0.92420,
    dice 1 - 2 / (1.5 + 0.375 + 1);
    the first half and the second wholly ignored: BCE 0.34657 / 1, for half a cell does not weigh as
    much as one, dice 1 - 1.5 / 1.75;
    everything ignored: 0, without a gradient."""
    logits = torch.tensor([[[0.0, 1.0986123, 5.0]]]).repeat(4, 1, 1).requires_grad_()
    truth = torch.tensor([[[1.0, 0.0, 0.3]]]).repeat(4, 1, 1)
    weights = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 0.5, 0.0]], [[0.5, 0.0, 0.0]],
                            [[0.0, 0.0, 0.0]]])
    loss = segmentation_loss(logits, truth, weights=weights)
    expected = [1.0397208 + 1 - 2 / 3.25, 0.9241962 + 1 - 2 / 2.875, 0.3465736 + 1 - 1.5 / 1.75,
                0.0]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6) and loss[3] == 0
    loss.sum().backward()
    assert (logits.grad[weights == 0] == 0).all() and (logits.grad[weights > 0] != 0).all()
    focal = segmentation_loss(logits, truth, True, weights)      # 0.04332 and 0.58484, as above
    expected = [0.31408 + 1 - 2 / 3.25, 0.22383 + 1 - 2 / 2.875, 0.02166 + 1 - 1.5 / 1.75, 0.0]
    assert focal.tolist() == pytest.approx(expected, abs=1e-5)


def test_learning_rate_by_hand():
    linear = [learning_rate(s, 12, 2, "linear") for s in (0, 1, 2, 7, 12)]
    assert linear == [0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = [1.0, round(0.5 + 0.5 ** 0.5 / 2, 6), 0.5, 0.0]
    assert [round(learning_rate(s, 8, 0, "cosine"), 6) for s in (0, 2, 4, 8)] == cosine


def test_metrics_go_to_a_tracker_as_well(tmp_path, monkeypatch):
    sent, row = [], {"step": 3, "loss": 0.5}

    def send(*values, **named):
        sent.append((values, named))

    fakes = {"wandb": SimpleNamespace(init=send, log=send),
             "torch.utils.tensorboard": SimpleNamespace(
                 SummaryWriter=lambda folder: SimpleNamespace(add_scalar=send))}
    for module, fake in fakes.items():
        monkeypatch.setitem(sys.modules, module, fake)
    align.open_tracker("wandb", tmp_path / "run")(row)
    assert sent == [((), {"dir": str(tmp_path / "run"), "name": "run"}), ((row,), {"step": 3})]
    sent.clear()
    align.open_tracker("tensorboard", tmp_path / "run")(row)
    assert sent == [(("step", 3, 3), {}), (("loss", 0.5, 3), {})]
    assert align.open_tracker("", tmp_path) is None
    for name, module in ("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(data.LensError, match=f"--log-to {name}: .*pip install {name}"):
            align.open_tracker(name, tmp_path)


def test_only_a_run_that_saved_something_is_in_the_way(one_process, tmp_path):
    """What died before its first checkpoint, out of memory for one, is started again, and keeps the
    answers that it made; a checkpoint, or a finished run, stays."""
    args = align.AlignArgs(output=str(tmp_path))
    for file in ("metrics.jsonl", "answers.0.0.jsonl"):
        (tmp_path / file).write_text("")
    align.open_output(args, [args], 0)
    assert (tmp_path / "answers.0.0.jsonl").exists() and (tmp_path / "settings.json").exists()
    (tmp_path / "checkpoints/step_000001").mkdir(parents=True)
    with pytest.raises(data.LensError, match="holds a run already"):
        align.open_output(args, [args], 0)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "lens.json").write_text("{}")
    with pytest.raises(data.LensError, match="holds a run already"):
        align.open_output(args, [args], 0)


def test_each_process_reads_its_share_of_the_answers(one_process, tmp_path, monkeypatch):
    """Files of four processes, read by three: each answer once, whoever made it."""
    shared = SharedArgs()
    kept = align.OwnAnswers(tmp_path, shared, 0, 1)
    for rank in range(4):
        file = tmp_path / kept.path.name.replace(".0.jsonl", f".{rank}.jsonl")
        file.write_text(f'["key {rank}", [{rank}]]\n["cut')
    monkeypatch.setattr(align.OwnAnswers, "gather", lambda self, mine: mine)
    found = [align.OwnAnswers(tmp_path, shared, rank, 3).known for rank in range(3)]
    assert sorted(len(part) for part in found) == [1, 1, 2]
    together = {key: ids for part in found for key, ids in part.items()}
    assert together == {f"key {rank}": [rank] for rank in range(4)}


def test_the_best_by_masks_or_by_boxes():
    assert train_rl.val_score({"step": 1}) == -1
    assert train_rl.val_score({"val_giou": 0.2, "val_box_iou": 0.5}) == 0.2
    assert train_rl.val_score({"val_box_iou": 0.5}) == 0.5


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
    """Run a script in this process -> what it says when it refuses, which must be one message and
    no traceback."""
    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, flags)])
        monkeypatch.chdir(ROOT)
        try:
            with pytest.raises(SystemExit) as stopped:
                align.run(script.main)
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
    (align, ("--sam", "sam2_hiera_large.pt"),
     ("sam2_hiera_large.pt is missing", "Download it", "--preset tiny")),
    (align, ("--sam", "docs"), ("docs/config.yaml is missing", "config.yaml and model.pt")),
    (align, ("--sam", "sam9.pt"), ("sam9.pt", "sam2_hiera_large.pt")),
    (align, ("--export",), ("--export", "it goes with --resume")),
    (train_rl, ("--export",), ("--export", "it goes with --resume")),
    (align, ("--resume",), ("--resume: no checkpoint in", "run/checkpoints")),
    (train_rl, ("--resume",), ("--resume: no checkpoint in", "run/checkpoints")),
    (align, ("--resume", "--export"),
     ("--resume: no checkpoint in", "run/checkpoints", "without --resume")),
    (train_rl, ("--resume", "--export"),
     ("--resume: no checkpoint in", "run/checkpoints", "without --resume")),
    (align, ("--profile", "theirs"), ("--profile", "released")),
    (align, ("--positions", "2d"), ("--positions", "mrope", "1d")),
    (align, ("--sam", "facebook/sam2-hiera-large"),
     ("hf download facebook/sam2-hiera-large sam2_hiera_large.pt --local-dir weights",)),
    (align, ("--connector-heads", 7), ("--connector-heads 7", "hidden size")),
    (align, ("--max-prompt", 50), ("tokens, the limit is 50", "--max-prompt", "--max-pixels")),
    (train_rl, ("--init", "nowhere"), ("nowhere", "lens.json is missing", "align.py")),
    (evaluate, (), ("--checkpoint is missing",)),
    (evaluate, ("--prompt-with", "box", "--splits", "test"), ("'test'", "val, testA, testB")),
    (evaluate, ("--prompt-with", "box", "--image", "none.png", "--text", "x"), ("none.png",)),
    (evaluate, ("--curves", "nowhere"), ("nowhere",)),
    (evaluate, ("--prompt-with", "box", "--image", "docs/shapes.png", "--text", "x", "--output",
                "overlay"), ("--output overlay", ".png")),
])
def test_bad_input_is_one_clear_error(module, flags, parts, world, tmp_path, refused):
    output = () if module is evaluate else ("--output", tmp_path / "run", "--steps", 1)
    message = refused(module, "--preset", "tiny", "--data", world, *flags, *output)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("module", [align, train_rl])
def test_without_preset_and_data_it_says_what_to_download(module, tmp_path, refused):
    message = refused(module, "--output", tmp_path / "run")
    assert all(part in message
               for part in ("datasets/refer_seg/refcoco", "Download", "--preset tiny"))


def test_from_the_shell_an_error_is_one_line(tmp_path):
    done = run(sys.executable, "align.py", "--output", tmp_path / "run", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("align.py: error: datasets/refer_seg")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_line_whoever_reads_it(workers, world, tmp_path):
    """Also when a process of the loader meets it, whose error comes with its traceback."""
    shutil.copytree(world, tmp_path / "world")
    for picture in (tmp_path / "world").rglob("*.jpg"):
        picture.write_bytes(b"broken")
    done = script("align.py", "--data", tmp_path / "world", "--output", tmp_path / "run", "--steps",
                  1, "--batch", 2, "--micro-batch", 2, "--workers", workers, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error, = [line for line in done.stderr.splitlines() if "rror" in line]
    assert re.search(r"align.py: error: .*/COCO_train2014_\d+.jpg: .*readable picture", error)


def test_a_run_is_never_overwritten(world, aligned, refused):
    message = refused(align, "--preset", "tiny", "--data", world, "--output", aligned)
    assert all(part in message for part in (str(aligned), "--resume", "--output"))


def test_checkpoint_of_another_architecture(world, aligned, tmp_path, refused):
    other = tmp_path / "other"
    other.mkdir()
    for file in ("context.safetensors", "sam.safetensors"):
        (other / file).write_bytes((aligned / file).read_bytes())
    settings = (aligned / "lens.json").read_text()
    (other / "lens.json").write_text(settings.replace('"num_queries": 8', '"num_queries": 4'))
    message = refused(train_rl, "--preset", "tiny", "--data", world, "--init", other, "--output",
                      tmp_path / "run")
    assert "context.safetensors" in message and "another architecture" in message


def test_a_flag_that_contradicts_the_checkpoint(world, aligned, tmp_path, refused):
    message = refused(train_rl, "--preset", "tiny", "--data", world, "--init", aligned,
                      "--num-queries", 4, "--output", tmp_path / "run")
    assert str(aligned) in message and "--num-queries 8, not 4" in message


def test_defaults_are_of_class_preset_run_and_flags_in_this_order(aligned, tmp_path, monkeypatch):
    settings = (aligned / "lens.json").read_text().replace('"num_queries": 8', '"num_queries": 5')
    (tmp_path / "lens.json").write_text(settings.replace('"limit": 0', '"limit": 3'))
    parse = partial(parsed, monkeypatch)
    shared, args = parse(train_rl, train_rl.RLArgs)
    assert (shared.num_queries, shared.mllm) == (64, "Qwen/Qwen2.5-VL-3B-Instruct")
    assert (args.batch, args.lr) == (64, 3e-6)
    shared, args = parse(train_rl, train_rl.RLArgs, "--preset", "tiny", "--init", tmp_path, "--lr",
                         0.5)
    assert (shared.num_queries, shared.datasets) == (5, ["shapes"])
    assert (args.batch, args.lr, args.group_size) == (12, 0.5, 8)
    shared, args = parse(evaluate, evaluate.EvaluateArgs, "--checkpoint", tmp_path)
    assert (shared.num_queries, shared.mllm) == (5, "tests/tiny/mllm")
    assert (shared.limit, args.eval_batch) == (0, 8)
    shared, _ = parse(evaluate, evaluate.EvaluateArgs, "--preset", "tiny", "--checkpoint", tmp_path,
                      "--num-queries", 6)
    assert (shared.num_queries, shared.limit) == (6, 1000)


def test_resuming_with_another_architecture(world, aligned, tmp_path, refused):
    message = refused(align, "--preset", "tiny", "--data", world, "--output", aligned, "--resume",
                      "--steps", 4, "--batch", 8, "--micro-batch", 4, "--num-queries", 4)
    assert "step_000002 does not fit" in message and "that run's flags" in message


@pytest.mark.parametrize("rate", [1e30, 1e10])
def test_nan_stops_before_the_update_and_keeps_the_checkpoint(rate, world, aligned, tmp_path,
                                                              refused):
    out = tmp_path / "run"
    message = refused(train_rl, "--preset", "tiny", "--data", world, "--init", aligned, "--output",
                      out, "--steps", 6, "--batch", 2, "--micro-batch", 2, "--group-size", 2,
                      "--save-every", 1, "--lr", rate, "--warmup", 0)
    assert all(part in message
               for part in ("nan", "stopped before the update", "checkpoints", "--resume"))
    assert list((out / "checkpoints").glob("step_*")) and not (out / "lens.json").exists()


@pytest.mark.parametrize("module", [align, train_rl, evaluate])
def test_help_explains_every_field(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--preset", "--num-queries", "--seed"))
    own = {align: "AlignArgs", train_rl: "RLArgs", evaluate: "EvaluateArgs"}[module]
    for field in [*fields(SharedArgs), *fields(getattr(module, own))]:
        assert field.metadata["help"].split()[0] in text and len(field.metadata["help"]) > 8
