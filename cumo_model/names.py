"""Public names of a package, imported at their first use."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(
    package: str,
    table: Mapping[str, str],
    rooms: tuple[str, ...] = (),
    load: Callable[[], None] | None = None,
) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package whose public names are imported at first use.

    Args:
        package: name of the package.
        table: module -> the public names that it defines, separated by blanks.
        rooms: subpackages that are attributes too.
        load: called before a subpackage is given, to import its modules.
    """
    namespace = sys.modules[package].__dict__
    module_of = {name: module for module, names in table.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name in rooms:
            load()
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(importlib.import_module(module_of[name]), name)
        return namespace[name]

    def __dir__() -> list[str]:
        return sorted({*namespace, *module_of, *rooms})

    return __getattr__, __dir__
