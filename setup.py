"""Install cumo, and build the CUDA extension `cumo_kernels._C` from csrc/ if possible.

    CUMO_BUILD unset   build if csrc/, nvcc and a CUDA torch are present, else print why not
    CUMO_BUILD=1       build, or fail with the reason
    CUMO_BUILD=0       do not build

No GPU is needed: the code is compiled for TORCH_CUDA_ARCH_LIST, by default for those architectures of
cumo_kernels/extension.py that this nvcc supports. Static settings are in pyproject.toml.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

HERE = ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    # installers put it there without changing PATH
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def ask_nvcc(nvcc: str) -> tuple[str, str]:
    """-> (release such as "13.0", root of the toolkit); nvcc knows its root even in a wrapper script."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"TOP=(\S+)", plan)
    root = Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]
    return re.search(r"release (\d+\.\d+)", version)[1], str(root)


def settings():
    """The module cumo_kernels/extension.py, without importing the package and its dependencies."""
    spec = importlib.util.spec_from_file_location("cumo_extension", HERE / "cumo_kernels" / "extension.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known_architectures(nvcc: str, wanted: str) -> str:
    """The part of a list such as "8.0;9.0a;12.0+PTX" that `nvcc` can compile."""
    codes = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    number = lambda name: "sm_" + re.sub(r"[.a]|\+PTX", "", name)
    return ";".join(name for name in wanted.split(";") if number(name) in codes)


def refusal() -> str | None:
    """Why the extension is not built, or None. torch is imported only after all cheaper checks."""
    if os.environ.get("CUMO_BUILD") == "0":
        return "CUMO_BUILD=0"
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return "this tree has no csrc/bindings.cpp"
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc on PATH, in /usr/local/cuda or under CUDA_HOME"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in the build environment (pip install --no-build-isolation uses yours)"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    release, _ = ask_nvcc(nvcc)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release}, torch {torch.__version__} is CUDA {torch.version.cuda}"
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked and not settings().choose_architectures(asked)[0]:
        return f"the kernels need an architecture from 8.0 on, TORCH_CUDA_ARCH_LIST is {asked}"
    return None


def extension() -> dict:
    """Arguments of setup() that build cumo_kernels._C."""
    nvcc, build = find_nvcc(), settings()
    os.environ["CUDA_HOME"] = ask_nvcc(nvcc)[1]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = known_architectures(nvcc, build.ARCHITECTURES)
    architectures, notes = build.choose_architectures(os.environ["TORCH_CUDA_ARCH_LIST"])
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    for note in notes:
        print(f"cumo_kernels._C: {note}")
    print(f"cumo_kernels._C: nvcc {ask_nvcc(nvcc)[0]} for {architectures}")
    cxx_flags = [
        *build.CXX_FLAGS,
        f'-DCUMO_ARCHITECTURES="{architectures}"',
        f'-DCUMO_SOURCE="{build.hash_of_sources()}"',
    ]
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    module = CUDAExtension(
        "cumo_kernels._C",
        [path.relative_to(ROOT).as_posix() for path in build.sources(ROOT / "csrc")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx_flags, "nvcc": build.nvcc_flags(architectures)},
        depends=[path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").iterdir())],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def build_arguments() -> dict:
    setting = os.environ.get("CUMO_BUILD", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"CUMO_BUILD must be 0, 1 or unset, got {setting!r}")
    reason = refusal()
    if reason is None:
        return extension()
    if setting == "1":
        raise SystemExit(f"CUMO_BUILD=1, but cumo_kernels._C cannot be built: {reason}")
    print(f"cumo_kernels._C is not built: {reason}")
    return {}


if __name__ == "__main__":
    # pip runs this file several times; only a command that compiles needs this decision
    metadata_only = {"egg_info", "dist_info", "sdist", "clean"} & set(sys.argv)
    setup(**({} if metadata_only else build_arguments()))
