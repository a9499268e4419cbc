"""Checks that need a GPU, for every backend: graph capture, no host synchronisation, equal repeats."""

import os
import sys

import pytest
import torch

from cumo_kernels.verification import cases
from cumo_kernels.verification.verify import backends_of, check, excused

pytestmark = pytest.mark.gpu
NAMES = backends_of("cuda")[0] if torch.cuda.is_available() else ["none"]
ROWS = [
    pytest.param(case, id=f"{case.op}-{family}-{case.dtype}")
    for family, case in cases.all_cases(
        {name: cases.FAMILIES[name] for name in ("one-token", "odd-tails", "skewed", "geglu-gathered")}
        | cases.ALIGNED
        | {"clip-crop": cases.GPU_FAMILIES["clip-crop"]},
        ("fp32", "bf16"),
    )
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ROWS)
def test_a_gpu_backend_passes_every_check(case, name):
    result = check(case, name, "cuda")
    if result.lost and "PYTEST_XDIST_WORKER" in os.environ:
        # every later row of this process would fail too: xdist reports this one and starts another worker
        print(f"the device is lost after {result.command}: {result.failures}", file=sys.stderr, flush=True)
        os._exit(3)
    assert result.failures == []
    assert result.repeats and result.guards
    if not excused(case, name, "cuda"):
        assert result.sync_free and result.graph
