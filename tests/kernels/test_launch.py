"""Cached launches: which calls may reuse a kernel, tested with a kernel that only records its calls."""

import logging
import os
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends import nvidia
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from cumo_kernels.backends.triton import capture
from cumo_kernels.backends.triton import launch as launching
from cumo_kernels.backends.triton.launch import Launch, can_describe, describe, planned, settle
from cumo_kernels.tiles import codegen, tuning


class Parameter:
    def __init__(self, num: int, name: str, do_not_specialize: bool = False):
        self.num, self.name, self.do_not_specialize = num, name, do_not_specialize


class Kernel:
    """Binds like Triton's, in effect: a compiled kernel for each combination of dtypes and alignments."""

    arg_names = ("x_ptr", "weight_ptr", "rows", "N", "BLOCK")
    params = tuple(Parameter(i, name, name == "rows") for i, name in enumerate(arg_names))

    def __init__(self, returned=None):
        self.bound, self.launched, self.returned = 0, [], returned or Compiled

    def __getitem__(self, grid):
        def bind(*, num_warps, num_stages, enable_fp_fusion, **named):
            assert enable_fp_fusion
            self.bound += 1
            self.launched.append((grid, tuple(named.values())))
            return self.returned(self)

        return bind


class Compiled:
    def __init__(self, kernel: Kernel):
        self.kernel, self.src = kernel, SimpleNamespace(signature=dict.fromkeys(kernel.arg_names))

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid[:1], arguments))


def test_the_second_call_launches_without_binding():
    kernel = Kernel()
    launch, x, weight = Launch(kernel, N=64, BLOCK=16), torch.zeros(8), torch.ones(4)
    for rows in (3, 1):
        launch(7, x, weight, rows)
    first, second = kernel.launched
    assert kernel.bound == 1 and first[0] == second[0] == (7,)
    assert first[1][2:] == (3, 64, 16) and second[1][2:] == (1, 64, 16)
    assert all(one is other for one, other in zip(first[1][:2], second[1][:2], strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x[1:], w),  # a different alignment
        lambda x, w: (torch.nn.Parameter(x[1:]), w),
        lambda x, w: (x, torch.nn.Parameter(torch.ones(5)[1:])),
        lambda x, w: (x.double(), w),
        lambda x, w: (x, w.bfloat16()),
        lambda x, w: (x, None),
        lambda x, w: (x, describe(torch.zeros(4, 4), [1, 4])),
    ],
)
def test_arguments_that_triton_would_compile_again_are_bound_again(change):
    kernel = Kernel()
    launch, x, weight = Launch(kernel, N=64, BLOCK=16), torch.zeros(8), torch.ones(4)
    for _ in range(2):
        launch(1, torch.nn.Parameter(x), weight, 1)
    assert kernel.bound == 1
    for _ in range(2):
        launch(1, *change(x, weight), 1)
    assert kernel.bound == 2


def test_pointers_that_16_does_not_divide_share_a_kernel():
    kernel = Kernel()
    launch, x = Launch(kernel, N=64, BLOCK=16), torch.zeros(8)
    for skipped in (1, 2, 3):
        launch(1, x[skipped:], None, 1)
    assert kernel.bound == 1


def bound(a_ptr, b_ptr, c_desc, number):
    pass


def combinations_of_arguments() -> list[tuple]:
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    tensors = [x, x[:, 1:], x[:, 3:], x.float(), x.int(), torch.nn.Parameter(x), None]
    blocks = [(x, [16, 16]), (x, [16, 32]), (x[1:], [16, 16]), (x.half(), [16, 16]), (x.float(), [16, 16])]
    descriptors = [*(describe(*block) for block in blocks), None]
    edges = [edge + step for edge in (2**31, -(2**31), 2**63) for step in (-1, 0)]
    numbers = [0, 1, 16, 17, *edges, 2**64 - 1, True, False, 0.5]
    start = (x, None, descriptors[0], 2)
    changed = [
        (i, value) for i, values in enumerate((tensors, tensors, descriptors, numbers)) for value in values
    ]
    single = [tuple(value if i == at else was for i, was in enumerate(start)) for at, value in changed]
    return [*single, (None, x, None, 1), (x[:, 1:], x[:, 2:], None, 2**40), (None, None, None, 2**40)]


compiling = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter binds and compiles nothing"
)


@compiling
def test_calls_share_a_key_if_and_only_if_triton_specialises_them_alike():
    calls = combinations_of_arguments()
    with codegen.compiling(codegen.gpu_named("nvidia_h100")):
        *_, bind = JITFunction(bound, do_not_specialize=["number"]).create_binder()
        theirs = [bind(*call)[1] for call in calls]
    ours = [tuple(map(launching.kind, call)) for call in calls]
    pairs = list(combinations(range(len(calls)), 2))
    assert {theirs[i] == theirs[j] for i, j in pairs} == {True, False}
    differing = [(calls[i], calls[j]) for i, j in pairs if (theirs[i] == theirs[j]) != (ours[i] == ours[j])]
    assert not differing


def test_arguments_that_triton_cannot_take_are_refused():
    with pytest.raises(TypeError, match="got str"):
        Launch(Kernel(), N=64, BLOCK=16)(1, torch.zeros(8), "weight", 1)


GLOBAL = 0  # torch's default for capturing


class Capturing:
    """A stub driver whose stream is being captured; records actions and this thread's mode."""

    def __init__(self, monkeypatch, fails: bool = False):
        self.mode, self.done, self.fails = GLOBAL, [], fails
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(capture, "_exchange", lambda: self.exchange)

    def exchange(self, reference) -> int:
        if self.fails:
            return 1
        given = reference._obj
        self.mode, given.value = given.value, self.mode
        return 0

    def note(self, what: str) -> None:
        self.done.append((what, self.mode))


