"""The table of two releases of Triton, made from what this one compiles."""

import copy
import json
import os
import sys

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import compilers

WORDS = ["--shape", "mlp", "--kernel", "_activate"]


@pytest.fixture(scope="module")
def side():
    return compilers.rows("nvidia_h100", "bf16", ["mlp"], "_activate")


def test_every_column_is_a_number_and_every_kernel_has_a_unique_name(side):
    assert {row["kernel"] for row in side["rows"]} == {"_activate_kernel", "_activate_backward_kernel"}
    assert all(isinstance(row[name], int) for row in side["rows"] for name in compilers.COLUMNS)
    assert all(row["registers"] and row["instructions"] for row in side["rows"])
    assert len(compilers._by_name(side["rows"])) == len(side["rows"])
    twice = [side["rows"][0], {**side["rows"][0], "registers": 1}]
    assert [row["registers"] for row in compilers._by_name(twice).values()] == [twice[0]["registers"], 1]


def test_differences_show_both_values_and_a_missing_kernel_is_refused(side):
    other = copy.deepcopy(side)
    other["rows"][0] |= {"registers": side["rows"][0]["registers"] + 8, "problems": "spills"}
    text = compilers.table(side, other, "nvidia_h100", "bf16")
    number = side["rows"][0]["registers"]
    assert f"| {number} > {number + 8} |" in text and f"| {side['triton']}: spills |" in text
    assert f"{len(side['rows']) - 1} of {len(side['rows'])} kernels agree" in text
    other["rows"].pop()
    with pytest.raises(ValueError, match="got only in one"):
        compilers.table(side, other, "nvidia_h100", "bf16")


def test_another_python_compiles_the_same_tree(capsys, side):
    assert compilers._of(sys.executable, WORDS) == json.loads(json.dumps(side))
    with pytest.raises(SystemExit):
        compilers.main(WORDS)
    assert "--other: give the Python" in capsys.readouterr().err
