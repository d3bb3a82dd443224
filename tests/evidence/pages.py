"""Brings the README and the pages in docs/ up to date: tables, and line numbers in links.

    python tests/evidence/pages.py

A table stands between <!-- table NAME --> and <!-- end -->, and is made from a file in
docs/evidence by the function that TABLES names. A link to code looks like [`code`](file.py#L1). It
leads to the definition of that name, or to the one line that holds that piece of code.
"""
import re

import benchmark
import failures
import misguided
import proof
from tiny_runs import ROOT, markdown_table, read_json

import evaluate

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FILES = ["grpo.py", "rewards.py", "model.py", "train_rl.py", "align.py", "data.py", "evaluate.py"]


# --- Tables ---------------------------------------------------------------------------------------

def released_table():
    differences = read_json("against_released")
    names = {"logits": "logits of the text", "query_hidden": "query states",
             "sam_embedding": "prompt embeddings for SAM", "low_res_masks": "mask logits"}
    rows = [[title, *(f"{differences[positions][key]:.1e}" for positions in ("1-D", "3-D"))]
            for key, title in names.items()]
    return markdown_table(["", "1-D positions, as in the released code", "3-D positions"], rows)


TABLES = {
    "README": lambda: proof.short_table(read_json("proof"), proof.README_ROWS),
    "proof": lambda: proof.short_table(read_json("proof")),
    "failures": lambda: failures.table(read_json("failures")),
    "evaluation": lambda: evaluate.results_table(read_json("tiny")),
    "misguided boxes": lambda: misguided.box_table(read_json("misguided")["means"]),
    "misguided texts": lambda: misguided.text_table(read_json("misguided")["means"]),
    "pair": lambda: benchmark.pair_table(read_json("benchmark").get("pair")),
    "released code": released_table}


def filled(text):
    """The text with every table made again."""
    def content(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]().rstrip()}\n<!-- end -->"
    return re.sub(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", content, text, flags=re.S)


# --- Links to code --------------------------------------------------------------------------------

def place(code, file):
    """-> FILE#LINE of a name's definition or of a piece of code, in `file`, or in another of the
    seven files if it has moved. AssertionError if several lines have it, or none."""
    wanted = rf"(def|class) {code}\b" if re.fullmatch(r"\w+", code) else rf".*{re.escape(code)}"
    for source in [file, *FILES]:
        lines = (ROOT / source).read_text().splitlines()
        numbers = [number for number, line in enumerate(lines, 1) if re.match(wanted, line)]
        if numbers:
            assert len(numbers) == 1, (code, source, numbers)
            return f"{source}#L{numbers[0]}"
    raise AssertionError(f"{code} is in none of the seven files")


def anchored(text):
    """The text with every link to code leading to the line where that code is now."""
    def link(match):
        code, folder, file = match.groups()
        return f"[`{code}`]({folder}{place(code, file)})"
    return re.sub(r"\[`([^`\n]+)`\]\(((?:\.\./)?)(\w+\.py)#L\d+\)", link, text)


def up_to_date(text):
    return anchored(filled(text))


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(up_to_date((ROOT / name).read_text()))
