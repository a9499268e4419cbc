"""The host's path to a launch, in a process with a stub driver."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    torch.cuda.is_available() or not shutil.which("cc"), reason="for machines with cc and no GPU"
)
def test_cached_launches_equal_tritons_own_and_are_few():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.host", "--repeats", "4"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| ([a-z, ]+) \| (gated|with biases) \| (\d+) \|", done.stdout, re.M)
    launches = {(call, kind): int(number) for call, kind, number in rows}
    assert len(launches) == 10
    for kind in ("gated", "with biases"):
        assert launches["route", kind] == 2  # one for the router, one for the sort of so few slots
        assert launches["experts", kind] == 3  # two GEMMs and a combine
        assert launches["layer", kind] == 5
        # route 2 (its sums added), dH, d topk_weights, two weight gradients, dX and its combine
        assert launches["layer, forward and backward", kind] <= 5 + 9