class Loaded(Kernel):
    """A kernel that can compile and load without a launch, like Triton's, and records it in the driver."""

    def __init__(self, driver: Capturing, error: Exception | None = None):
        super().__init__()
        self.driver, self.error = driver, error

    def warmup(self, *, grid, num_warps, num_stages, enable_fp_fusion, **named):
        assert list(named) == list(self.arg_names)
        self.driver.note("compile")
        return SimpleNamespace(_init_handles=self.load)

    def load(self) -> None:
        self.driver.note("load")
        if self.error:
            raise self.error

    def __getitem__(self, grid):
        self.driver.note("launch")
        return super().__getitem__(grid)


def test_a_new_kernel_in_a_capture_is_loaded_in_relaxed_mode_and_launched_in_the_previous(monkeypatch):
    driver = Capturing(monkeypatch)
    launch = Launch(Loaded(driver), N=64, BLOCK=16)
    launch(1, torch.zeros(8), None, 1)
    wanted = [("compile", capture.RELAXED), ("load", capture.RELAXED), ("launch", GLOBAL)]
    assert driver.done == wanted and driver.mode == GLOBAL
    launch(1, torch.zeros(8), None, 1)  # cached
    assert driver.done == wanted
    launch(1, torch.zeros(8)[1:], None, 1)
    assert driver.done == wanted + wanted


def test_outside_a_capture_the_mode_does_not_change(monkeypatch):
    driver = Capturing(monkeypatch, fails=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    Launch(Loaded(driver), N=64, BLOCK=16)(1, torch.zeros(8), None, 1)
    assert driver.done == [("launch", GLOBAL)]


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_the_mode_is_restored_when_loading_fails(monkeypatch, error):
    driver = Capturing(monkeypatch)
    with pytest.raises(type(error)):
        Launch(Loaded(driver, error), N=64, BLOCK=16)(1, torch.zeros(8), None, 1)
    assert driver.done == [("compile", capture.RELAXED), ("load", capture.RELAXED)]
    assert driver.mode == GLOBAL


def test_a_drivers_error_code_raises(monkeypatch):
    driver = Capturing(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="returned error 1"):
        Launch(Loaded(driver), N=64, BLOCK=16)(1, torch.zeros(8), None, 1)
    assert not driver.done


def test_the_relaxed_mode_is_the_one_of_the_drivers_header():
    header = (Path(nvidia.__file__).parent / "include" / "cuda.h").read_text()
    assert int(re.search(r"CU_STREAM_CAPTURE_MODE_RELAXED\s*=\s*(\d+)", header)[1]) == capture.RELAXED
    assert "cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)" in header


def test_this_triton_has_the_function_that_loads_a_kernel():
    assert callable(CompiledKernel._init_handles) and callable(JITFunction.warmup)


class WithoutConstants(Compiled):
    def __init__(self, kernel: Kernel):
        super().__init__(kernel)
        del self.src.signature["BLOCK"]


class WithAStream(Compiled):
    def __getitem__(self, grid):
        return lambda stream, *arguments: None


class WithoutAGrid:
    def __init__(self, kernel: Kernel):
        pass


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (WithoutConstants, "its signature has 4 of 5 arguments"),
        (WithAStream, "takes (stream, *arguments)"),
        (WithoutAGrid, "not subscriptable"),
    ],
)
def test_a_compiled_kernel_of_another_form_is_not_launched_directly(returned, reason, caplog):
    kernel = Kernel(returned)
    launching._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=launching.__name__):
        for _ in range(2):
            launch = Launch(kernel, N=64, BLOCK=16)
            for rows in (3, 1):
                launch(7, torch.zeros(8), torch.ones(4), rows)
    assert kernel.bound == 4 and [values[2:] for _, values in kernel.launched] == 2 * [
        (3, 64, 16),
        (1, 64, 16),
    ]
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_an_unknown_option_of_triton_is_not_passed(caplog):
    launching._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=launching.__name__):
        assert launching._fused() == {"enable_fp_fusion": True} and not caplog.records
        assert launching._fused(SimpleNamespace) == {}
    assert "has no option enable_fp_fusion" in caplog.text


@compiling
def test_the_signature_of_a_compiled_kernel_has_every_argument():
    from cumo_kernels.tiles import codegen

    seen = []

    def note(kernel, compiled, gpu, constants):
        seen.append(list(compiled.src.signature) == list(kernel.arg_names))
        return codegen.bare(kernel, compiled, gpu, constants)

    with codegen.compiling(codegen.gpu_named("nvidia_h100"), describe=note):
        dict(codegen.calls("clip", 577, torch.bfloat16))["permute"]()
    assert seen and all(seen)


def test_a_kernel_without_a_hash_is_not_changed():
    settle(Kernel())


def test_specialised_arguments_must_be_fixed():
    with pytest.raises(TypeError, match="N is specialised"):
        Launch(Kernel(), BLOCK=16)


def test_descriptors_only_where_the_copy_engine_can_read():
    x = torch.zeros(9, 16, dtype=torch.bfloat16)
    assert can_describe(x, True) and not can_describe(x, False)
    for other in (x[:, 1:], x.T, x[:0], torch.zeros(9, 12, dtype=torch.bfloat16), x[:1].expand(4, 16)):
        assert not can_describe(other, True)


def test_plans_are_cleared_with_the_tables_they_depend_on():
    calls = []
    plan = planned(lambda key: calls.append(key))
    plan(1), plan(1)
    tuning.forget()
    plan(1)
    assert calls == [1, 1]
    tuning.CACHES.remove(plan)
