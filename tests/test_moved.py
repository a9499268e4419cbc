"""Old module paths: the same module as the new path, with a warning that names it."""

import subprocess
import sys

import pytest

import cumo_kernels  # noqa: F401
from cumo_kernels.moved import MovedModules
from cumo_model.registered import OLD_PATHS  # cumo_model asks this finder itself

FINDERS = [OLD_PATHS, *(finder for finder in sys.meta_path if isinstance(finder, MovedModules))]
PATHS = {old: new for finder in FINDERS for old, new in finder.new_paths.items()}

PROGRAM = """
import importlib, sys, warnings
import cumo_kernels, cumo_model
for pair in sys.argv[1:]:
    old, new = pair.split("=")
    spec = importlib.import_module(new).__spec__
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    assert module is sys.modules[new] and module.__name__ == new and module.__spec__ is spec, pair
    said = [str(w.message) for w in seen if "is now" in str(w.message)]
    assert said == [f"{old} is now {new}; the old path goes with cumo 0.2"], pair
from cumo_model.moe import record_routing
from cumo_kernels import tuning
from cumo_model.processing import build_processor, load_image
assert record_routing is cumo_model.record_routing and build_processor is cumo_model.build_processor
assert callable(cumo_model.upcycle)
print("fine")
"""


def test_every_old_path_is_its_module_at_the_new_one():
    assert len(PATHS) > 40
    pairs = [f"{old}={new}" for old, new in PATHS.items()]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *pairs], capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stderr


def test_a_program_runs_by_its_old_path():
    command = [sys.executable, "-m", "cumo_kernels.codegen", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--gpu" in done.stdout, done.stderr


def test_an_unknown_module_is_still_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"cumo_model\.nothing"):
        import cumo_model.nothing  # noqa: F401
