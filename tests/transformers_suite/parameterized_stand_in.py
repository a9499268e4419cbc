"""Stand-in for the package parameterized, for environments without it: only `parameterized.expand`.

The tests of transformers use it. Test names are those of the package, so that the lists of tests stay valid.
"""

import functools
import inspect
import re
from typing import Any, NamedTuple


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
