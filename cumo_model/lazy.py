"""Registers CuMo with torch and transformers when they are imported, so that cumo_model need not import them.

A hook of the import system watches for the modules with which CuMo registers itself. It acts after the
outermost import of transformers or of this project has ended, because modules that are half imported cannot
be used.
"""

import contextlib
import importlib
import sys
import threading
from typing import Any

from cumo_model.old_paths import OLD

# with one of these loaded, transformers may be asked for a CuMo, or for experts by name
WATCHED = (
    "transformers.models.auto.auto_factory",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.feature_extraction_auto",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.moe",
)
COUNTED = ("transformers", "cumo_model", "cumo_kernels")  # packages whose imports must have ended


def register() -> None:
    """Register CuMo and its experts with transformers, and the ops of cumo_kernels with torch.

    Raises:
        ImportError: a module that this needs cannot be imported.
    """
    Hook.is_left = False
    try:
        import cumo_model.registered  # noqa: F401  the lock of this import also lets other threads wait
    except Exception as error:
        if _waits_for_us(error):
            Hook.is_left = True
            return
        Hook.is_on = False  # transformers itself is fine, and must be when it is imported again
        raise ImportError(
            f"cumo_model cannot register itself with transformers: {type(error).__name__}: {error}"
        ) from error


def _waits_for_us(error: BaseException | None) -> bool:
    """Whether another thread, in the middle of an import, waits for one of this thread; it will register."""
    while error is not None:
        if type(error).__name__ == "_DeadlockError" or "partially initialized module" in str(error):
            return threading.active_count() > 1
        error = error.__cause__ or error.__context__
    return False


def _register_ops() -> None:
    try:
        import cumo_kernels  # noqa: F401
    except Exception as error:
        raise ImportError(
            f"cumo_model cannot register the ops of cumo_kernels: {type(error).__name__}: {error}"
        ) from error


class Hook:
    """A finder that finds what the other finders do, and acts after a watched module has been executed."""

    is_on = True  # whether the watched modules are watched
    is_left = False  # whether a thread has left the registration to the next import that ends

    def __init__(self):
        self.thread = threading.local()

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname in OLD:
            register()
            return importlib.import_module("cumo_model.registered").OLD_PATHS.find_spec(fullname)
        if fullname.partition(".")[0] not in COUNTED and fullname != "torch":
            return None
        searched = self.thread.__dict__.setdefault("searched", set())
        if fullname in searched:  # asked by another finder of this kind
            return None
        searched.add(fullname)
        try:
            others = [other for other in sys.meta_path if other is not self and hasattr(other, "find_spec")]
            specs = (other.find_spec(fullname, path, target) for other in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            searched.discard(fullname)
        # a loader that is a class, or a finder too, also loads other modules
        if hasattr(spec and spec.loader, "__dict__") and not isinstance(spec.loader, type):
            if hasattr(spec.loader, "exec_module") and spec.loader not in sys.meta_path:
                self._watch(fullname, spec.loader)
        return spec

    def _watch(self, fullname: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module):
            with contextlib.suppress(AttributeError):
                del loader.exec_module  # the loader is its own again
            if fullname == "torch":
                execute(module)
                _register_ops()
                return
            state = self.thread.__dict__
            state["depth"] = state.get("depth", 0) + 1
            try:
                execute(module)
            finally:
                state["depth"] -= 1
            if fullname in WATCHED and Hook.is_on:
                state["due"] = True
            if not state["depth"] and (state.pop("due", False) or Hook.is_left):
                register()

        loader.exec_module = exec_module


def watch() -> None:
    """Register with what is imported already, and from now on with what will be."""
    sys.meta_path.insert(0, Hook())
    if sys.modules.get("torch") is not None:  # None blocks an import
        _register_ops()
    if any(name in sys.modules for name in WATCHED):
        register()
