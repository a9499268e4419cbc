"""Kernels and an extension built in advance: launches find them, and they are refused if they do not fit."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import artifacts, launches
from cumo_kernels.tiles import hardware
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification import cases, verified

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or not shutil.which("cc"), reason="for machines with cc, no GPU"
)
HOPPER = hardware.find(artifacts.GPU)
ORDER = """
import importlib, sys
parts = ["activation", "permutation", "routing", "grouped_gemm", "experts"]
from triton.runtime.jit import JITFunction
keys = {}
for part in parts if sys.argv[1] == "forward" else parts[::-1]:
    module = importlib.import_module(f"cumo_kernels.backends.triton.{part}")
    found = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    assert all(kernel.hash for kernel in found.values()), "not settled by importing"
    keys |= {name: kernel.cache_key for name, kernel in found.items()}
print(sorted(keys.items()))
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """A new Python, in which Triton compiles."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path) -> Path:
    """A package with one kernel's folder, one launcher's and an extension; only for tests of unpacking."""
    cache = tmp_path / "cache"
    for name, files in {
        "KERNEL": {
            "k.cubin": b"code", "k.json": b"{}", "k.ttir": b"text",
            "__grp__k.json": json.dumps({"child_paths": {
                "k.cubin": "/elsewhere/k.cubin", "k.json": "/elsewhere/k.json", "k.ttir": "/elsewhere/k.ttir",
            }}).encode(),
        },
        "LAUNCHER": {"__triton_launcher.so": b"stub"},
        "OTHER": {"o.cubin": b"of an earlier build"},
    }.items():  # fmt: skip
        (cache / name).mkdir(parents=True)
        for file, data in files.items():
            (cache / name / file).write_bytes(data)
    (cache / "LINKED").mkdir()  # for another platform's key
    os.link(cache / "LAUNCHER" / "__triton_launcher.so", cache / "LINKED" / "__triton_launcher.so")
    library = tmp_path / "_C.cpython-999.so"
    library.write_bytes(b"extension")
    made = artifacts.Made({"KERNEL"}, {"LAUNCHER", "LINKED"})
    artifacts.pack(made, cache, library, tmp_path / "package", HOPPER)
    return tmp_path / "package"


def changed(package: Path, **values) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    (package / "manifest.json").write_text(json.dumps(manifest | values))


def take(package: Path) -> list[str]:
    (package.parent / "cumo_kernels").mkdir(exist_ok=True)
    return artifacts.take(package, package.parent / "taken", package.parent / "cumo_kernels")


def test_everything_is_taken_if_everything_fits(package):
    words = take(package)
    assert [line.split(":")[0] for line in words] == ["taken", "taken"]
    taken = package.parent / "taken"
    assert sorted(path.name for path in taken.iterdir()) == ["KERNEL", "LAUNCHER", "LINKED"]
    with tarfile.open(package / artifacts.KERNELS) as tar:
        assert not any(member.islnk() or member.issym() for member in tar)  # slow to read
    group = json.loads((taken / "KERNEL" / "__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(taken / "KERNEL" / name) for name in ("k.cubin", "k.json")}
    assert (package.parent / "cumo_kernels" / "_C.cpython-999.so").read_bytes() == b"extension"
    assert (package / "taken").exists()
    assert take(package)[1] == "_C.cpython-999.so is in place already"


@pytest.mark.parametrize(
    "values, refused, reason",
    [
        ({"python": "3.99"}, 2, "built with Python 3.99"),
        ({"torch": "1.0"}, 2, "built with torch 1.0, here it is"),
        ({"triton": "1.0"}, 1, "built with Triton 1.0"),
        ({"sources": {"triton": "0123", "cuda": verified.source_of("cuda")}}, 1, "source 0123 of triton"),
        ({"sources": {"triton": verified.source_of("triton"), "cuda": "0123"}}, 1, "source 0123 of cuda"),
    ],
)
def test_a_package_that_does_not_fit_is_refused_with_a_reason(package, values, refused, reason):
    changed(package, **values)
    words = take(package)
    assert [line.startswith("not taken") and reason in line for line in words].count(True) == refused
    assert not (package / "taken").exists()
    of_triton = "sources" not in values or values["sources"]["triton"] == "0123"
    assert (package.parent / "taken").exists() != of_triton
    if refused == 2:
        assert not list((package.parent / "cumo_kernels").iterdir())


def test_a_newer_extension_stays(package):
    target = package.parent / "cumo_kernels" / "_C.cpython-999.so"
    target.parent.mkdir()
    target.write_bytes(b"built here since")
    assert "a newer one is in" in take(package)[1]
    assert target.read_bytes() == b"built here since"
    os.utime(target, (time.time() - 10**6,) * 2)
    assert take(package)[1].startswith("taken")


def test_an_unreadable_package_is_reported(package, tmp_path):
    assert "nothing taken: there is no" in artifacts.take(tmp_path / "nowhere", tmp_path / "taken")[0]
    (package / artifacts.KERNELS).write_bytes(b"cut off")
    assert "cannot be read" in take(package)[0]


def test_a_package_above_the_limit_names_the_largest_files(tmp_path):
    (tmp_path / "cache" / "KERNEL").mkdir(parents=True)
    (tmp_path / "cache" / "KERNEL" / "large.cubin").write_bytes(os.urandom(2**20))
    made = artifacts.Made({"KERNEL"})
    with pytest.raises(ValueError, match=r"at most 0\.5 MiB, got 1\.\d: .*largest.* large\.cubin 1\.0"):
        artifacts.pack(made, tmp_path / "cache", None, tmp_path / "package", HOPPER, limit=2**19)
    assert not (tmp_path / "package").exists()


def test_a_key_does_not_depend_on_the_order_of_launches():
    found = [run("-c", ORDER, order) for order in ("forward", "backward")]
    assert found[0].returncode == 0, found[0].stderr
    assert found[0].stdout == found[1].stdout


def test_jobs_are_those_of_the_gate():
    todo = launches.jobs()
    assert len(set(todo)) == len(todo)
    assert {job.layer for job in todo if job.case is None} == set(launches.LAYERS)
    assert {job.case.dtype for job in todo if job.case} == {"bf16", "fp16", "fp32"}
    smoke = [case for _, case in cases.survey("cuda", True, ("bf16",), cases.OPS)]
    verify = {case for _, case in cases.survey("cuda", False, tuple(DTYPES), cases.OPS)}
    assert [job.case for job in todo[: len(smoke)]] == smoke
    assert {job.case for job in todo if job.case} == verify | set(smoke)


EVERY = """
import triton
from benchmarks.gpu import launches
from benchmarks.host import load_stub
from cumo_kernels.tiles import codegen, hardware
from cumo_kernels.verification.shards import bytes_of

