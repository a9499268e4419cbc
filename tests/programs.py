"""Small C++ programs for tests, compiled by g++ into build/ at first use and when their source changes."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from cumo_kernels import extension

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SOURCES = Path(__file__).parent / "kernels/host"
EMULATED = ("-DCUMO_EMULATE", "-Wno-unknown-pragmas")


def missing() -> str | None:
    """The reason why programs cannot be compiled on this machine, or None."""
    if COMPILER is None:
        return "there is no g++"
    return None if (extension.CSRC / "hopper.cu").exists() else "there is no csrc/"


def build(name: str, *flags: str, csrc: bool = True) -> Path:
    """Compile tests/kernels/host/<name>.cpp, which may include headers of its folder and of csrc/."""
    directory = extension.ROOT / "build/host"
    directory.mkdir(parents=True, exist_ok=True)
    program, source = directory / name, SOURCES / f"{name}.cpp"
    parts = [source, *SOURCES.glob("*.h"), *(extension.CSRC.iterdir() if csrc else [])]
    include = [f"-I{extension.CSRC}"] if csrc else []
    command = [COMPILER, "-std=c++17", *include, *flags, str(source), "-o", str(program)]
    wanted = extension.hash_of_files(parts, extension.ROOT, " ".join(command))
    stamp = program.with_suffix(".hash")
    with extension._alone(directory):  # one test process compiles, the others wait
        if not (program.exists() and stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
            stamp.write_text(wanted)
    return program


def run(program: Path, *arguments: str, given: str = "") -> list[str]:
    """Run a program with this input and return the lines that it prints."""
    done = subprocess.run([program, *arguments], input=given, capture_output=True, text=True, timeout=100)
    called = " ".join([program.name, *arguments])
    assert done.returncode == 0, f"{called} ended with {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout.splitlines()


def _folders(package: str) -> list[Path]:
    """Folders of an installed package, which is not imported; all of them for a namespace package."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


def cutlass_headers() -> Path | None:
    found = [folder / "source/include" for folder in _folders("cutlass_library")]
    return next((folder for folder in found if (folder / "cute/tensor.hpp").exists()), None)


def cuda_headers() -> tuple[Path, ...]:
    """Include folders with cuda_runtime.h and CCCL: those of nvcc, or of pip packages; empty if missing."""
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        listed = subprocess.run([nvcc, "--dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
        # nvcc may be a wrapper script, so ask it for its own path
        toolkits[:0] = [line.split("=", 1)[1] for line in listed.splitlines() if line.startswith("#$ TOP=")]
    places = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    # triton has the headers that torch's packages lack, except CCCL
    places += [folder / "backends/nvidia/include" for folder in _folders("triton")]
    wheels = [include for folder in _folders("nvidia") for include in folder.glob("*/include")]
    below = [path for include in (*places, *wheels) for path in (include / "cccl", include)]
    cccl = [path for path in below if (path / "cuda/std/type_traits").exists()]
    whole = ("cuda.h", "cuda_runtime.h", "crt/host_defines.h")
    found = [place for place in places if all((place / name).exists() for name in whole)]
    return (found[0], cccl[0]) if found and cccl else ()
