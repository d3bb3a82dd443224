"""What stage 2 says about a run: validation and the best model, by one process and by two; the
metrics and the timing of a step."""
import json
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import call, in_two, rows
from training_worker import build, forward_backward, micro_batches, settings

import train_rl
from align import SharedArgs, start_processes

VALUES = ("val_giou", "val_box_iou", "val_acc50")
FIVE_ROWS = partial(train_rl.validation_rows, limit=5)    # they do not split over two processes


@pytest.fixture
def mesh():
    """Of this process alone."""
    yield start_processes(SharedArgs())[3]
    dist.destroy_process_group()


def test_vital_signs_and_timing_by_hand(mesh):
    lens, reference, _ = build("fp32", mesh)
    args = settings(micro_batch=2, updates_per_batch=3)
    whole = micro_batches(lens, reference, args)
    micro = whole[1]                                     # 6 completions, of which 2 were cut
    out, _ = forward_backward(lens, micro, args)
    signs = {name: value.item() for name, value in train_rl.vital_signs(out, micro).items()}
    lengths = micro.packed.mask.sum(1).tolist()
    assert signs["cut"] == pytest.approx(1 / 3) and signs["has_mask"] == 1
    assert signs["completion_length"] == pytest.approx(sum(lengths) / 6)
    spread = torch.tensor([torch.std(row, correction=0) for row in micro.reward]).mean()
    assert signs["reward_spread"] == pytest.approx(spread.item(), abs=1e-6) and spread > 0.01
    micro.reward[0] = 0.5
    assert train_rl.vital_signs(out, micro)["zero_variance"] == 0.5

    samples = train_rl.Samples([[torch.zeros(length) for length in lengths]], [])
    timing = train_rl.timing(whole, samples, args, began=1.0, loaded=1.5, sampled=3.5, updated=7.5)
    trained = 3 * sum(part.packed.ids.numel() for part in whole)
    assert timing.pop("seconds_refresh") > 0
    assert timing == {"speed_sampled": round(sum(lengths) / 2), "speed_trained": round(trained / 4),
                      "seconds_loading": 0.5, "seconds_sampling": 2.0}


# --- Validation -----------------------------------------------------------------------------------

def train(flags, output):
    """Stage 2, with five rows of the validation split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rl, "validation_rows", FIVE_ROWS)
        call("train_rl.py", *flags, "--output", output)


@pytest.fixture(scope="module")
def flags(world, aligned):
    """Rewards are IoU squared; what is validated is not."""
    return ["--data", world, "--init", aligned, "--steps", 2, "--batch", 4, "--micro-batch", 1,
            "--group-size", 2, "--max-completion", 64, "--val-every", 2, "--iou-power", 2,
            "--save-every", 1]


@pytest.fixture(scope="module")
def by_one(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(flags, folder)
    return folder


def test_two_processes_are_like_one(flags, by_one, tmp_path):
    """The same rows are validated, the updates are the same, and the metrics show a healthy run."""
    in_two(train, flags, tmp_path / "two")
    for one, two in zip(rows(by_one), rows(tmp_path / "two"), strict=True):
        assert set(one) == set(two)
        for name in ("loss", "grad_norm", "reward", "cut", "reward_spread", *VALUES):
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), abs=2e-4), name
        for row in one, two:
            assert row["speed_sampled"] > 0 and row["speed_trained"] > 0
            assert row["seconds"] >= row["seconds_sampling"] + row["seconds_refresh"] > 0
            assert "gpu_memory" not in row


def test_validation_is_that_of_evaluate(by_one, world, tmp_path):
    """evaluate.py gives OUTPUT/best the numbers of its row; every second step has them."""
    assert [all(name in row for name in VALUES) for row in rows(by_one)] == [False, True]
    call("evaluate.py", "--checkpoint", by_one / "best", "--data", world, "--splits", "val",
         "--limit", 5, "--json", tmp_path / "val.json")
    metrics = json.loads((tmp_path / "val.json").read_text())["val"]
    assert metrics["n"] == 5 and metrics["box_iou"] > 0.1 and metrics["giou"] > 0
    for name in VALUES:
        expected = metrics[name.removeprefix("val_")]
        assert rows(by_one)[1][name] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("earlier, rewritten", [(0.999, False), (-0.5, True)])
def test_the_best_survives_a_resume(earlier, rewritten, flags, by_one, tmp_path):
    """Resumed from step 1, whose validation was better, or worse, than that of step 2 will be."""
    folder = tmp_path / "run"
    shutil.copytree(by_one, folder)
    shutil.rmtree(folder / "checkpoints/step_000002")
    metrics = rows(folder)
    metrics[0]["val_giou"] = earlier
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "best/context.safetensors").write_bytes(b"of step 1")
    train([*flags, "--resume"], folder)
    context = (folder / "best/context.safetensors").read_bytes()
    assert len(rows(folder)) == 2 and rows(folder)[0]["val_giou"] == earlier
    expected = (folder / "context.safetensors").read_bytes() if rewritten else b"of step 1"
    assert context == expected


def test_where_no_row_has_a_mask_the_box_decides(flags, tmp_path, monkeypatch):
    """The first validation is the best so far, and the second if its boxes are better."""
    validate, exported = train_rl.validate, []

    def boxes_alone(lens, sampler, cache, rows, *more):
        rows = [{**row, "ignore_mask": row["ignore_mask"] | True} for row in rows]
        return validate(lens, sampler, cache, rows, *more)
    monkeypatch.setattr(train_rl, "validate", boxes_alone)
    monkeypatch.setattr(train_rl, "export", lambda folder, *_: exported.append(folder.name))
    train([*flags, "--val-every", 1], tmp_path / "run")
    first, second = rows(tmp_path / "run")
    assert "val_giou" not in first | second
    better = second["val_box_iou"] > first["val_box_iou"] > 0
    assert exported == ["best"] * (1 + better) + ["run"]
