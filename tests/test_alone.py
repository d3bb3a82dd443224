"""The seven files stand alone: copied into an empty folder they train and evaluate, and of grpo.py
and rewards.py the copy alone runs the README's example and packs a group."""
import ast
import json
import re
import shutil
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, rows, run

# in the order in which they import each other
SCRIPTS = ["rewards.py", "grpo.py", "data.py", "model.py", "align.py", "train_rl.py", "evaluate.py"]


def python(code, *arguments, folder):
    """Run `code` in `folder`, where Python finds only what lies there and installed packages."""
    return run(sys.executable, "-c", code, *arguments, cwd=folder,
               env={**ENVIRONMENT, "PYTHONPATH": ""})


def test_only_the_seven_files_are_at_the_top():
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(SCRIPTS)


PACKED = """
from grpo import pack_groups, packed_attention

prompt, completions = torch.tensor([7, 8]), [torch.tensor([5]), torch.tensor([6, 9])]
packed = pack_groups([prompt], [torch.arange(2).expand(3, -1)], [completions], M=2)
assert packed.ids.tolist() == [[7, 8, 5, 0, 0, 6, 9, 0, 0]]
assert packed_attention(*torch.randn(3, 1, 4, 9, 8), packed, 1.0).shape == (1, 9, 4, 8)
"""


def test_a_copy_of_grpo_and_rewards_runs_the_readmes_example_and_packs_a_group(tmp_path):
    for name in ("grpo.py", "rewards.py"):
        shutil.copy(ROOT / name, tmp_path)
    examples = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example, = [code for code in examples if "from grpo import" in code]
    assert "from rewards import" in example
    python(example + PACKED, folder=tmp_path)


ALL_THREE = """
import json, sys
import align, evaluate, train_rl

for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    align.run({"align.py": align, "train_rl.py": train_rl, "evaluate.py": evaluate}[script].main)
"""


def test_a_copy_of_the_seven_files_trains_and_evaluates(world, tmp_path):
    """Two steps of both stages and the table, in one process. The stand-ins and the data lie
    elsewhere and are named by flags."""
    alone, stand_ins = tmp_path / "alone", tmp_path / "stand-ins"
    alone.mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / name, alone)
    for part in ("mllm", "sam"):
        shutil.copytree(ROOT / "tests/tiny" / part, stand_ins / part)
    shared = ["--preset", "tiny", "--data", world, "--max-completion", 32,
              "--mllm", stand_ins / "mllm", "--sam", stand_ins / "sam"]
    steps = ["--steps", 2, "--batch", 4, "--micro-batch", 2]
    commands = [["align.py", *shared, *steps],
                ["train_rl.py", *shared, *steps, "--group-size", 2],
                ["evaluate.py", *shared, "--checkpoint", "runs/tiny/rl", "--limit", 4,
                 "--json", "result.json"]]
    commands = [[str(word) for word in command] for command in commands]
    table = python(ALL_THREE, json.dumps(commands), folder=alone).stdout
    assert [len(rows(alone / "runs/tiny" / stage)) for stage in ("align", "rl")] == [2, 2]
    assert json.loads((alone / "result.json").read_text())["val"]["n"] == 4
    assert "gIoU" in table
    assert (alone / "runs/tiny/rl/mllm/model.safetensors").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_run_one_way_and_never_into_tests(name):
    """A file imports the standard library, packages and those of the seven that stand before it,
    by their plain names: it neither computes a name nor changes where Python looks. grpo.py and
    rewards.py need no package but torch."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path")
        if isinstance(node, ast.Name):
            assert node.id not in ("__import__", "exec", "eval")
    below_tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    later = {script.removesuffix(".py") for script in SCRIPTS[SCRIPTS.index(name):]}
    assert not modules & (below_tests | later | {"importlib", "runpy"})
    if name in ("grpo.py", "rewards.py"):
        assert modules - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_lines_have_at_most_100_columns(name):
    """Only a URL may be wider."""
    wide = [line for line in (ROOT / name).read_text().splitlines() if len(line) > 100]
    assert all("http" in line for line in wide), wide
