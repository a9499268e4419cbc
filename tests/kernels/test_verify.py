"""verify: it passes what is right, and each of its checks refuses a kernel that is wrong in just that way."""

import json
import random

import pytest
import torch

from cumo_kernels import cases, dispatch, verify
from cumo_kernels.__main__ import main
from cumo_kernels.cases import FAMILIES, OPS, Case, all_cases, parse
from cumo_kernels.verify import check

COMBINE = Case("combine", T=12, H=16)


@pytest.fixture
def replaced(monkeypatch):
    """replaced(op, function): the reference backend runs `function(plain, *args)` for `op`."""

    def replace(op, function):
        plain = dispatch.implementation("reference", op)
        monkeypatch.setitem(
            dispatch._implementations, ("reference", op), lambda *args: function(plain, *args)
        )

    return replace


def failure(case: Case) -> str:
    result = check(case, "reference", "cpu")
    assert result.failures, "a wrong kernel passed"
    return " ".join(result.failures)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_passes(op):
    results = [check(case, "reference", "cpu") for _, case in all_cases(cases.FEW, ("fp32", "bf16"), (op,))]
    assert results and all(r.failures == [] and r.repeats and r.guards for r in results)
    assert all(r.output <= 3 and r.gradient <= 4 for r in results)


def test_every_op_of_dispatch_is_reached(monkeypatch):
    reached = set()
    plain = dispatch.implementation
    monkeypatch.setattr(dispatch, "implementation", lambda b, op: reached.add(op) or plain(b, op))
    for op in OPS:
        check(Case(op, T=6), "reference", "cpu")
    assert reached == set(dispatch.OPS)


def test_a_wrong_value_is_refused(replaced):
    replaced("combine", lambda plain, *args: plain(*args) * 1.001)
    assert "output 0 is off" in failure(COMBINE)


def test_a_wrong_gradient_is_refused(replaced):
    replaced("combine_backward", lambda plain, *args: tuple(g * 1.001 for g in plain(*args)))
    assert "gradient 0 is off" in failure(COMBINE)


def test_a_wrong_plan_is_refused(replaced):
    def unstable(plain, indices, num_experts):
        counts, offsets, permutation, inverse = plain(indices, num_experts)
        begin, end = offsets[:2].tolist()
        permutation[begin:end] = permutation[begin:end].flip(0)
        inverse[permutation.long()] = torch.arange(len(permutation), dtype=torch.int32)
        return counts, offsets, permutation, inverse

    replaced("sort_by_expert", unstable)
    assert "plan differs" in failure(Case("permute", T=12))


def test_noise_is_refused(replaced):
    replaced("combine", lambda plain, *args: plain(*args) * (1 + 1e-7 * torch.rand(())))
    assert "repeats differ" in failure(COMBINE)


def test_a_hole_is_refused(replaced):
    def with_a_hole(plain, rows, *args):
        out = torch.empty_like(right := plain(rows, *args))
        out[:-1] = right[:-1]
        return out

    replaced("combine", with_a_hole)
    assert "non-finite" in failure(COMBINE)


def test_a_write_outside_is_refused(replaced):
    def one_too_far(plain, x, name):
        out = torch.empty_like(x)
        out.as_strided((out.numel() + 1,), (1,)).fill_(0)
        return out.copy_(plain(x, name))

    replaced("activate", one_too_far)
    assert "wrote 4 bytes outside" in failure(Case("activate", T=5))


def test_a_read_outside_is_refused(replaced):
    def one_too_far(plain, x, name):
        beyond = x.as_strided((x.numel() + 1,), (1,))[-1]
        return plain(x, name) + 0 * beyond

    replaced("activate", one_too_far)
    assert "non-finite" in failure(Case("activate", T=5))


def test_a_changed_argument_is_refused(replaced):
    replaced("activate", lambda plain, x, name: plain(x.mul_(1 + 1e-7), name))
    assert "changed an argument" in failure(Case("activate", T=5))


