"""Imports cumo_model without torch and transformers, and registers it with both when they are imported.

A hook of the import system watches for the modules with which CuMo registers itself. It acts after the
outermost import of transformers or of this project has ended, because modules that are half imported cannot
be used.
"""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

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
# old module paths of cumo 0.1, but for cumo_model.upcycle, which would hide the function of that name
MOVED = {
    "model": "clip_moe compat config cumo llm_moe losses merge=image_tokens mlp_moe moe quantize "
    "vision=pyramid",
    "processing": "conversation sentencepieces templates",
    "checkpoints": "checkpoint=convert files=folders layout original_config parts patch shards "
    "tool=upcycle_checkpoint",
    "training": "adapters=lora flops monitor parallel recipe recover spread=expert_checkpoints start trainer "
    "zero=deepspeed",
    "analysis": "experts plots",
    "serving": "chat",
}
OLD = {f"cumo_model.{entry.partition('=')[0]}" for names in MOVED.values() for entry in names.split()}


def attributes(
    package: str, table: Mapping[str, str], rooms: tuple[str, ...] = ()
) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package whose public names are imported at first use.

    Args:
        package: name of the package.
        table: module -> the public names that it defines, separated by blanks.
        rooms: subpackages that are attributes too, with the modules that registration imports.
    """
    namespace = sys.modules[package].__dict__
    module_of = {name: module for module, names in table.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name in rooms:
            register()
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(importlib.import_module(module_of[name]), name)
        return namespace[name]

    def __dir__() -> list[str]:
        return sorted({*namespace, *module_of, *rooms})

    return __getattr__, __dir__


def register() -> None:
    """Register CuMo and its experts with transformers, and the ops of cumo_kernels with torch.

    Raises:
        ImportError: a module that this needs cannot be imported.
    """
    try:
        import cumo_model.registered  # noqa: F401  the lock of this import also lets other threads wait
    except Exception as error:
        raise ImportError(
            f"cumo_model cannot register itself with transformers: {type(error).__name__}: {error}"
        ) from error


def _register_ops() -> None:
    try:
        import cumo_kernels  # noqa: F401
    except Exception as error:
        raise ImportError(
            f"cumo_model cannot register the ops of cumo_kernels: {type(error).__name__}: {error}"
        ) from error


class Hook:
    """A finder that finds what the other finders do, and acts after a watched module has been executed."""

    def __init__(self):
        self.thread = threading.local()

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname in OLD:
            register()
            return sys.modules["cumo_model.registered"].OLD_PATHS.find_spec(fullname)
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
            if fullname in WATCHED:
                state["due"] = True
            if not state["depth"] and state.pop("due", False):
                register()

        loader.exec_module = exec_module


def watch() -> None:
    """Register with what is imported already, and from now on with what will be."""
    sys.meta_path.insert(0, Hook())
    if "torch" in sys.modules:
        _register_ops()
    if any(name in sys.modules for name in WATCHED):
        register()
