"""The README's own commands and code, run as a reader would."""
import ast
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
import misguided
import model
import proof
import report
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
    assert proof.summary(json.loads((ROOT / "docs/proof.json").read_text())) in README
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


def test_what_the_text_says_of_results():
    """Sentences of the README with the numbers that their files hold."""
    read = lambda name: json.loads((ROOT / f"docs/{name}.json").read_text())
    proved, wrong, failed, real = read("proof"), read("misguided")["means"], read("failures"), read("real")
    gain = lambda what: [gains[0] for name, gains in proved["gains"].items() if name.endswith(what)]
    mean = lambda variant, mode, key: sum(proved["means"][f"{variant}-{seed} {mode}"][key] for seed in (1, 2, 3)) / 3
    reward, box, base = gain("sampled reward"), gain("greedy box_iou"), [proved["means"][f"base-0 {m}"]["giou"]
                                                                         for m in ("greedy", "sampled")]
    over_b = [gains[0] for name, gains in proved["gains"].items() if name.endswith("align, greedy giou")]
    policy, both, _ = read("tried")["gradient norm of the first four steps"].values()
    kl = [json.loads(line)["kl"] for line in (ROOT / "docs/rl_metrics.jsonl").read_text().splitlines()]
    path = read("newcomer")["seconds"]
    suite, toy = real["GroundingSuite-Eval"], real["released code, largest differences"]
    for sentence in (
            f"sampled reward (+{min(reward):.2f} to +{max(reward):.2f} over stage 1 and both controls) and the greedy box "
            f"(+{min(box):.2f} to +{max(box):.2f} IoU)",
            f"format in {100 * mean('rl', 'sampled', 'format'):.0f} % instead of {100 * mean('align', 'sampled', 'format'):.0f} %",
            f"(c) beats (b) by {min(over_b):.2f}-{max(over_b):.2f} mask IoU",
            f"greedy masks ({base[0]:.3f}) than any", f"({base[1]:.3f} against {mean('rl', 'sampled', 'giou'):.3f})",
            f"(gIoU {proved['means']['align-1 greedy']['giou']:.3f} against "
            f"{proved['means']['align_true-1 greedy']['giou']:.3f} on the same seed)",
            f"(norm {min(both):.0f} to {max(both):.0f} against {sum(policy) / 4:.1f})",
            f"settles ({sum(kl[-25:]) / 25:.2f} here)",
            f"boxes' IoU falls ({failed['healthy']['box_iou']:.2f} to {failed['full-picture boxes']['box_iou']:.2f}, by",
            f"grow to {failed['full-picture boxes']['area'] / failed['healthy']['area']:.1f} times their area",
            f"packages {path['environment and packages']} s, both stages and the evaluation {path['both stages and evaluation']} "
            f"s in all, a picture of one's own {path['own picture']} s",
            f"all {suite['records']:,} records", f"a mean IoU of {suite['mean IoU of box and mask extent']} with"):
        assert sentence in re.sub(r"\s+", " ", README), sentence
    assert base[0] > max(m["giou"] for name, m in proved["means"].items() if "greedy" in name and "base" not in name)
    assert max(kind["logits"] for kind in toy.values()) < 1e-5 and max(kind["low_res_masks"] for kind in toy.values()) < 5e-5
    assert wrong["own box"][1] - min(wrong[name][1] for name in misguided.CORRUPTIONS) < 0.02


def test_what_the_text_says_of_ablations():
    def mean(table, row, key="ciou", mode="greedy"):
        found = [line[mode][key] for line in ablate.finished() if (line["table"], line["row"]) == (table, row)]
        return f"{100 * sum(found) / len(found):.1f}"
    lisa = [100 * line["greedy"]["ciou"] for line in ablate.finished() if line["row"] == "LISA-like baseline"]
    bare, whole = "context, no alignment, R_box + R_format", "context, alignment, R_box + R_format"
    clipped = [line["tail"]["clip_fraction"] for line in ablate.finished() if line["row"] == "4 updates per batch"]
    for sentence in (
            f"({mean('table3', 'M = 1, own answer')} against {mean('table3', 'M = 4, own answer')} with four)",
            f"{mean('table3', 'M = 8, true box')} against {mean('table3', 'M = 8, own answer')} at M = 8",
            f"MLP, {mean('table4', 'ViT, own answer')} against {mean('table4', 'MLP, own answer')}",
            f"around ({mean('table4', 'ViT, own answer, one prompt token')} against "
            f"{mean('table4', 'MLP, own answer, one prompt token')})",
            f"baseline {mean('table5', 'LISA-like baseline')} ({min(lisa):.0f} to {max(lisa):.0f} from seed to seed), no alignment "
            f"{mean('table5', bare)}, alignment {mean('table5', whole)}, with R_seg {mean('table5', whole + ' + R_seg')}",
            f"brings the baseline to {mean('table5', 'LISA-like, twice the steps')}",
            f"half of the steps the gap is {mean('rewards', 'no alignment')} to {mean('rewards', 'default')}",
            f"{mean('rewards', 'context module at the MLLM' + chr(39) + 's rate, no alignment')} to "
            f"{mean('rewards', 'context module at the MLLM' + chr(39) + 's rate')} (one seed",
            f"in {mean('rewards', 'no R_format', 'format', 'sampled')} % instead of {mean('rewards', 'default', 'format', 'sampled')} %",
            f"box IoU is {mean('rewards', 'no R_box', 'box_iou')} instead of {mean('rewards', 'default', 'box_iou')}, below the "
            f"{mean('table5', 'stage 1 alone', 'box_iou')} before stage 2",
            f"about a point, {mean('rewards', 'alpha = 0')} against {mean('rewards', 'default')}",
            "box IoU " + ", ".join(mean("group", f"G = {G}", "box_iou") for G in (2, 4, 8, 16)) + " and format, sampled, " +
            ", ".join(mean("group", f"G = {G}", "format", "sampled") for G in (2, 4, 8, 16)),
            f"{mean('method', '4 updates per batch')} against {mean('rewards', 'default')}", f"{100 * clipped[0]:.1f} % of the tokens"):
        assert sentence in re.sub(r"\s+", " ", README), sentence


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


def test_what_each_file_imports():
    for name, listed in re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", README, re.M):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names)
        assert set(re.findall(r"\w+", listed.replace(".py", ""))) == imported, name
    assert len(re.findall(r"^\| `\w+\.py` \|", README, re.M)) == 7


def test_published_numbers():
    for name, values in report.TABLE_1.items():
        row = re.search(rf"^\| {re.escape(name)} +\|(.*)\|$", README, re.M)[1]
        assert [cell.strip() for cell in row.split("|")] == ["-" if value is None else f"{value:.1f}" for value in values]
    assert all(f"{giou} / {ciou}" in README for giou, ciou in report.TABLE_2.values())


def test_only_the_cards_files():
    """Seven scripts, at most 2,400 lines together."""
    scripts = sorted(p.name for p in ROOT.glob("*.py"))
    assert scripts == ["align.py", "data.py", "evaluate.py", "grpo.py", "model.py", "rewards.py", "train_rl.py"]
    assert sum(len((ROOT / name).read_text().splitlines()) for name in scripts) <= 2400


if __name__ == "__main__":
    (ROOT / "README.md").write_text(anchored(README))
