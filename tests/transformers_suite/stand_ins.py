"""Stand-ins for what the tests of transformers import and this environment does not have.

That is the package parameterized, of which only `expand` is used, and names of another release of
transformers than the installed one. A test that uses such a name is skipped.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import types
import unittest
from typing import Any, NamedTuple

PIPELINES = "tests.test_pipeline_mixin"  # its tests download their models, and it imports packages for that


class param(NamedTuple):
    """Arguments of one case."""

    args: tuple
    kwargs: dict


def _cases(values) -> list[param]:
    return [
        value if isinstance(value, param) else param(value if isinstance(value, tuple) else (value,), {})
        for value in (tuple(v) if isinstance(v, list) else v for v in values)
    ]


def _name(function, number: int, case: param) -> str:
    first = case.args[0] if case.args else None
    suffix = "_" + re.sub(r"[^a-zA-Z0-9_]+", "_", first) if isinstance(first, str) else ""
    return f"{function.__name__}_{number}{suffix}"


class parameterized:
    """Namespace of `expand`."""

    @staticmethod
    def expand(values, name_func=None, **_: Any):
        """Replace a test method by one method for each element of `values`."""

        def decorate(function):
            scope = inspect.currentframe().f_back.f_locals
            for number, case in enumerate(_cases(values)):
                name = (name_func or _name)(function, str(number), case)

                @functools.wraps(function)
                def one(self, *more, case=case, **named):
                    return function(self, *case.args, *more, **case.kwargs, **named)

                one.__name__ = name
                del one.__wrapped__  # pytest would take the parameters of the test for fixtures
                scope[name] = one

        return decorate


def _absent(where: str, name: str):
    """Stand-in for a function, class or decorator of another release."""
    reason = f"the installed transformers has no {where}.{name}"
    if name.startswith("require_"):
        return unittest.skip(reason)

    class Absent:
        def __new__(cls, *_, **__):
            raise unittest.SkipTest(reason)

    Absent.__name__ = name
    return Absent


def import_tests(module: str) -> types.ModuleType:
    """Import a module of transformers' tests; missing names of transformers are replaced by stand-ins."""
    if importlib.util.find_spec("parameterized") is None:
        sys.modules["parameterized"] = sys.modules[__name__]
    if PIPELINES not in sys.modules:
        sys.modules[PIPELINES] = types.ModuleType(PIPELINES)
        sys.modules[PIPELINES].PipelineTesterMixin = type("PipelineTesterMixin", (), {})
    requests = types.ModuleType("requests")  # some tests that download import it; removed again below
    try:
        while True:
            try:
                return importlib.import_module(module)
            except ImportError as error:
                _stand_in_for(error, requests)
    finally:
        if sys.modules.get("requests") is requests:
            del sys.modules["requests"]


def _stand_in_for(error: ImportError, requests: types.ModuleType) -> None:
    """Add what is missing, or raise the error."""
    where = error.name or ""
    found = re.match(r"cannot import name '(\w+)'", error.msg)
    if where == "requests" and where not in sys.modules:
        sys.modules[where] = requests
    elif where.split(".")[0] != "transformers" or (found and hasattr(sys.modules[where], found[1])):
        raise error
    elif found:
        setattr(sys.modules[where], found[1], _absent(where, found[1]))
    else:  # a whole module
        sys.modules[where] = types.ModuleType(where)
