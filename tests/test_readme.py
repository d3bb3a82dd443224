"""The README's own commands and code, run as a reader would."""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT

import ablate
import align
import benchmark
import data
import grpo
import model
import proof
import rewards
import train_rl
from model import SharedArgs

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    """The tiny preset's commands, each once, in order: all but set-up and pytest."""
    lines = [part.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]
    return list(dict.fromkeys(line for line in lines if "tiny" in line))


def test_commands(tmp_path):
    """On a copy without any earlier run, two steps and eight rows each."""
    for pattern in ("*.py", "docs/shapes.png", "tests/*.py", "tests/extras/*.py"):
        for path in ROOT.glob(pattern):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "tests/tiny")
    found = commands()
    assert [re.search(r"(\w+)\.py", line)[1] for line in found] == ["align", "train_rl", "evaluate", "evaluate"]
    for line in found:
        line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
        line = re.sub(r"^python ", f"{sys.executable} ", line)
        line += " --limit 8" + ("" if "evaluate" in line else " --steps 2")
        done = subprocess.run(shlex.split(line), cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": ""}, capture_output=True,
                              text=True)
        assert done.returncode == 0, line + done.stdout[-1000:] + done.stderr[-3000:]
    assert (tmp_path / "overlay.png").exists() and (tmp_path / "runs/tiny/rl/mllm/model.safetensors").exists()


def test_example_of_copying():
    space = {}
    exec(blocks("python")[0], space)
    assert space["rewards"].tolist() == [1.5, 0.0]
    assert space["advantages"].tolist() == pytest.approx([1.0, -1.0], abs=1e-3)
    assert space["loss"].item() == pytest.approx(0.0, abs=1e-6) and space["log_probs"].grad.abs().sum() > 0


def anchored(text):
    """The text with every [`name`](file.py#L...) pointing at the line where that name is defined."""
    def line(match):
        source = (ROOT / match[2]).read_text().splitlines()
        found = [n for n, code in enumerate(source, 1) if re.match(rf"(def|class) {match[1]}\b", code)]
        return f"[`{match[1]}`]({match[2]}#L{found[0]})"
    return re.sub(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)", line, text)


def test_links_lead_to_their_functions():
    assert "(grpo.py#L" in README and anchored(README) == README, "python tests/test_readme.py mends the line numbers"


def test_links_and_names():
    """Every file that is linked exists, and every function named beside a file is in it."""
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    for row in re.findall(r"^\| \[(\w+\.py)\]\S+ \| (.*?) \|", README, re.M):
        source = (ROOT / row[0]).read_text()
        for name in re.findall(r"`(\w+)`", row[1]):
            assert re.search(rf"^(def|class) {name}\b|^{name} =", source, re.M) or f"def {name}" in source, (row[0], name)


def test_numbers_come_from_docs():
    """The results table is docs/proof.md, that of quartiles in docs/tiny.md, and the times are the sums of `seconds` in the
    runs' own metrics."""
    assert (ROOT / "docs/proof.md").read_text().strip() in README
    assert (ROOT / "docs/tiny.md").read_text().strip().split("\n\n")[-1] in README
    for name in ("misguided", "failures"):
        for block in (ROOT / f"docs/{name}.md").read_text().strip().split("\n\n")[1:]:
            assert block in README
    assert f"<!-- docs/ablations.md -->\n{(ROOT / 'docs/ablations.md').read_text()}<!-- end -->" in README
    results = json.loads((ROOT / "docs/benchmark.json").read_text())["results"]
    assert "\n".join(benchmark.summary(results)) in README
    for stage in ("align", "rl"):
        rows = [json.loads(line) for line in (ROOT / f"docs/{stage}_metrics.jsonl").read_text().splitlines()]
        assert f"{sum(row['seconds'] for row in rows):.0f} s (docs/{stage}_metrics.jsonl)" in README


def test_plan_numbers(monkeypatch, capsys):
    """The table's last column is what --plan computes where attention is not fused, the larger of its two sums."""
    table = re.findall(r"^\| .* \| `(--gpus .*)` \| ([\d.]+) \|$", README, re.M)
    assert len(table) == 3
    for flags, gigabytes in table:
        monkeypatch.setattr(sys, "argv", ["train_rl.py", "--plan", *flags.split()])
        train_rl.main()
        text = capsys.readouterr().out
        assert re.findall(r": ([\d.]+) GB, fits", text)[-1] == gigabytes
    monkeypatch.setattr(sys, "argv", "train_rl.py --plan --max-prompt 600 --max-completion 150".split())
    train_rl.main()
    flops, seconds = re.search(r"all (\d+): ([\d.]+) s at 100", capsys.readouterr().out).groups()
    steps = train_rl.plan_steps(train_rl.RLArgs(), 16, sum(data.DATASETS[n]["train"][0] for n in SharedArgs().datasets))
    assert f"a step counts {flops} TFLOP" in README and f"16 of them: {seconds} s" in README and f"{steps:,} steps" in README
    shards = float(re.search(r"starts, ([\d.]+) GB of shards", text)[1])
    assert f"lie in CPU memory ({shards:.0f} GB)" in README


def test_ablation_tables_are_made_from_their_lines():
    assert ablate.markdown(ablate.finished()) == (ROOT / "docs/ablations.md").read_text()


def test_proof_table_is_made_from_its_numbers():
    assert proof.table(json.loads((ROOT / "docs/proof.json").read_text())) == (ROOT / "docs/proof.md").read_text()


EQUATIONS = {1: model.generate, 2: model.group_hidden, 3: model.Connector, 4: model.SamHead, 5: align.segmentation_loss,
             6: grpo.group_advantages, 7: grpo.group_advantages, 8: grpo.clipped_objective, 9: grpo.kl_k3, 10: grpo.grpo_loss,
             11: rewards.unified_reward, 12: train_rl.policy_pass}


def test_every_equation_of_the_paper_has_a_function():
    assert list(EQUATIONS) == list(range(1, 13))
    for number, function in EQUATIONS.items():
        assert re.search(rf"Eqs?\. (\d+(,| and|-) )*{number}\b", function.__doc__), (number, function)


def test_only_the_cards_files():
    """Seven scripts, at most 2,400 lines together."""
    scripts = sorted(p.name for p in ROOT.glob("*.py"))
    assert scripts == ["align.py", "data.py", "evaluate.py", "grpo.py", "model.py", "rewards.py", "train_rl.py"]
    assert sum(len((ROOT / name).read_text().splitlines()) for name in scripts) <= 2400


if __name__ == "__main__":
    (ROOT / "README.md").write_text(anchored(README))
