"""The compiled extension: installed as `cumo_kernels._C`, or built from a checkout's csrc/ on first use.

CUMO_JIT=1      in a checkout without `_C`: compile for this machine's GPU on first use, into build/
CUMO_EMULATE=1  compile the same kernels for the CPU with g++ (csrc/emulate.h): slow, for tests without a GPU

setup.py uses the same `ARCHITECTURES` and flags, so that both ways build the same code.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
# A100, Hopper with its own instructions, data-centre Blackwell, and Blackwell workstations and later
ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"
# torch adds the -std= that its own headers need: C++17 for 2.11, C++20 for 2.15; csrc/ compiles with either
CXX_FLAGS = ["-O3", "-fvisibility=hidden"]
# O1: compile time matters too, and threads of a block run one at a time anyway
EMULATION_FLAGS = ["-O1", "-fvisibility=hidden", "-DCUMO_EMULATE", "-Wno-unknown-pragmas"]

EMULATE = os.environ.get("CUMO_EMULATE") == "1"
JIT = os.environ.get("CUMO_JIT") == "1"


def nvcc_flags(architectures: str) -> list[str]:
    """For `architectures` as in TORCH_CUDA_ARCH_LIST; without 9.0a Hopper runs the kernels of Ampere."""
    flags = ["-O3", "-lineinfo"]
    return [*flags, "-DCUMO_SM90A"] if "9.0a" in architectures else flags


def choose_architectures(asked: str) -> tuple[str, list[str]]:
    """-> the part of a TORCH_CUDA_ARCH_LIST that csrc/ compiles for ("" if none), and notes for the user.

    Containers set long lists in the environment that were not chosen for these kernels.
    """
    names = re.split(r"[;\s]+", asked.strip())
    old = [name for name in names if re.match(r"[1-7]\.|Kepler|Maxwell|Pascal|Volta|Turing", name)]
    left = [name for name in names if name not in old]
    notes = [f"nothing is compiled for {', '.join(old)}: the kernels need 8.0 or later"] if old else []
    if any(name in ("9.0", "9.0+PTX", "Hopper") for name in left) and "9.0a" not in asked:
        notes.append("without 9.0a in TORCH_CUDA_ARCH_LIST Hopper runs the kernels of Ampere")
    return ";".join(left), notes


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code compiled for `architectures` runs on a GPU of that compute capability."""
    for name in architectures.split(";"):
        known = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if known is None:  # the name of a generation, which only torch can translate
            return True
        built, suffix = (int(known[1]), int(known[2])), known[3]
        same = built == capability if suffix == "a" else built[0] == capability[0] and built <= capability
        if same or (known[4] and not suffix and built <= capability):
            return True
    return False


def best_of(capability: tuple[int, int], architectures: str) -> str:
    """The one of `architectures` whose machine code a GPU of that compute capability runs; "" if unknown."""
    known = [name for name in architectures.split(";") if re.match(r"\d+\.\d", name)]
    able = [name for name in known if runs_on(capability, name)]
    number = lambda name: tuple(map(int, re.findall(r"\d+", name)))
    return max(able, key=lambda name: (number(name), "PTX" not in name), default="")


def architecture(capability: tuple[int, int]) -> str:
    """The name of a GPU of that compute capability in TORCH_CUDA_ARCH_LIST."""
    return "9.0a" if capability == (9, 0) else ".".join(map(str, capability))


def hash_of_files(paths: Iterable[Path], root: Path, options: str = "") -> str:
    """Hash of the files among `paths` (name under `root` and bytes) and of the build's `options`."""
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, paths)):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        digest.update(data)
    digest.update(options.encode())
    return digest.hexdigest()[:16]


def hash_of_sources(csrc: Path = CSRC) -> str:
    """Hash of csrc/, which a built `_C` carries."""
    return hash_of_files(csrc.iterdir(), csrc)


@cache
def outdated() -> str | None:
    """Why `_C` may not match csrc/, or None: it was built from other sources."""
    if EMULATE or JIT or missing() is not None or not (CSRC / "bindings.cpp").exists():
        return None
    if (reason := unusable()) is not None:
        return reason
    if getattr(load(), "source", "unknown") == hash_of_sources():
        return None
    return "cumo_kernels._C was built from a csrc/ other than this tree's: build it again"


def sources(csrc: Path = CSRC) -> list[Path]:
    return sorted(path for path in csrc.iterdir() if path.suffix in (".cpp", ".cu"))


