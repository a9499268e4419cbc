"""Packaging: one version, consistent pins, working commands, and build errors with a reason."""

import ast
import importlib.util
import itertools
import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from tests import latest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def load_setup():
    spec = importlib.util.spec_from_file_location("cumo_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version():
    import cumo_kernels

    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    assert changelog == PROJECT["version"]
    try:
        installed = metadata.version("cumo")
    except metadata.PackageNotFoundError:
        installed = "0+uninstalled"
    else:
        assert installed == PROJECT["version"], "pyproject.toml changed since the last `make setup`"
    assert cumo_kernels.__version__ == installed


def test_every_dependency_is_pinned_once():
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    wanted = PYPROJECT["build-system"]["requires"] + PROJECT["dependencies"] + extras
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    apart = {"vllm", "lmms-eval", "filelock"}  # other versions than in constraints.txt are wanted beside them
    assert names - set(latest.pins()) == apart
    assert "\nvllm-cpu==" in (ROOT / "constraints-serve.txt").read_text()
    pinned = (ROOT / "constraints-lmms.txt").read_text()
    assert "\nlmms-eval==" in pinned and "\nfilelock==" in pinned


def test_every_import_is_a_dependency():
    own = {"test", "test-web", "dev", "docs"}  # what the tests and their authors need, and users do not
    extras = [names for extra, names in PROJECT["optional-dependencies"].items() if extra not in own]
    needed = [*PROJECT["dependencies"], *itertools.chain(*extras)]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in needed}
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    declared = {modules.get(name, name.replace("-", "_")) for name in names}
    known = declared | set(sys.stdlib_module_names) | {"cumo_kernels", "cumo_model"}
    files = [path for top in ("cumo_kernels", "cumo_model") for path in (ROOT / top).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    imported = {
        alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }
    assert imported - known == set()


def test_ruff_has_one_version():
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == {latest.pins()["ruff"]}


@pytest.mark.parametrize("script", PROJECT["scripts"].values(), ids=list(PROJECT["scripts"]))
def test_a_command_exists(script):
    module, function = script.split(":")
    assert importlib.util.find_spec(module) is not None
    assert callable(getattr(importlib.import_module(module), function))


REASONS = {  # what is missing -> part of the message
    "csrc": "csrc/bindings.cpp",
    "nvcc": "nvcc",
    "torch": "torch is not installed",
    "cuda": "without CUDA",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Factory: machine(missing) loads setup.py on a simulated machine that lacks one build requirement."""

    def make(missing: str | None):
        setup = load_setup()
        monkeypatch.delenv("CUMO_BUILD", raising=False)
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setattr(setup, "ROOT", tmp_path)
        (tmp_path / "csrc").mkdir(exist_ok=True)
        if missing != "csrc":
            (tmp_path / "csrc/bindings.cpp").touch()
        monkeypatch.setattr(setup, "find_nvcc", lambda: None if missing == "nvcc" else "/cuda/bin/nvcc")
        monkeypatch.setattr(setup, "ask_nvcc", lambda nvcc: ("13.0", "/cuda"))
        monkeypatch.setattr("torch.version.cuda", None if missing == "cuda" else "13.0")
        find_spec = importlib.util.find_spec
        absent = "torch" if missing == "torch" else None
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == absent else find_spec(name)
        )
        return setup

    return make


@pytest.mark.parametrize("missing", REASONS)
def test_a_build_that_cannot_be_says_why_in_one_line(machine, missing, capsys):
    assert machine(missing).build_arguments() == {}
    out = capsys.readouterr().out
    assert REASONS[missing] in out and out.count("\n") == 1


@pytest.mark.parametrize("missing", REASONS)
def test_a_forced_build_that_cannot_be_fails(machine, missing, monkeypatch):
    setup = machine(missing)
    monkeypatch.setenv("CUMO_BUILD", "1")
    with pytest.raises(SystemExit, match=REASONS[missing]):
        setup.build_arguments()


def test_nothing_missing_no_refusal(machine, monkeypatch):
    setup = machine(None)
    assert setup.refusal() is None
    monkeypatch.setattr(setup, "ask_nvcc", lambda nvcc: ("12.4", "/cuda"))
    assert "nvcc is CUDA 12.4" in setup.refusal()
    monkeypatch.setenv("CUMO_BUILD", "0")
    assert setup.refusal() == "CUMO_BUILD=0"
    monkeypatch.setenv("CUMO_BUILD", "yes")
    with pytest.raises(SystemExit, match="CUMO_BUILD must be 0, 1 or unset, got 'yes'"):
        setup.build_arguments()


def test_an_extension_that_does_not_fit_torch_says_so(monkeypatch):
    from cumo_kernels import extension

    def fail(name):
        raise ImportError("undefined symbol: _ZN2at5emptyE")

    monkeypatch.setattr(extension, "EMULATE", False)
    monkeypatch.setattr(extension, "JIT", False)
    monkeypatch.setattr(extension.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match=r"built for another torch, build it again: undefined symbol"):
        extension.load.__wrapped__()


def test_architectures_that_cannot_be_compiled_for_are_left_out(machine, monkeypatch):
    """A container may set TORCH_CUDA_ARCH_LIST with GPUs that these kernels do not support."""
    setup = machine(None)
    choose = setup.settings().choose_architectures
    assert choose("8.0;9.0a;10.0;12.0+PTX") == ("8.0;9.0a;10.0;12.0+PTX", [])
    left, notes = choose("7.5 8.0 8.6 9.0 10.0 12.0+PTX")
    assert left == "8.0;8.6;9.0;10.0;12.0+PTX"
    assert "for 7.5: " in notes[0] and "without 9.0a" in notes[1] and len(notes) == 2
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    assert setup.refusal().endswith("from 8.0 on, TORCH_CUDA_ARCH_LIST is 7.0;7.5+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert setup.refusal() is None


def test_the_citation_is_of_this_version():
    """Keys that the format (1.2.0) wants, and what else the tree says of itself."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"] and citation["authors"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["type"] == "conference-paper" and "arXiv:2405.05949" in str(paper["identifiers"])
    for author in paper["authors"]:
        assert set(author) == {"given-names", "family-names"}


def test_github_runs_what_everybody_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(workflow[True]) >= {"push", "pull_request"}  # YAML reads the key `on` as true
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    (python,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    minor = int(python["python-version"].split(".")[1])
    assert minor >= int(PROJECT["requires-python"].removeprefix(">=3."))
    assert set(ROOT.glob(python["cache-dependency-path"])) == {
        latest.PINS,
        latest.LATEST,
        ROOT / "constraints-serve.txt",
        ROOT / "constraints-lmms.txt",
    }
    assert job["timeout-minutes"] == 120
    assert workflow["concurrency"]["cancel-in-progress"] is True


def test_a_bug_report_asks_for_explain_and_verify():
    folder = ROOT / ".github/ISSUE_TEMPLATE"
    form, config = (yaml.safe_load((folder / name).read_text()) for name in ("bug.yml", "config.yml"))
    assert set(config) <= {"blank_issues_enabled", "contact_links"}
    assert form["name"] and form["description"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    required = [f["attributes"]["label"] for f in form["body"] if f.get("validations", {}).get("required")]
    commands = [label for label in required if label.startswith("python -m cumo_kernels")]
    assert commands == ["python -m cumo_kernels explain", "python -m cumo_kernels verify"]
    assert "Versions" in required
    front_door = importlib.import_module("cumo_kernels.__main__").main
    # every option that the form names exists
    for command in commands:
        text = next(
            f["attributes"]["description"] for f in form["body"] if f["attributes"]["label"] == command
        )
        with pytest.raises(SystemExit) as ended:
            front_door([command.split()[-1], *re.findall(r"`(--few|--tiny)`", text), "--help"])
        assert ended.value.code == 0
