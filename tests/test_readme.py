"""The README's own commands and code, run as a reader would; links and tables of the README and of
the pages in docs/.

    python tests/test_readme.py          # mends line numbers of links, fills tables from docs/
"""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, run

import ablate
import align
import benchmark
import evaluate
import failures
import grpo
import misguided
import model
import plan
import proof
import rewards
import train_rl

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "docs/results.md", "docs/speed.md", "docs/data.md", "docs/checked.md",
         "docs/walk.md", "docs/world.md"]
SEVEN = ["data.py", "model.py", "rewards.py", "grpo.py", "align.py", "train_rl.py", "evaluate.py"]


def page(name):
    return (ROOT / name).read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 300


# Commands and code


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands():
    """The tiny preset's commands, each once, in order: all but set-up and pytest."""
    found = []
    for line in "\n".join(blocks("bash")).splitlines():
        for part in line.rstrip("\\").split("&&"):
            command = part.split("#")[0].strip()
            if "tiny" in command and command not in found:
                found.append(command)
    return found


def test_commands(tmp_path):
    """On a copy without any earlier run, two steps and eight rows each."""
    for path in [*ROOT.glob("*.py"), ROOT / "docs/shapes.png", *ROOT.glob("tests/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(ROOT / "tests/tiny", tmp_path / "tests/tiny")
    found = commands()
    scripts = [re.search(r"(\w+)\.py", line)[1] for line in found]
    assert scripts == ["world", "align", "train_rl", "evaluate", "evaluate"]
    for name, line in zip(scripts, found):
        line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
        line = re.sub(r"^python ", f"{sys.executable} ", line)
        line += {"world": "", "evaluate": " --limit 8"}.get(name, " --limit 8 --steps 2")
        done = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True,
                              env={**ENVIRONMENT, "PYTHONPATH": ""})
        assert done.returncode == 0, line + done.stdout[-1000:] + done.stderr[-3000:]
    assert (tmp_path / "overlay.png").exists()
    assert (tmp_path / "runs/tiny/rl/mllm/model.safetensors").exists()


def test_example_of_copying():
    space = {}
    exec(blocks("python")[0], space)
    assert space["rewards"].tolist() == [1.5, 0.0]
    assert space["advantages"].tolist() == pytest.approx([1.0, -1.0], abs=1e-3)
    assert space["loss"].item() == pytest.approx(0.0, abs=1e-6)
    assert space["log_probs"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", PAGES)
def test_scripts_that_are_named_exist(name):
    for script in re.findall(r"\b((?:tests/)?(?:tiny/)?\w+\.py)\b", page(name)):
        assert (ROOT / script).exists() or (ROOT / "tests" / script).exists(), script


# Links


def place(code, file):
    """-> file and line of a piece of code: where a name is defined, or the one line that holds the
    rest; in `file`, or in another of the seven if it has moved."""
    wanted = rf"(def|class) {code}\b" if re.fullmatch(r"\w+", code) else rf".*{re.escape(code)}"
    for source in [file, *SEVEN]:
        found = [number for number, line in enumerate(page(source).splitlines(), 1)
                 if re.match(wanted, line)]
        if found:
            assert len(found) == 1, (code, source, found)
            return f"{source}#L{found[0]}"
    raise AssertionError(f"{code} is in none of the seven files")


def anchored(text):
    """The text with every [`code`](file.py#L...) pointing at the line of that code."""
    def link(match):
        return f"[`{match[1]}`]({match[2]}{place(match[1], match[3])})"
    return re.sub(r"\[`([^`\n]+)`\]\(((?:\.\./)?)(\w+\.py)#L\d+\)", link, text)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_their_functions(name):
    assert anchored(page(name)) == page(name), "python tests/test_readme.py mends the line numbers"


def anchors(path):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_and_headings_exist(name):
    folder = (ROOT / name).parent
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page(name)):
        file, _, anchor = link.partition("#")
        target = folder / file if file else ROOT / name
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_names_beside_files():
    """Every function named beside a file of the table is in it."""
    described = re.findall(r"^\| \[(\w+\.py)\]\S+ \| (.*?) \|", README, re.M)
    assert [file for file, _ in described] == SEVEN
    for file, described in described:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", described):
            assert re.search(rf"^ *(def|class) {name}\b|^{name} =", source, re.M), (file, name)


EQUATIONS = {1: model.generate, 2: model.group_hidden, 3: model.Connector, 4: model.SamHead,
             5: align.segmentation_loss, 6: grpo.group_advantages, 7: grpo.group_advantages,
             8: grpo.clipped_objective, 9: grpo.kl_k3, 10: grpo.grpo_loss,
             11: rewards.unified_reward, 12: train_rl.backward_pass}


def test_every_equation_of_the_paper_has_a_function():
    assert list(EQUATIONS) == list(range(1, 13))
    for number, function in EQUATIONS.items():
        named = rf"Eqs?\. (\d+(,| and|-) )*{number}\b"
        assert re.search(named, function.__doc__), (number, function)
        assert f"[`{function.__name__}`](" in README


def test_the_walk(aligned, tmp_path):
    """On another run: every step is there, the tables agree with each other, links hold."""
    run(sys.executable, "tests/walk.py", aligned, "--row", 3, "--group-size", 3, "--output",
        tmp_path)
    text = (tmp_path / "walk.md").read_text()
    assert re.findall(r"^## (\d+)\.", text, re.M) == [str(n) for n in range(1, 11)]
    assert anchored(text) == text and (tmp_path / "walk.png").exists()
    rewards = [row.split(" | ") for row in re.findall(r"^\| (\d \| (?:none|\(.*\)) .*) \|$", text,
                                                      re.M) if row.count("|") == 5]
    assert len(rewards) == 3
    for *_, r_format, r_box, r_mask, reward in rewards:
        assert float(r_format) + float(r_box) + float(r_mask) == pytest.approx(float(reward),
                                                                               abs=2e-3)
    by_hand = re.findall(r"\| (\(\d.*\) / \(\d.*\)) \| (\S+) \|", text)
    assert len(by_hand) == 3
    for written, advantage in by_hand:
        assert eval(written) == pytest.approx(float(advantage), abs=0.02)


# Tables: each stands in a file that a script wrote, between <!-- docs/NAME.md --> and <!-- end -->


def filled(text):
    """The text with the contents of docs/NAME.md between its marks."""
    def content(match):
        return f"<!-- {match[1]} -->\n{(ROOT / match[1]).read_text().rstrip()}\n<!-- end -->"
    return re.sub(r"<!-- (docs/\w+\.md) -->\n.*?<!-- end -->", content, text, flags=re.S)


SHOWN = {"README.md": ["proof_summary"], "docs/speed.md": ["benchmark_summary"],
         "docs/results.md": ["proof", "ablations", "failures", "tiny", "misguided"]}


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_their_files(name):
    marks = re.findall(r"<!-- docs/(\w+)\.md -->", page(name))
    assert marks == SHOWN.get(name, [])
    assert len(marks) == page(name).count("<!-- end -->")
    assert filled(page(name)) == page(name), "python tests/test_readme.py fills them"


def test_every_file_in_docs_has_its_command():
    table = page("docs/checked.md").partition("## Every file in docs/")[2]
    named = [file for row in re.findall(r"^\| (.*?) \|", table, re.M)
             for file in re.findall(r"\w+\.\w+", row)]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").iterdir())


def read(name):
    return json.loads((ROOT / f"docs/{name}.json").read_text())


def test_files_are_made_from_their_numbers():
    wrong = read("misguided")
    made = {"ablations": ablate.markdown(ablate.finished()),
            "proof": proof.table(read("proof")),
            "proof_summary": proof.summary(read("proof")),
            "failures": failures.table(read("failures")),
            "benchmark_summary": benchmark.summary(read("benchmark")["results"]),
            "misguided": misguided.table(wrong["means"], wrong["rows"]),
            "tiny": evaluate.as_text(read("tiny"))}
    for name, text in made.items():
        assert text.strip() == (ROOT / f"docs/{name}.md").read_text().strip(), name


def test_differences_from_the_released_code_are_those_of_their_file():
    found = read("real")["released code, largest differences"]
    for name, title in (("logits", "logits of the text"), ("query_hidden", "states of the queries"),
                        ("sam_embedding", "prompt embeddings for SAM"),
                        ("low_res_masks", "mask logits")):
        row = f"| {title} | {found['1d'][name]:.1e} | {found['mrope'][name]:.1e} |"
        assert row in page("docs/checked.md"), row


def test_plan_numbers(monkeypatch, capsys):
    """The table's last column is what tests/plan.py computes where attention is not fused, the
    larger of its two sums."""
    table = re.findall(r"^\| .* \| `(--gpus .*)` \| ([\d.]+) \|$", page("docs/speed.md"),
                       re.M)
    assert len(table) == 3
    for flags, gigabytes in table:
        monkeypatch.setattr(sys, "argv", ["plan.py", *flags.split()])
        plan.main()
        text = capsys.readouterr().out
        assert re.findall(r": ([\d.]+) GB, fits", text)[-1] == gigabytes


def test_published_numbers():
    for name, values in evaluate.TABLE_1.items():
        row = re.search(rf"^\| {re.escape(name)} +\|(.*)\|$", page("docs/results.md"), re.M)[1]
        expected = ["-" if value is None else f"{value:.1f}" for value in values]
        assert [cell.strip() for cell in row.split("|")] == expected
    for giou, ciou in evaluate.TABLE_2.values():
        assert f"{giou} / {ciou}" in page("docs/results.md")


def test_parameters_are_those_of_their_file():
    speed = page("docs/speed.md").partition("trained in stage 2 |\n|---|---:|---:|---:|\n")[2]
    rows = speed.partition("\n\n")[0].splitlines()
    assert len(rows) == 7
    assert all(row in page("docs/parameters.md") for row in rows)


def test_what_each_file_imports():
    """What it needs in any case; matplotlib and wandb are asked for by a flag."""
    listed = re.findall(r"^\| \[(\w+)\.py\]\S+ \| .* \| (.*) \|$", README, re.M)
    assert len(listed) == 7
    for name, modules in listed:
        imported = set()
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        imported = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names)
        assert set(re.findall(r"\w+", modules.replace(".py", ""))) == imported, name


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(filled(anchored(page(name))))