@cache
def missing() -> str | None:
    """Why `load` would fail, or None. Cached: an installation does not change while a program runs."""
    if EMULATE or JIT:
        setting = "CUMO_EMULATE=1" if EMULATE else "CUMO_JIT=1"
        if not (CSRC / "bindings.cpp").exists():
            return f"{setting} needs a checkout, there is no {CSRC}"
        return None
    if importlib.util.find_spec("cumo_kernels._C") is None:
        return "the extension cumo_kernels._C is not built in this installation"
    return None


def unusable() -> str | None:
    """Why the built extension cannot be loaded, or None; only calls on a GPU load it."""
    if EMULATE or JIT:
        return None
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


@cache
def unfit(device) -> str | None:
    """Why the installed extension cannot run on that GPU, or None."""
    import torch

    if EMULATE or JIT or not torch.cuda.is_available():
        return None
    if (reason := unusable()) is not None:
        return reason
    architectures = getattr(load(), "architectures", "all it knew")
    capability = torch.cuda.get_device_capability(device)
    if runs_on(capability, architectures):
        return None
    version = ".".join(map(str, capability))
    return f"cumo_kernels._C was built for {architectures}, but this GPU is {version}: build it here"


@cache
def code_for(device) -> str:
    """The architecture whose machine code runs on that GPU, as `best_of` names it."""
    import torch

    if EMULATE:
        return "emulated"
    capability = torch.cuda.get_device_capability(device)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(capability)
    built = choose_architectures(asked)[0] if JIT else getattr(load(), "architectures", "")
    return best_of(capability, built)


@cache
def load() -> ModuleType:
    """The module with the launchers.

    Raises:
        RuntimeError: compiling failed (the message contains the compiler's), or the build does not fit torch.
    """
    if EMULATE:
        return _compile("cumo_emulated", _as_cpp(sources()), EMULATION_FLAGS)
    if JIT:
        return _compile("cumo_jit", sources(), CXX_FLAGS)
    import torch

    again = "cumo_kernels._C was built for another torch, build it again"
    try:
        module = importlib.import_module("cumo_kernels._C")
    except ImportError as error:
        raise RuntimeError(f"{again}: {error}") from error
    built, running = getattr(module, "torch", "an older one"), torch.__version__.split("+")[0]
    if built != running:  # it may load but read the wrong fields of a tensor
        raise RuntimeError(f"{again}: it was built for {built}, this is {running}")
    return module


def _build_directory(name: str) -> Path:
    import torch

    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    directory = ROOT / "build" / f"{name}-{python}-torch{torch.__version__}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _as_cpp(files: list[Path]) -> list[Path]:
    """Write a .cpp for each .cu into the build directory, since torch would compile a .cu with nvcc."""
    directory = _build_directory("cumo_emulated")
    found = []
    for path in files:
        if path.suffix == ".cu":
            wrapper = directory / f"{path.stem}.cpp"
            text = f'#include "{path}"\n'
            if not wrapper.exists() or wrapper.read_text() != text:
                partial = wrapper.with_suffix(f".{os.getpid()}")
                partial.write_text(text)
                partial.replace(wrapper)
            path = wrapper
        found.append(path)
    return found


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time compiles in `directory`, even after an earlier one was killed.

    torch has its own lock there: a file that remains when its process is killed, and then blocks all others
    for ever. Our lock ends with its process. So the process that holds ours may remove torch's.
    """
    import fcntl  # not on Windows, where nothing is compiled on first use

    with (directory / "compiling").open("a") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        left = directory / "lock"
        if left.exists():
            print(
                f"cumo_kernels: removed {left}, left by a killed process; compiling",
                file=sys.stderr,
            )
            left.unlink()
        yield


def _compile(name: str, files: list[Path], cxx_flags: list[str]) -> ModuleType:
    import torch
    from torch.utils import cpp_extension

    directory = _build_directory(name)
    if not list(directory.glob("*.so")):
        print(
            f"cumo_kernels: compiling csrc/ into {directory}; the first time takes minutes", file=sys.stderr
        )
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"], notes = choose_architectures(asked)
        for note in [] if EMULATE else notes:
            print(f"cumo_kernels: {note}", file=sys.stderr)
    elif torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = architecture(torch.cuda.get_device_capability())
    with _alone(directory):
        return cpp_extension.load(
            name,
            [str(path) for path in files],
            extra_cflags=cxx_flags,
            extra_cuda_cflags=nvcc_flags(os.environ.get("TORCH_CUDA_ARCH_LIST", "")),
            extra_include_paths=[str(CSRC)],
            build_directory=str(directory),
        )
