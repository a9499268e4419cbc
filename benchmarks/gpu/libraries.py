"""The libraries that gcc builds for Triton's launches, and where Triton looks for them.

Triton 3.6 builds a library for every signature of a kernel, under a key of its source and the platform. 3.9
launches everything through its driver's module, whose key also has the paths of Triton and libcuda: `place`
copies that module to the keys of another machine. When pyproject.toml requires 3.9, remove `LAUNCHERS`.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build as triton_build
from triton.runtime import cache as triton_cache

LAUNCHERS = hasattr(nvidia, "compile_module_from_src")
COMPILE = "compile_module_from_src" if LAUNCHERS else "compile_module_from_file"


class _Asked(Exception):
    """Aborts a call of Triton once the wanted value is known."""


def _folders(compile: Callable, call: dict) -> list[str]:
    """Folders in which Triton may look for the output of `compile` for `call`, this machine's first.

    The key has the result of platform.architecture(), which lacks "ELF" if `file` is not installed.
    """
    own = triton_build.platform_key()
    bare, found = own.removesuffix("ELF"), []
    for platform in (own, *({bare, f"{bare}ELF"} - {own})):
        with (
            mock.patch.object(triton_build, "platform_key", return_value=platform),
            mock.patch.object(triton_build, "get_cache_manager", side_effect=_Asked) as ask,
            contextlib.suppress(_Asked),
        ):
            compile(**call)
        found.append(triton_cache._base32(ask.call_args.args[0]))
    return found


def _link(cache: Path, own: str, folders: Iterable[str]) -> None:
    for folder in folders:
        (cache / folder).mkdir(exist_ok=True)
        for file in (cache / own).glob("*.so"):
            with contextlib.suppress(FileExistsError):
                os.link(file, cache / folder / file.name)


def note(found: set[str]) -> None:
    """Make Triton store gcc's output under the keys of every platform, and add the folders to `found`."""
    original = getattr(nvidia, COMPILE)

    def build(**call):
        module = original(**call)
        own, *others = _folders(original, call)
        _link(Path(triton.knobs.cache.dir), own, others)
        found.update((own, *others))
        return module

    setattr(nvidia, COMPILE, build)


def build_launcher(compiled) -> None:
    if LAUNCHERS:
        nvidia.CudaLauncher(compiled.src, compiled.metadata)


def place(cache: Path, names: Iterable[str]) -> None:
    """Copy the driver's module from the folders `names` of `cache` to the keys of this machine's Triton."""
    held = next((name for name in names if any((cache / name).glob("cuda_utils*.so"))), None)
    if held is None:
        return
    original = getattr(nvidia, COMPILE)
    with (
        mock.patch.object(nvidia, COMPILE, side_effect=_Asked) as ask,
        contextlib.suppress(_Asked, AssertionError),  # no driver: nothing is launched here
    ):
        nvidia.CudaUtils()
    if ask.call_args is not None:
        _link(cache, held, _folders(original, ask.call_args.kwargs))