load_stub()
asked = set()

def note(*, fn, compile, **_):
    asked.add((fn.name, compile["specialization_data"]))
    return True  # as if another process compiled it

triton.knobs.runtime.jit_cache_hook = note
small = [job for job in launches.jobs() if job.case and bytes_of(job.case) < 2**28]
for job in small:
    with launches.on_the_cpu(), codegen.compiling(hardware.find("nvidia_h100"), describe=lambda *_: None):
        job.run()
print(len(small), len(asked))
"""


@without_gpu
@pytest.mark.timeout(200)
def test_every_call_of_the_gate_can_be_made_on_a_cpu():
    """Where the values of inputs are zeros, so that nothing may search for other values without end."""
    done = run("-c", EVERY)
    assert done.returncode == 0, done.stderr
    calls, kernels = map(int, done.stdout.split())
    assert calls > 800 and kernels > 1.5 * calls


@without_gpu
def test_compiling_ends_in_time_and_says_what_is_left(tmp_path):
    words = ("compile", "--dtype", "bf16", "--workers", "1", "--seconds", "1", "--cache", str(tmp_path))
    done = run("-m", artifacts.__name__, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    left = re.search(r"1 s are over: (\d+) of (\d+) calls compile at their first launch", done.stdout)
    assert 0 < int(left[2]) - int(left[1]) < 20


def test_other_cases_and_launches_are_another_package(monkeypatch, tmp_path):
    """A package of other cases is not whole, whichever of the files changed."""
    for name in ("cases.py", "packed_cases.py", "scored_cases.py"):
        tree = tmp_path / name
        for part in ("cumo_kernels/tiles/configs", "cumo_kernels/verification"):
            shutil.copytree(ROOT / part, tree / part)
        monkeypatch.setattr(artifacts, "ROOT", tree)
        before = artifacts._asked(HOPPER)
        with open(tree / "cumo_kernels/verification" / name, "a") as file:
            file.write("# changed")
        assert artifacts._asked(HOPPER) != before


@pytest.mark.slow
@pytest.mark.timeout(400)
@without_gpu
def test_a_launch_finds_kernels_that_were_compiled_packed_and_taken(tmp_path):
    program, made = ("-m", artifacts.__name__), str(tmp_path / "made")
    # the compiling machine has its driver in another folder
    driver = str(tmp_path / "driver")
    copy = "import shutil, sys; from benchmarks import host; host.load_stub(); "
    copied = run("-c", copy + "shutil.copytree(host.STUB, sys.argv[1])", driver)
    assert copied.returncode == 0, copied.stderr
    there = {"TRITON_LIBCUDA_PATH": driver, "LD_LIBRARY_PATH": driver}
    done = run(*program, "compile", "--few", "--workers", "1", "--cache", made, **there)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = run(*program, "try", "--cache", made, "--folder", str(tmp_path))
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert "0 kernels compiled, 0 built" in tried.stdout
    suffixes = {path.suffix for path in (tmp_path / "taken").rglob("*") if path.is_file()}
    assert suffixes == {".cubin", ".json", ".so"}
    # a machine without `file`, where Triton has other keys for gcc's libraries
    bare = "import platform, sys; platform.architecture = lambda *_: ('64bit', ''); "
    bare += f"import {artifacts.__name__} as artifacts; artifacts.main(sys.argv[1:])"
    again = run("-c", bare, "prove", "--few", "--cache", str(tmp_path / "taken"))
    assert "0 kernels compiled, 0 built" in again.stdout, again.stdout + again.stderr
    # and the check detects what is missing
    for path in (tmp_path / "taken").glob("*/_permute_kernel.cubin"):
        shutil.rmtree(path.parent)
    missed = run(*program, "prove", "--few", "--cache", str(tmp_path / "taken"))
    assert missed.returncode == 1
    assert "1 kernels compiled, 0 built\n_permute_kernel" in missed.stdout
