"""The pages say what the code and the records say: names exist, examples run, tables are
current."""

from __future__ import annotations

import itertools
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import architecture, readme, records
from jepa_kernels import BackendUnsupportedError, masked_attention

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPS = sorted(p.parent.name for p in (ROOT / "jepa_kernels" / "ops").glob("*/api.py"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def code_of(page: Path) -> list[str]:
    """What stands between backticks, and the lines of code blocks."""
    text = page.read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    words = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*words, *(line.strip() for block in blocks for line in block.splitlines())]


def run(*command: str, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    return child.stdout


def test_generated_parts_and_pictures_are_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    assert readme.main() == 0, capsys.readouterr().err
    stale = "<!-- generated: variants -->\nan old table\n<!-- end -->"
    assert "`fwm_hw_ld`" in readme.filled(stale, ROOT)


def test_the_readme_takes_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    assert 3 <= len(re.findall(r"\|--:\|\n((?:\|.*\n)+)", text)[0].splitlines()) <= 8
    (example,) = python_blocks("README.md")
    assert len([line for line in example.splitlines() if line and not line.startswith("#")]) <= 10
    assert "torch.Size([470, 6, 64])" in run("-c", example)


def test_links_of_the_readme_exist():
    """`make docs` checks those of the other pages."""
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


@each_page
def test_make_targets_exist(page):
    commands = [c for c in code_of(page) if c.startswith("make ")]
    named = {command.split()[1] for command in commands}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


def expanded(path: str) -> list[str]:
    """`a/<op>/{b,c}` as globs, one for each op and each alternative."""
    ways = [[path.replace("<op>", op) for op in OPS] if "<op>" in path else [path]]
    found = list(itertools.chain.from_iterable(ways))
    while any("{" in p for p in found):
        found = [
            before + choice + after
            for p in found
            for before, choices, after in [re.match(r"(.*?)\{(.*?)\}(.*)", p).groups()]
            for choice in choices.split(",")
        ]
    return [re.sub(r"<\w+>", "*", p) for p in found]


@each_page
def test_paths_exist(page):
    pattern = r"(?:jepa_kernels|jepa|csrc|tests|benchmarks|docs|examples)/[\w./<>*{},-]+"
    paths = [c for c in code_of(page) if re.fullmatch(pattern, c)]
    optional = {"jepa/objectives/drift.py"}  # the page tells how to write it
    missing = []
    for path in set(paths) - optional:
        # One cell of latent_rollout has what another op has in its own folder.
        places = {
            p: [p, p.replace("latent_rollout/", "latent_rollout/mlp/")] for p in expanded(path)
        }
        missing += [p for p, ways in places.items() if not any(list(ROOT.glob(w)) for w in ways)]
    assert not missing


@each_page
def test_dotted_names_exist(page):
    pattern = r"((?:jepa_kernels|jepa|benchmarks|tests)(?:\.\w+)+)(?:\(.*\))?"
    names = {m[1] for c in code_of(page) if (m := re.fullmatch(pattern, c))}
    for name in names:
        pkgutil.resolve_name(name)


def test_the_picture_names_what_exists():
    tree = ElementTree.parse(ROOT / "docs" / "pictures" / "architecture.svg")
    texts = list(tree.iter("{http://www.w3.org/2000/svg}text"))
    names = [name for text in texts if (name := text.get("data-name"))]
    assert len(names) >= 20
    for name in names:
        assert (ROOT / architecture.source(name)).is_file()
    with pytest.raises(AttributeError):
        architecture.source("jepa.step.renamed_function")


@pytest.mark.parametrize("op", records.operations())
def test_every_recorded_op_has_a_page_that_explains_its_baselines(op):
    page = (ROOT / "docs" / "measured" / f"{op}.md").read_text()
    assert f"<!-- generated: measured {op} -->" in page
    explained, _, _ = page.partition("<!-- generated")
    tables = [device.tables[op] for device in records.devices() if op in device.tables]
    baselines = {record["baseline"] for table in tables for record in table}
    assert {name for name in baselines if f"`{name}`" not in explained} == set()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_page(op):
    page = (ROOT / "docs" / "ops" / f"{op}.md").read_text()
    for section in ("Equation", "Shapes", "Backends", "Read the code"):
        assert f"\n## {section}\n" in page


def test_first_steps_run():
    code = "\n".join(python_blocks("docs/first-steps.md"))
    assert "runs on    " in run("-c", code)


def test_a_refusal_looks_as_shown():
    x = torch.zeros(1, 4, 2, 8, dtype=torch.float16)
    with pytest.raises(BackendUnsupportedError) as refused:
        masked_attention(x, x, x, backend="cpu")
    assert f"```text\n{refused.value}\n```" in (ROOT / "docs" / "backends.md").read_text()


def test_the_backend_of_the_page_works(tmp_path):
    """Its file and its word, in a copy of the package."""
    source, word = python_blocks("docs/writing-a-backend.md")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jepa_kernels", tmp_path / "jepa_kernels", ignore=ignored)
    folder = tmp_path / "jepa_kernels" / "ops" / "ema_update"
    (folder / "lerp.py").write_text(source)
    contract = (folder / "contract.py").read_text()
    changed = re.sub(r"^PRIORITY = .*$", word.strip(), contract, flags=re.MULTILINE)
    assert changed != contract
    (folder / "contract.py").write_text(changed)
    script = """
import torch
from jepa_kernels import ema_update_, explain
results = []
for backend in ("lerp", "reference"):
    targets, sources = [torch.full((3,), 2.0)], [torch.full((3,), 4.0)]
    ema_update_(targets, sources, 0.75, backend=backend)
    results += targets
assert torch.equal(*results)
copies = [torch.zeros(3)]
print(explain("ema_update", targets, sources, 0.75, copies=copies))
"""
    assert "lerp       no     copies must be None" in run("-c", script, cwd=tmp_path)


def test_the_objective_of_the_page_works(tmp_path):
    """Its file, in a copy of the package, found by its name."""
    source = python_blocks("docs/writing-an-objective.md")[0]
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jepa", tmp_path / "jepa", ignore=ignored)
    (tmp_path / "jepa" / "objectives" / "drift.py").write_text(source)
    script = """
from jepa.objectives import compute_all, names, parse_objectives
from tests.jepa.training_cases import random_context
objectives = parse_objectives({"drift": {}}, "")
loss, metrics = compute_all(random_context(objectives), objectives, {"drift": 0.1})
assert loss.isfinite() and loss > 0
print("drift" in names(), sorted(metrics))
"""
    for name in ("jepa_kernels", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert "True ['drift']" in run("-c", script, cwd=tmp_path)
