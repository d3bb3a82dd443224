"""The seven files stand alone: they load nothing below tests/, run in a folder that holds nothing
else, and each is read at one sitting."""
import ast
import json
import shutil
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, rows, run

SCRIPTS = ["align.py", "data.py", "evaluate.py", "grpo.py", "model.py", "rewards.py", "train_rl.py"]


def test_only_the_cards_files():
    assert sorted(path.name for path in ROOT.glob("*.py")) == SCRIPTS


def test_a_copy_of_the_files_alone_trains_and_evaluates(world, tmp_path):
    """With requirements.txt in an otherwise empty folder; the stand-ins and the world are elsewhere
    and named by flags. Two steps of both stages, then the table."""
    alone, stand_ins = tmp_path / "alone", tmp_path / "stand-ins"
    alone.mkdir()
    for name in [*SCRIPTS, "requirements.txt"]:
        shutil.copy(ROOT / name, alone)
    for part in ("mllm", "sam"):
        shutil.copytree(ROOT / "tests/tiny" / part, stand_ins / part)

    def call(script, *flags):
        return run(sys.executable, script, "--preset", "tiny", "--mllm", stand_ins / "mllm",
                   "--sam", stand_ins / "sam", "--data", world, *flags, cwd=alone,
                   env={**ENVIRONMENT, "PYTHONPATH": ""})

    few = ["--steps", 2, "--batch", 4, "--micro-batch", 2]
    call("align.py", *few)
    call("train_rl.py", *few, "--group-size", 2)
    table = call("evaluate.py", "--checkpoint", "runs/tiny/rl", "--limit", 4, "--json", "out.json")
    assert [len(rows(alone / "runs/tiny" / stage)) for stage in ("align", "rl")] == [2, 2]
    assert json.loads((alone / "out.json").read_text())["val"]["n"] == 4
    assert "gIoU" in table.stdout
    assert (alone / "runs/tiny/rl/mllm/model.safetensors").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_below_tests_is_loaded(name):
    """Its imports are Python's, a package's or one of the seven; it neither imports by a name that
    it computes nor changes where Python looks."""
    below_tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported = [node.module]
        for module in imported:
            assert module.split(".")[0] not in below_tests | {"importlib", "runpy"}, module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path")
        if isinstance(node, ast.Name):
            assert node.id not in ("__import__", "importlib", "exec", "eval")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_is_read_at_one_sitting(name):
    """At most 700 lines of at most 100 columns; a table's row or a URL may be wider."""
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= 700
    wide = [line for line in lines if len(line) > 100]
    assert all("http" in line or line.lstrip().startswith("|") for line in wide), wide
