"""Aliases for module paths of cumo 0.1 that have changed; they are removed in 0.2.

Importing an old path gives the module at its new path and a DeprecationWarning. CHANGELOG.md has the table.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds old module paths.

    Args:
        package: whose modules moved.
        rooms: new subpackage -> its modules, "name" or "old=new"; old paths lay in `package` itself.
    """

    def __init__(self, package: str, rooms: dict[str, str]):
        self.new_paths: dict[str, str] = {}
        for room, modules in rooms.items():
            for entry in modules.split():
                old, _, new = entry.partition("=")
                self.new_paths[f"{package}.{old}"] = f"{package}.{room}.{new or old}"

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.new_paths:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec) -> ModuleType:
        module = importlib.import_module(self.new_paths[spec.name])
        spec.loader_state = module.__spec__  # the import system replaces it
        return module

    def get_code(self, fullname: str):
        """For `python -m` with an old path."""
        new = self.new_paths[fullname]
        return importlib.util.find_spec(new).loader.get_code(new)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__spec__
        module.__spec__ = old.loader_state
        warnings.warn(
            f"{old.name} is now {self.new_paths[old.name]}; the old path goes with cumo 0.2",
            DeprecationWarning,
            stacklevel=2,
        )


def keep_old_paths(package: str, **rooms: str) -> None:
    """Let old module paths of `package` import; see `MovedModules` for the arguments."""
    sys.meta_path.insert(0, MovedModules(package, rooms))
