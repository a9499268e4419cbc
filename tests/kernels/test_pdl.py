"""CUMO_PDL=1: every Triton kernel waits before it accesses memory and is launched so; without it, none."""

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime.jit import JITFunction

from cumo_kernels.backends.triton import common
from tests.kernels.test_codegen import MODULES

KERNELS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}
SURVEY = r"""
import json, re, sys
from cumo_kernels.tiles import codegen

gpu, names, layers = json.loads(sys.argv[1])
found = []
memory = re.compile(r"griddepcontrol\.wait|\b(?:ld|st|red|atom)\.[\w.:]*global|\bcp\.async|\bcp\.red")

def note(kernel, compiled, gpu, constants):
    report = codegen._report(kernel, compiled, gpu, constants)
    first = memory.search(compiled.asm["ptx"])
    found.append((
        kernel.fn.__name__, report.opcodes.get("ACQBULK", 0), report.opcodes.get("PREEXIT", 0),
        first[0], compiled.metadata.launch_pdl,
    ))
    return report

wanted = lambda name: not names or name in names
codegen.survey(codegen.gpu_named(gpu), layers, ["bf16"], lambda shape, _: layers[shape], wanted, note)
print(json.dumps(found))
"""
FEW = ["_sort_kernel", "_combine_splits_kernel"]


def compiled(switch: str, gpu: str, names: list[str], layers: dict[str, list[int]]) -> list[list]:
    environment = {**os.environ, "CUMO_PDL": switch}
    asked = json.dumps([gpu, names, layers])
    done = subprocess.run(
        [sys.executable, "-c", SURVEY, asked], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_starts_with_a_wait(name):
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(KERNELS[name].fn))).body
    first, *_ = [line for line in function.body if not isinstance(line, ast.Expr) or not is_text(line)]
    assert ast.unparse(first) == "wait_for_earlier()"
    assert KERNELS[name].fn.__globals__["wait_for_earlier"] is common.wait_for_earlier


def is_text(line: ast.Expr) -> bool:
    return isinstance(line.value, ast.Constant)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_waits_before_it_touches_memory_and_then_lets_the_next_one_start():
    found = compiled("1", "nvidia_h100", [], {"clip": [577, 4616], "llm": [64], "many": [4096]})
    assert {name for name, *_ in found} == KERNELS.keys()
    assert {tuple(rest) for _, *rest in found} == {(1, 1, "griddepcontrol.wait", True)}


@pytest.mark.parametrize(
    ("switch", "gpu"), [("1", "nvidia_h100"), ("1", "nvidia_a100"), ("0", "nvidia_h100"), ("", "nvidia_h100")]
)
def test_only_with_the_switch_and_from_hopper_on(switch, gpu):
    found = compiled(switch, gpu, FEW, {"clip": [577]})
    assert {name for name, *_ in found} == set(FEW)
    on = (switch, gpu) == ("1", "nvidia_h100")
    for _, waits, starts, first, launched in found:
        assert (waits, starts, first == "griddepcontrol.wait", launched) == (on, on, on, on)
