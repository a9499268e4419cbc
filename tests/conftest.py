"""Fixtures of all tests: device, backend, dtype, random seed, and the content of uninitialised memory."""

import importlib.machinery
import os

# set before torch and transformers are imported: tests must not wait for the hub; cuBLAS reads its setting
# once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# self-checks are off in all tests except those of self-checks (tests/kernels/test_proofs.py)
os.environ["CUMO_SELF_CHECK"] = "0"

import random
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch

from cumo_kernels.dispatch import BACKENDS
from cumo_kernels.testing import poisoned_memory

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

try:
    import hypothesis
except ModuleNotFoundError:
    # for example on a GPU machine without it: only the property tests are skipped
    def skipped(*_, **__):
        @pytest.mark.skip(reason="hypothesis is not installed")
        def nothing():
            pass

        return lambda test: nothing

    hypothesis = types.ModuleType("hypothesis")
    hypothesis.__spec__ = importlib.machinery.ModuleSpec("hypothesis", None)  # other packages read it
    hypothesis.given = hypothesis.settings = skipped
    hypothesis.strategies = types.ModuleType("hypothesis.strategies")
    for name in ("booleans", "data", "integers", "lists", "sampled_from"):
        setattr(hypothesis.strategies, name, lambda *_, **__: None)
    sys.modules |= {"hypothesis": hypothesis, "hypothesis.strategies": hypothesis.strategies}
else:
    # the same examples on every machine; time limits are set by pytest-timeout only
    hypothesis.settings.register_profile("cumo", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("cumo")

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_CUDA else ["cpu"]


def refusal(backend: str, device: str) -> str | None:
    """The reason why `backend` cannot run fp32 tensors on `device`, or None."""
    row = next(row for row in BACKENDS if row.name == backend)
    return row.refuse("permute", device, torch.float32)


def runs_somewhere(backend: str) -> bool:
    return refusal(backend, "cpu") is None or (HAS_CUDA and refusal(backend, "cuda") is None)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=[row.name for row in BACKENDS if runs_somewhere(row.name)])
def backend(request, device) -> str:
    """Each backend of this machine that runs on `device`. Tests force it with `use_backend(backend)`."""
    reason = refusal(request.param, device)
    if reason is not None:
        pytest.skip(f"{request.param} on {device}: {reason}")
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    """Each dtype that all backends support."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(request):
    """Under tests/kernels, fill torch.empty with NaN, which reveals elements that a kernel does not write."""
    if Path(__file__).parent / "kernels" not in request.node.path.parents:
        yield
        return
    with poisoned_memory():
        yield


def pytest_collection_modifyitems(items):
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
