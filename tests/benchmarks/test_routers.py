"""The benchmark of routers: its gate, its peer, and choices that rounding does not decide."""

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import harness
from benchmarks.cases import bench_routers
from benchmarks.cases.bench_routers import ROUTERS, router_of
from benchmarks.cases.shapes import tiny
from benchmarks.harness import Case
from cumo_kernels import dispatch, route
from cumo_kernels.verification.scored_cases import keywords


def shapes(device="cuda"):
    return {case.shape.name: case.shape for case in bench_routers.cases(device, full=True)}


def measured(shape):
    lines = []
    rows, _ = harness.measure(
        bench_routers.OP, bench_routers.setup, Case(shape, "fp32"), "cpu", "run", seconds=0,
        log=lines.append, wanted=["reference"],
    )  # fmt: skip
    return rows, "\n".join(lines)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_gated_and_timed(name):
    for shape in (shapes()[f"{name}-T16"], tiny(shapes()[f"{name}-T16"])):
        rows, log = measured(shape)
        assert "the gate refuses" not in log
        assert {row.variant for row in rows} == {"cumo/reference", "torch-plain"}


@pytest.mark.parametrize("name", ROUTERS)
def test_rounding_decides_no_choice(name):
    shape = shapes("cpu")[f"{name}-T512"]
    torch.manual_seed(1)
    how, _, has_bias = router_of(shape)
    logits, bias = bench_routers._distinct(shape, how, has_bias)
    choose = lambda x: route(x, shape.K, selection_bias=bias, **keywords(how)).topk_indices
    chosen = choose(logits)
    assert torch.equal(chosen, choose(logits.double()))
    counts = torch.bincount(chosen.flatten(), minlength=shape.E)
    assert counts.max() < shape.slots / 8  # the tokens differ


def test_a_wrong_router_is_not_timed(monkeypatch):
    plain = dispatch.implementation("reference", "scored_route")

    def wrong(*args):
        weights, *rest = plain(*args)
        return (weights * 1.01, *rest)

    monkeypatch.setitem(dispatch._implementations, ("reference", "scored_route"), wrong)
    rows, log = measured(shapes()["deepseek-v3-T16"])
    assert "cumo/reference: NOT TIMED (all): the gate refuses it" in log
    assert {row.variant for row in rows} == {"torch-plain"}
