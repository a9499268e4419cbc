"""README and docs/: short where it must be, every link and name resolves, the tree is that of the folders."""

import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from cumo_model.training import recipe
from cumo_model.training.recipe_files import shipped_recipes
from tests import tree
from tests.test_layout import ROOMS, ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LINKED = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page}" for page in PAGES)]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINE, CODE = 124, 100


def prose(text: str) -> str:
    return FENCE.sub("", text)


def test_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    programs = [code for language, code in FENCE.findall(text) if language == "python"]
    lengths = [len([line for line in code.splitlines() if line]) for code in programs]
    assert len(lengths) == 3 and max(lengths) <= 8, "kernels, transformers, CuMo: eight lines each"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_lines_are_short(page):
    lines = (ROOT / page).read_text().splitlines()
    assert [line for line in lines if len(line) > LINE and not line.startswith("|")] == []
    code = "".join(code for _, code in FENCE.findall((ROOT / page).read_text())).splitlines()
    assert [line for line in code if len(line) > CODE] == []


def in_nav(entries: list) -> list[str]:
    values = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries]
    return [page for value in values for page in (in_nav(value) if isinstance(value, list) else [value])]


def test_the_site_has_exactly_the_pages_of_docs():
    assert sorted(in_nav(SITE["nav"])) == PAGES


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as code hosts and mkdocs make them alike."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: str, text: str) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(text))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", LINKED)
def test_links_resolve(page):
    assert broken(page, (ROOT / page).read_text()) == []


def test_a_broken_link_is_seen():
    text = "[a](install.md) [b](nothing.md) [c](install.md#nothing) ![d](nothing.png) [e](#nothing) `[f](no)`"
    assert broken("docs/index.md", text) == ["nothing.md", "install.md#nothing", "nothing.png", "#nothing"]


IDENTIFIERS = [
    identifier
    for page in PAGES
    for identifier in re.findall(r"^::: (\S+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
]


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_what_the_api_pages_name_can_be_imported(identifier):
    module, _, name = identifier.rpartition(".")
    assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(identifier)


@pytest.mark.parametrize("package", ["cumo_kernels", "cumo_model"])
def test_the_api_pages_name_every_public_name(package):
    named = {identifier.rpartition(".")[2] for identifier in IDENTIFIERS if identifier.startswith(package)}
    assert set(importlib.import_module(package).__all__) <= named


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_every_variable_named_is_one(page):
    """Of the environment, as the sources read it."""
    named = set(re.findall(r"\bCUMO_[A-Z_]+\b", (ROOT / page).read_text()))
    files = [ROOT / "setup.py", *(ROOT / "cumo_kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    files += (ROOT / "cumo_model").rglob("*.py")
    assert named <= set(re.findall(r"\bCUMO_[A-Z_]+\b", "".join(file.read_text() for file in files)))


@pytest.mark.parametrize("page", PAGES)
def test_every_field_of_a_recipe_is_one(page):
    spans = prose((DOCS / page).read_text()).split("`")[1::2]
    fields = [span for span in spans if re.match(r"(model|data|stage|trainer)\.[a-z]\w*(=|$)", span)]
    sections = recipe.Recipe("runs/x")
    for field in fields:
        section, name = re.match(r"(\w+)\.(\w+)", field).groups()
        if section == "trainer":
            assert name in {f.name for f in dataclasses.fields(TrainingArguments)}, field
        else:
            assert hasattr(getattr(sections, section), name), field


def test_every_shipped_recipe_has_a_line():
    named = re.findall(r"`((?:demo|mistral-7b|mixtral-8x7b)/\w+)`", (DOCS / "training.md").read_text())
    assert sorted(set(named)) == shipped_recipes()


def test_the_tree_is_that_of_the_folders():
    page = tree.PAGE.read_text()
    assert page == tree.written(page), "python -m tests.tree --write"
    silent = [path for top in tree.TOPS for path, text in tree.entries(top).items() if not text]
    assert [path for path in silent if not path.startswith("tests/")] == []


def test_what_the_tree_adds_by_hand_exists():
    assert [path for path in [*tree.TOPS, *tree.OTHERS] if not (ROOT / path).exists()] == []


def test_the_rooms_are_those_of_the_imports():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", tree.PAGE.read_text(), flags=re.MULTILINE)
    written = {
        room: {name for name in re.findall(r"`(\w+)`", below) if name in ROOMS} for room, below in rows
    }
    rooms = {room for room in ROOMS if (ROOT / "cumo_model" / room).is_dir()}
    assert written == {room: set(ROOMS[room]) for room in rooms}
    for module in ROOMS.keys() - rooms:
        line = re.compile(rf"^- `{module}\.py`, .+, stands on (.+)\.$", re.MULTILINE)
        found = line.search(tree.PAGE.read_text())
        assert found and set(re.findall(r"`(\w+)`", found[1])) == set(ROOMS[module]), module
    drawn = re.findall(r"<text[^>]*>(\w+)</text>", (DOCS / "rooms.svg").read_text())
    arrows = (DOCS / "rooms.svg").read_text().count("<path d=") - 1  # one is the tip of an arrow
    assert set(drawn) == {*written, "cumo_kernels"}
    assert arrows == sum(map(len, written.values())) + 1


def test_the_site_builds_without_a_warning(tmp_path):
    python = ROOT / ".venv-docs/bin/python"
    if importlib.util.find_spec("mkdocs") and importlib.util.find_spec("mkdocstrings"):
        python = Path(sys.executable)
    elif not python.exists():
        pytest.skip("mkdocs is not installed: `make docs` sets it up in .venv-docs")
    command = [str(python), "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"'> ]+)", page.read_text()
        )
        assert loaded == [], f"{page.name} loads from another server"
