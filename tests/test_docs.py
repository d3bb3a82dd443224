"""The README and the pages in docs/: commands run, links lead somewhere, tables are those of the
files behind them. `python tests/evidence/pages.py` mends line numbers and tables."""
import inspect
import re
import shlex
import sys

import conftest
import pytest
from conftest import ROOT, call

import ablations
import align
import benchmark
import first_stage
import grpo
import model
import pages
import peers
import plan
import proof
import rewards
import train_rl
from tiny_runs import EVIDENCE, read_json, read_lines

README = (ROOT / "README.md").read_text()


def page(name):
    return (ROOT / name).read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


# --- Commands and code ----------------------------------------------------------------------------

def tiny_commands():
    """The README's commands for the tiny preset, each once, in order -> [script, flags]"""
    commands = []
    for line in "\n".join(blocks("bash")).splitlines():
        for part in line.rstrip("\\").split("&&"):
            _, script, flags = re.match(r"(.*?)([\w/]+\.py|$)(.*)", part.split("#")[0]).groups()
            command = [script.rpartition("/")[2], shlex.split(flags)]
            if "tiny" in script + flags and command not in commands:
                commands.append(command)
    return commands


def test_the_readmes_commands(world, tmp_path, monkeypatch):
    """From a folder without any earlier run; one step and eight rows each."""
    for name in ("tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(conftest, "ROOT", tmp_path)              # where `call` runs a script
    write_world, *commands = tiny_commands()
    assert write_world == ["world.py", ["runs/shapes"]]          # as test_tiny.py does
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/shapes").symlink_to(world)
    assert [script for script, _ in commands] == ["align.py", "train_rl.py", "evaluate.py",
                                                  "evaluate.py"]
    for script, flags in commands:
        call(script, *flags, "--limit", 8, *([] if script == "evaluate.py" else ["--steps", 1]),
             preset="")
    assert (tmp_path / "overlay.png").exists()
    assert (tmp_path / "runs/tiny/rl/mllm/model.safetensors").exists()


def test_the_example_of_copying():
    space = {}
    exec(blocks("python")[0], space)
    assert space["rewards"].tolist() == [1.5, 0.0]
    assert space["advantages"].tolist() == pytest.approx([1.0, -1.0], abs=1e-3)
    assert space["log_probs"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*pages.PAGES, "tests/README.md"])
def test_scripts_that_are_named_exist(name):
    scripts = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")}
    names = {path.rpartition("/")[2] for path in scripts}
    for script in re.findall(r"(?<![\w/.])([\w/]+\.py)\b", page(name).replace("NAME.py", "")):
        assert script in scripts or script in names, script


def test_every_script_is_in_the_list():
    """tests/README.md has a line for every script in the folders of tests/."""
    listed = re.findall(r"^\| `(\w+\.py)` \|", page("tests/README.md"), re.M)
    scripts = [path.name for path in (ROOT / "tests").rglob("*.py")
               if not path.name.startswith("test_")]
    assert sorted(name for name in listed if not name.startswith("test_")) == sorted(scripts)


# --- Links ----------------------------------------------------------------------------------------

def anchors(path):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*pages.PAGES, "tests/README.md", *(
    f"docs/evidence/{path.name}" for path in sorted(EVIDENCE.glob("*.md")))])
def test_linked_files_and_headings_exist(name):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page(name)):
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_names_beside_files():
    """Every name beside a file of the README's table is in that file."""
    rows = re.findall(r"^\| \[(\w+\.py)\]\S+ \| (.*?) \|", README, re.M)
    assert sorted(file for file, _ in rows) == sorted(pages.FILES)
    for file, text in rows:
        for name in re.findall(r"`(\w+)`", text):
            assert re.search(rf"^ *(def|class) {name}\b|^{name} =", page(file), re.M), (file, name)


EQUATIONS = {1: train_rl.generate, 2: model.forward_one, 3: model.Connector, 4: model.SamHead,
             5: align.segmentation_loss, 6: grpo.group_advantages, 7: grpo.group_advantages,
             8: grpo.clipped_objective, 9: grpo.kl_k3, 10: grpo.grpo_loss,
             11: rewards.unified_reward, 12: train_rl.backward}


@pytest.mark.parametrize("number", EQUATIONS)
def test_every_equation_has_a_function(number):
    function = EQUATIONS[number]
    assert re.search(rf"Eqs?\. (\d+(,| and|-) )*{number}\b", inspect.getsource(function))
    assert f"[`{function.__name__}`](" in README


# --- Tables and numbers ---------------------------------------------------------------------------

TABLES = {"README.md": ["README"], "docs/speed.md": ["pair"],
          "docs/results.md": ["proof", "failures", "evaluation", "misguided boxes",
                              "misguided texts"],
          "docs/checked.md": ["released code"]}


@pytest.mark.parametrize("name", pages.PAGES)
def test_tables_and_line_numbers_are_up_to_date(name):
    text = page(name)
    assert re.findall(r"<!-- table ([\w ]+) -->", text) == TABLES.get(name, [])
    assert pages.up_to_date(text) == text, "python tests/evidence/pages.py mends this"


def test_pages_are_made_from_their_numbers():
    texts = {"proof": proof.page(read_json("proof")),
             "ablations": ablations.page(read_lines(EVIDENCE / "ablations.jsonl")),
             "first_stage": first_stage.page(read_json("first_stage")),
             "benchmark": benchmark.page(read_json("benchmark")),
             "peers": peers.page(read_json("peers"))}
    for name, text in texts.items():
        assert text == page(f"docs/evidence/{name}.md"), name


def test_every_file_in_docs_has_its_command():
    table = page("docs/checked.md").partition("## Every file in docs/ and its command")[2]
    named = [file for row in re.findall(r"^\| (.*?) \|", table, re.M)
             for file in re.findall(r"[\w/]+\.\w+", row)]
    files = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.*")]
    assert sorted(named) == sorted(map(str, files))


def test_the_plans_numbers(monkeypatch, capsys):
    """The table's last column is what plan.py computes if attention is not fused, which is the
    larger of its two sums."""
    table = re.findall(r"^\| .* \| `(--gpus .*)` \| ([\d.]+) \|$", page("docs/speed.md"), re.M)
    assert len(table) == 3
    for flags, gigabytes in table:
        monkeypatch.setattr(sys, "argv", ["plan.py", *flags.split()])
        plan.main()
        assert re.findall(r": ([\d.]+) GB, fits", capsys.readouterr().out)[-1] == gigabytes