@pytest.mark.parametrize("op", OPS)
def test_a_case_is_read_as_it_is_written(op):
    generator = random.Random(1)
    for _ in range(30):
        case = verify.draw(generator, ("fp32", "bf16"), big=False)
        assert case.problem is None and parse(str(case)) == case
    assert str(Case(op)) == op and parse(op) == Case(op)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gemm", "op must be one of .*, got 'gemm'"),
        ("permute Q=3", "'Q=3'"),
        ("permute T=x", "T must be a number, got 'x'"),
        ("permute E=2 K=3", "K must be at most E = 2, got 3"),
        ("route T=5 groups=2", "groups must divide T = 5, got 2"),
        ("activate activation=tanh", "activation must be one of .*, got 'tanh'"),
    ],
)
def test_a_case_that_cannot_be_is_named(text, message, capsys):
    with pytest.raises(ValueError, match=message):
        parse(text)
    assert main(["verify", "--backend", "reference", "--case", text]) == 2


def test_a_failure_ends_with_1_and_a_command_that_repeats_it(replaced, capsys, tmp_path):
    arguments = ["verify", "--backend", "reference", "--device", "cpu", "--few", "--op", "activate"]
    assert main(arguments) == 0
    replaced("activate", lambda plain, *args: plain(*args) * 1.1)
    capsys.readouterr()
    assert main([*arguments, "--json", str(tmp_path / "v.json")]) == 1
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["failed"] == 6 == len(report["results"]) and report["not_checked"]
    command = next(line for line in capsys.readouterr().out.splitlines() if "--case" in line)
    case = command.split("--case '")[1].rstrip("'")
    assert case in {row["case"] for row in report["results"]}
    assert main(["verify", "--backend", "reference", "--device", "cpu", "--case", case]) == 1


def test_ops_take_turns_so_that_a_short_budget_sees_all():
    ops = [case.op for _, case in all_cases(cases.FAMILIES, ("bf16",))]
    assert set(ops[: 2 * len(cases.OPS)]) == set(cases.OPS)
    assert "route" in {case.op for _, case in all_cases(cases.FEW, ("bf16",))}


def test_nothing_checked_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(cases, "all_cases", lambda *_: iter(()))
    assert main(["verify", "--backend", "reference", "--device", "cpu"]) == 1
    assert "nothing was checked" in capsys.readouterr().out


def test_a_spent_budget_is_said(capsys):
    assert main(["verify", "--backend", "reference", "--device", "cpu", "--budget", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "cases: --budget was spent" in out and "expert_mlp" in out and "\nreference  activate" not in out


def test_fuzz_finds_a_rare_bug_and_makes_it_small(replaced):
    def wrong_from_7_tokens(plain, rows, weights, inverse, top_k):
        out = plain(rows, weights, inverse, top_k)
        return out if out.shape[0] < 7 or out.shape[1] < 3 else out * 1.5

    replaced("combine", wrong_from_7_tokens)
    *passed, last = verify.fuzz(["reference"], ("fp32",), "cpu", 60, seed=0)
    found = parse(last.case)
    assert last.failures and not any(result.failures for result in passed)
    assert (found.T, found.H, found.E, found.layout) == (7, 3, 1, "contiguous")


def test_fuzz_stops_in_time():
    results = list(verify.fuzz(["reference"], ("fp32", "fp16", "bf16"), "cpu", 2, seed=3))
    assert results and not any(result.failures for result in results)


@pytest.mark.parametrize("pattern", ["uniform", "one_expert", "dropped"])
@pytest.mark.parametrize("op", [op for op in OPS if op not in ("route", "activate")])
def test_another_routing_takes_the_place_of_the_first(op, pattern):
    call = cases.build(Case(op, T=12, pattern=pattern))
    before = call.run(*call.inputs)
    call.reroute()
    after, wanted = call.run(*call.inputs), call.truth(*call.inputs)
    assert torch.allclose(after, wanted, rtol=1e-4, atol=1e-5) and not torch.allclose(before, after)


def test_families_differ():
    for op in OPS:
        found = [case for _, case in all_cases(FAMILIES, ("fp32",), (op,))]
        assert len(found) == len(set(found)) >= 10


@pytest.mark.slow
def test_triton_is_checked_in_the_interpreter_unasked(capsys):
    assert main(["verify", "--device", "cpu", "--op", "activate", "--few", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if " activate " in line] == ["reference", "triton"]
    assert "not checked: triton on a GPU" in out
