"""verify: it passes correct kernels, and each check refuses a kernel that is wrong in just that way."""

import argparse
import io
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cumo_kernels import dispatch
from cumo_kernels.__main__ import main
from cumo_kernels.activations import ACTIVATIONS, get_activation
from cumo_kernels.testing import Yardstick
from cumo_kernels.verification import cases, progress, verdicts, verify
from cumo_kernels.verification.cases import FAMILIES, OPS, Case, all_cases, parse
from cumo_kernels.verification.verify import check

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
    # twice torch's own error and twice half a rounding: the limit of the rule without unsplit sums
    assert all(r.output <= 4 and r.gradient <= 4 for r in results)


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


def test_an_unwritten_result_is_refused(replaced):
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
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]
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


EXACT = Case("route", T=48, H=600, E=8, K=3, gated=True, exact=True, groups=3)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_exact_logits_are_exact_under_any_signs(dtype):
    call = cases.build(replace(EXACT, dtype=dtype))
    x, gate = call.inputs
    assert call.true_integers[0].shape == (48, 3) and (x.abs() @ gate.abs().T).max() * 8 <= 256
    apart = -(-EXACT.H // cases.EXACT_TERMS)
    assert apart == 3 and all(chunk.any(0).all() for chunk in (x != 0).split(apart))
    generator = torch.Generator().manual_seed(1)
    for t in call.inputs:
        t *= torch.randint(2, t.shape, generator=generator) * 2 - 1
    # in two halves, added in the dtype: also exact
    parts = x[:, :301] @ gate[:, :301].T + x[:, 301:] @ gate[:, 301:].T
    assert torch.equal(parts.double(), x.double() @ gate.double().T)
    assert torch.equal(parts, cases._exact_logits(x, gate))


@pytest.mark.parametrize("op", ["route", "route_backward"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_router_that_drops_columns_is_refused(replaced, op, dtype):
    """Drops the last columns, or a warp's share of a tile, from the logits or from both gradients."""
    at, columns = 0 if op == "route" else 3, [0, 0]  # the position of x, and the dropped columns

    def drops(plain, *args):
        args = list(args)
        for i in (at, at + 1):
            args[i] = args[i].clone()
            args[i][:, slice(*columns)] = 0
        return plain(*args)

    replaced(op, drops)
    case = replace(EXACT, dtype=dtype)
    assert check(case, "reference", "cpu").failures == []
    for columns[:] in ((568, 600), (599, 600), (128, 136)):
        words = failure(case)
        assert " is off " in words and ("plan differs" in words) == (op == "route")


def test_gated_routers_are_checked_in_every_dtype():
    for families in (FAMILIES, cases.ALIGNED, cases.GPU_FAMILIES):
        found = [case for _, case in all_cases(families, ("fp32", "fp16", "bf16"), ("route",)) if case.gated]
        assert {case.dtype for case in found} == {"fp32", "fp16", "bf16"}
        assert all(case.exact for case in found if case.dtype != "fp32")


def test_every_activation_is_in_a_family():
    found = {case.activation for _, case in all_cases(FAMILIES, ("bf16",), ("activate",))}
    assert {get_activation(name).kind for name in found} == set(ACTIVATIONS)
    assert found >= set(cases.SPELLED)


def test_nothing_checked_is_not_a_success(monkeypatch, capsys):
    monkeypatch.setattr(cases, "all_cases", lambda *_: iter(()))
    assert main(["verify", "--backend", "reference", "--device", "cpu"]) == 1
    assert "nothing was checked" in capsys.readouterr().out


def test_a_spent_budget_is_reported(capsys):
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


def test_fuzz_keeps_an_intermittent_failure(replaced):
    calls = []

    def once(plain, *args):
        calls.append(args)
        return plain(*args) * (1.5 if len(calls) == 1 else 1)

    replaced("activate", once)
    *_, last = verify.fuzz(["reference"], ("fp32",), "cpu", 60, seed=0, names=("activate",))
    assert "off" in last.failures[0] and last.failures[-1].startswith("intermittent")


def test_fuzz_draws_the_ops_that_were_asked_for(tmp_path):
    path = tmp_path / "v.json"
    words = [
        "--device",
        "cpu",
        "--backend",
        "reference",
        "--fuzz",
        "0.5",
        "--op",
        "combine",
        "--json",
        str(path),
    ]
    assert main(["verify", *words]) == 0
    assert {row["case"].split()[0] for row in json.loads(path.read_text())["results"]} == {"combine"}


def test_a_command_names_what_chose_the_code(monkeypatch):
    for name in verdicts.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    result = verify.Result("permute T=5", "cuda", "cpu")
    assert result.command.startswith("python -m cumo_kernels verify --backend cuda")
    monkeypatch.setenv("CUMO_EMULATE", "1")
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", "90")
    assert result.command.startswith("CUMO_EMULATE=1 CUMO_EMULATE_CAPABILITY=90 python -m")


def test_an_interrupted_run_keeps_its_results(replaced, monkeypatch, tmp_path):
    def cut_off(plain, x, name):
        if x.dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return plain(x, name) * (1.1 if x.dtype == torch.float16 else 1)

    replaced("activate", cut_off)
    monkeypatch.setattr(verify, "FLUSH", 0)
    path = tmp_path / "v.json"
    words = ["--backend", "reference", "--device", "cpu", "--few", "--op", "activate"]
    words += [word for dtype in ("fp32", "fp16", "bf16") for word in ("--dtype", dtype)]
    with pytest.raises(KeyboardInterrupt):
        main(["verify", *words, "--json", str(path)])
    report = json.loads(path.read_text())
    assert (len(report["results"]), report["failed"]) == (2, 1)
    lines = [json.loads(line) for line in Path(f"{path}.lines").read_text().splitlines()]
    assert lines == report["results"]
    assert report["not_checked"] == ["the rest: this run has not ended"]


def test_a_lost_device_fails_only_one_case(replaced, monkeypatch, tmp_path, capsys):
    """The others run in a separate process, whose arguments are tested in this one."""
    broken, asked, whole = [], [], dispatch.implementation("reference", "activate")

    def breaks(plain, x, name):
        broken.append(name)
        raise RuntimeError("an illegal memory access was encountered")

    def another_process(words, switches):
        asked.append(words)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(dispatch._implementations, ("reference", "activate"), whole)
            assert main(["verify", *words, "--json", str(tmp_path / "child.json")]) == 0
        report = json.loads((tmp_path / "child.json").read_text())
        return [verify.Result(**row) for row in report["results"]], report["not_checked"]

    replaced("activate", breaks)
    monkeypatch.setattr(verify, "is_lost", lambda device: True)
    monkeypatch.setattr(verify, "elsewhere", another_process)
    words = ["--backend", "reference", "--device", "cpu", "--few", "--op", "activate", "--op", "combine"]
    assert main(["verify", *words, "--json", str(tmp_path / "v.json")]) == 1
    report = json.loads((tmp_path / "v.json").read_text())
    rows = [(row["case"].split()[0], bool(row["failures"])) for row in report["results"]]
    assert len(broken) == 1 and rows[0] == ("activate", True) and not any(failed for _, failed in rows[1:])
    every = len(list(all_cases(cases.FEW, ("fp32", "fp16", "bf16"), ("activate", "combine"))))
    assert (
        len(rows) == every and report["failed"] == 1 and asked[0][:4] == ["--device", "cpu", "--begin", "1"]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_device_does_not_fail_every_case(capsys):
    assert main(["verify", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_fuzz_stops_in_time():
    results = list(verify.fuzz(["reference"], ("fp32", "fp16", "bf16"), "cpu", 2, seed=3))
    assert results and not any(result.failures for result in results)


def test_fuzz_gives_up_a_case_that_outlasts_its_time(replaced):
    begun = []

    def endless(plain, x, name):
        begun.append(time.monotonic())
        while True:
            time.sleep(0.01)

    replaced("activate", endless)
    assert list(verify.fuzz(["reference"], ("fp32",), "cpu", 0.5, seed=0, names=("activate",))) == []
    assert len(begun) == 1 and time.monotonic() - begun[0] < 10


def test_the_interpreter_shares_the_time_of_fuzz(monkeypatch):
    started = []
    beside = lambda options, switches: started.append((options, switches, time.time()))
    monkeypatch.setattr(verify, "Beside", beside)
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    verify._interpreted(parser.parse_args(["--fuzz", "30", "--seed", "7"]))
    ((options, switches, now),) = started
    end = float(options[options.index("--until") + 1])
    assert abs(end - now - 30) < 5 and switches == {"TRITON_INTERPRET": "1"}
    assert options[options.index("--fuzz") + 1] == "30.0" and options[options.index("--seed") + 1] == "7"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line_in_a_terminal_and_rare_lines_elsewhere(is_terminal, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    shown = progress.Progress(stream)
    for done in range(1, 41):
        clock[0] += 0.25
        shown.show(f"{done} of 80 cases", progress.time_left(done, 80, 100.0))
    shown.log("FAILED one")
    shown.clear()
    text = stream.getvalue()
    if is_terminal:
        assert text.count("\n") == 1 and text.count("\r") == 41
        assert text.endswith(f"{progress.CLEAR}40 of 80 cases, about 10 s left{progress.CLEAR}FAILED one\n")
    else:
        assert text.splitlines() == [
            "20 of 80 cases, about 15 s left", "40 of 80 cases, about 10 s left", "FAILED one",
        ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["uniform", "one_expert", "dropped"])
@pytest.mark.parametrize("op", [op for op in OPS if op not in (*cases.ROUTES, "activate")])
def test_another_routing_takes_the_place_of_the_first(op, pattern):
    call = cases.build(Case(op, T=12, pattern=pattern))
    with torch.no_grad():
        before = call.run(*call.inputs)
        call.reroute()
        yardstick = Yardstick(call.reference, call.inputs, pool=False)
        (after,), (stale,) = (
            [row.reason for row in yardstick.measure(run) if row.name == "output 0"]
            for run in (call.run, lambda *_: before)
        )
    assert after is None and stale is not None


def test_families_differ():
    for op in OPS:
        found = [case for _, case in all_cases(FAMILIES, ("fp32",), (op,))]
        assert len(found) == len(set(found)) >= 10


@pytest.mark.slow
def test_triton_is_checked_in_the_interpreter_by_default(capsys):
    assert main(["verify", "--device", "cpu", "--op", "activate", "--few", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if " activate " in line] == [
        "triton",
        "torch",
        "reference",
    ]
    assert "not checked: triton on a GPU" in out
