"""What a remembered launch may take for the same kernel, on a kernel that only notes its calls."""

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from cumo_kernels import tuning
from cumo_kernels.backends.triton import launch as launching
from cumo_kernels.backends.triton.launch import Launch, can_describe, describe, planned, settle


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


def test_the_second_call_launches_what_the_first_did_and_binds_nothing():
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
        lambda x, w: (x[1:], w),  # another alignment
        lambda x, w: (torch.nn.Parameter(x[1:]), w),
        lambda x, w: (x, torch.nn.Parameter(torch.ones(5)[1:])),
        lambda x, w: (x.double(), w),
        lambda x, w: (x, w.bfloat16()),
        lambda x, w: (x, None),
        lambda x, w: (x, describe(torch.zeros(4, 4), [1, 4])),
    ],
)
def test_what_triton_would_compile_anew_is_bound_anew(change):
    kernel = Kernel()
    launch, x, weight = Launch(kernel, N=64, BLOCK=16), torch.zeros(8), torch.ones(4)
    for _ in range(2):
        launch(1, torch.nn.Parameter(x), weight, 1)
    assert kernel.bound == 1
    for _ in range(2):
        launch(1, *change(x, weight), 1)
    assert kernel.bound == 2


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
def test_what_triton_returns_in_another_shape_is_not_launched_directly(returned, reason, caplog):
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


def test_an_option_that_triton_does_not_take_is_not_asked_for(caplog):
    launching._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=launching.__name__):
        assert launching._fused() == {"enable_fp_fusion": True} and not caplog.records
        assert launching._fused(SimpleNamespace) == {}
    assert "takes no enable_fp_fusion" in caplog.text


def test_what_this_triton_compiles_describes_every_argument():
    from cumo_kernels import codegen

    seen = []

    def note(kernel, compiled, gpu, constants):
        seen.append(list(compiled.src.signature) == list(kernel.arg_names))
        return codegen.bare(kernel, compiled, gpu, constants)

    with codegen.compiling(codegen.gpu_named("nvidia_h100"), describe=note):
        dict(codegen.calls("clip", 577, torch.bfloat16))["permute"]()
    assert seen and all(seen)


def test_a_kernel_without_a_hash_is_left_alone():
    settle(Kernel())


def test_what_triton_specialises_must_be_fixed():
    with pytest.raises(TypeError, match="N is specialised"):
        Launch(Kernel(), BLOCK=16)


def test_descriptors_only_where_the_copy_engine_can_read():
    x = torch.zeros(9, 16, dtype=torch.bfloat16)
    assert can_describe(x, True) and not can_describe(x, False)
    for other in (x[:, 1:], x.T, x[:0], torch.zeros(9, 12, dtype=torch.bfloat16), x[:1].expand(4, 16)):
        assert not can_describe(other, True)


def test_plans_are_forgotten_with_what_they_were_made_of():
    calls = []
    plan = planned(lambda key: calls.append(key))
    plan(1), plan(1)
    tuning.forget()
    plan(1)
    assert calls == [1, 1]
    tuning.CACHES.remove(plan)
