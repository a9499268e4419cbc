"""Random cases for `verify --fuzz`, and the reduction of a failing case to a simpler one."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.verification import cases, packed_cases, scored_cases
from cumo_kernels.verification.cases import Case


def draw(
    generator: random.Random, dtypes: tuple[str, ...], big: bool, names: tuple[str, ...] = cases.OPS
) -> Case:
    """A random case; half of its fields have small or ordinary values."""
    rand, choice = generator.randint, generator.choice
    size = lambda top: choice((1, 2, 8, 16, 32, 64, rand(1, top), rand(1, top)))
    experts = choice((1, 2, 4, 4, 8, rand(1, 16), 64))
    groups = choice((1, 1, 2, 3))
    dtype = choice(dtypes)
    op = choice(names)
    case = Case(
        op,
        T=groups * choice((0, 1, rand(2, 9), rand(10, 80), rand(10, 3000 if big else 150))),
        H=size(520 if big else 130),
        I=size(300 if big else 100),
        O=size(300 if big else 100),
        E=experts,
        K=rand(1, min(experts, 8)),
        activation=choice([*sorted(ACTIVATIONS), *cases.SPELLED]),
        bias=choice((True, False)),
        gated=choice((True, False)) and not (op == "route" and dtype != "fp32"),
        memory=choice(("x", "preact", "all")),
        groups=groups,
        pattern=choice((*cases.PATTERNS, "dropped")),
        layout=choice(cases.LAYOUTS),
        weights=choice(packed_cases.WEIGHTS),
        rank=choice((0, 1, 16, rand(1, 64))),
        router=choice(sorted(scored_cases.ROUTERS)),
        dtype=dtype,
        seed=rand(0, 999_999),
    )
    return cases.used(case)


def smaller(case: Case, name: str) -> Iterator[Case]:
    """Variants of `case` with a simpler value of one field, the largest step first."""
    value = getattr(case, name)
    if isinstance(value, bool | str):
        steps = [getattr(Case(case.op), name)]
    else:
        least = 0 if name in ("T", "seed", "rank") else 1
        steps = [step for step in (least, value // 2, value - 1) if least <= step < value]
    for step in dict.fromkeys(steps):
        other = cases.used(replace(case, **{name: step}))
        if other != case and other.problem is None:
            yield other


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 90) -> Case:
    """The simplest case found in `seconds` that still `fails`."""
    stop = time.monotonic() + seconds
    improved = True
    while improved:
        improved = False
        for row in fields(case)[1:]:
            for other in smaller(case, row.name):
                if time.monotonic() > stop:
                    return case
                if fails(other):
                    case, improved = other, True
                    break
    return case


class Late(BaseException):
    """The time limit was reached inside a case; no Exception, which a check would count as its failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Late inside after so many seconds, in the main thread; in another thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Late

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
