"""Builds artefacts for a GPU machine elsewhere: every kernel of the gate compiled, and `_C`, in one package.

    python -m benchmarks.gpu.artifacts build                            here: all, into build/gpu-artifacts/
    python -m benchmarks.gpu.artifacts take                             there: install the package
    python -m benchmarks.gpu.artifacts compile --gpu this --workers 16  there: compile what was not taken
    python -m benchmarks.gpu.artifacts prove                            launch everything with a stub driver
    python -m benchmarks.gpu.artifacts try --cache DIR --folder DIR     pack, take and prove a few kernels

Launches are those of verify's cases and of CuMo's layers (launches.py). Triton compiles missing kernels at
the first launch, so a stale or incomplete package costs time but never gives a wrong result.
"""

import argparse
import hashlib
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build as triton_build
from triton.runtime import cache as triton_cache

from benchmarks.gpu import launches, libraries
from benchmarks.gpu.launches import Job, jobs, on_the_cpu
from cumo_kernels.tiles import codegen, hardware
from cumo_kernels.tiles.hardware import Gpu
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification import verified
from cumo_kernels.verification.verified import ROOT

FOLDER = ROOT / "build" / "gpu-artifacts"
GPU, ARCHITECTURE = "nvidia_h100", "9.0a"
LIMIT = 50 * 2**20  # the largest package, in bytes; a lent machine may take 64 MiB with the tree
KERNELS = "triton-cache.tar.xz"
KEPT = (".cubin", ".json", ".so")  # of a kernel's folder; a launch does not read the rest
MADE = "made.json"  # in a cache: lists the folders that `compile` needed
KEPT_CACHE = ROOT / "build" / "gpu-cache"
CRASHES = 3  # allowed crashes of workers; each loses the kernel being compiled


@dataclass
class Made:
    """The result of compiling: folders of Triton's cache, and messages about failures."""

    kernels: set[str] = field(default_factory=set)
    launchers: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    def add(self, other: "Made") -> None:
        self.kernels |= other.kernels
        self.launchers |= other.launchers
        self.failures += other.failures


class _Worker:
    """Compiles in one process; `claims` is a folder in which a process claims the kernels it compiles."""

    def __init__(self, gpu: Gpu, claims: str):
        torch.set_num_threads(1)
        self.gpu, self.claims = gpu, Path(claims)
        self.made = Made()
        try:
            nvidia.libcuda_dirs()
        except AssertionError:  # no driver here to link with
            from benchmarks.host import load_stub

            self.stub = load_stub()
        libraries.note(self.made.launchers)
        triton.knobs.runtime.jit_cache_hook = self._claimed
        nvidia.CudaUtils()

    def _claimed(self, *, fn, compile, **_) -> bool:
        """Whether another process compiles this kernel, or has."""
        words = f"{fn.module}.{fn.name} {compile['specialization_data']}"
        try:
            (self.claims / hashlib.sha256(words.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return True
        return False

    def _describe(self, kernel, compiled, gpu: Gpu, constants: dict[str, object]) -> codegen.Report:
        self.made.kernels.add(triton_cache._base32(compiled.hash))
        libraries.build_launcher(compiled)
        return codegen.bare(kernel, compiled, gpu, constants)

    def work(self, job: Job) -> Made:
        try:
            with on_the_cpu(), codegen.compiling(self.gpu, describe=self._describe) as launched:
                job.run()
            failed = {r.kernel: r.failure for r, _ in launched if r.failure}
            self.made.failures += [f"{job}: {name}: {words}" for name, words in failed.items()]
        except Exception as error:
            self.made.failures.append(f"{job}: {type(error).__name__}: {str(error).strip()[:300]}")
        made = Made(set(self.made.kernels), set(self.made.launchers), list(self.made.failures))
        self.made.kernels.clear()
        self.made.failures.clear()
        return made


_worker: _Worker | None = None


def _start(gpu: Gpu, claims: str) -> None:
    global _worker
    _worker = _Worker(gpu, claims)


def _work(job: Job) -> Made:
    return _worker.work(job)


def _in_turn(
    pool: ProcessPoolExecutor, todo: list[Job], number: int, over: Callable[[], bool]
) -> Iterator[tuple[Job, Made]]:
    """Run `number` calls at a time -> each with its result, as it ends; none starts once `over()`."""
    queue, tasks = iter(todo), {}
    while True:
        while len(tasks) < number and not over() and (job := next(queue, None)):
            tasks[pool.submit(_work, job)] = job
        if not tasks:
            return
        for task in wait(tasks, return_when=FIRST_COMPLETED).done:
            yield tasks.pop(task), task.result()


def compile_all(
    todo: list[Job], gpu: Gpu, workers: int, log: Callable[[str], None] = print, seconds: float = math.inf
) -> Made:
    """Compile the kernels that `todo` launches on `gpu`, each once, into this environment's Triton cache.

    After `seconds` no call starts; kernels of the others will be compiled at their first launch.
    """
    made, waiting, begin, said = Made(), dict.fromkeys(todo), time.monotonic(), 0.0
    over = lambda: time.monotonic() - begin > seconds
    with tempfile.TemporaryDirectory(prefix="cumo-claims-") as claims:
        for _ in range(CRASHES + 1):
            number = max(1, min(workers, len(waiting)))
            with ProcessPoolExecutor(number, get_context("spawn"), _start, (gpu, claims)) as pool:
                try:
                    for job, found in _in_turn(pool, [*waiting], number, over):
                        made.add(found)
                        del waiting[job]
                        spent, done = time.monotonic() - begin, len(todo) - len(waiting)
                        if spent - said > 10 or not waiting:
                            said, left = spent, spent / done * len(waiting)
                            words = f"{done} of {len(todo)} calls, {len(made.kernels)} kernels"
                            log(f"{words}, {spent:.0f} s, about {left:.0f} s left")
                except BrokenProcessPool:
                    made.failures.append("a worker crashed; its kernel will be compiled at the first launch")
            if not waiting or over():
                break
    if waiting and over():
        log(f"{seconds:.0f} s are over: {len(waiting)} of {len(todo)} calls compile at their first launch")
    elif waiting:
        made.failures.append(
            f"workers crashed too often: {len(waiting)} calls are left, first {next(iter(waiting))}"
        )
    return made


def _manifest(made: Made, gpu: Gpu, extension_file: Path | None) -> dict:
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        "triton": verified.triton_version(),
        "gpu": gpu.name,
        "capability": gpu.capability,
        "sources": {name: verified.source_of(name) for name in verified.SOURCES},
        "asked": _asked(gpu),
        "kernels": len(made.kernels),
        "extension": extension_file and extension_file.name,
        "built": datetime.now(UTC).timestamp(),
        "commit": verified.first_line("git", "rev-parse", "--short=10", "HEAD"),
    }


def pack(
    made: Made, cache: Path, extension_file: Path | None, folder: Path, gpu: Gpu, limit: int = LIMIT
) -> dict:
    """Write the package and return its manifest.

    Raises:
        ValueError: it would be larger than `limit` bytes; the message names the largest parts.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes: dict[str, int] = {}
    found = [file for name in made.kernels | made.launchers for file in (cache / name).iterdir()]
    # without links, for which reading would go back to the start
    with tarfile.open(folder / KERNELS, "w:xz", preset=6, dereference=True) as tar:
        # variants of one kernel in a row: they have much in common
        for file in sorted(found, key=lambda file: (file.suffix, file.name, file.parent.name)):
            if file.suffix in KEPT:
                tar.add(file, f"{file.parent.name}/{file.name}")
                sizes[file.name] = sizes.get(file.name, 0) + file.stat().st_size
    if extension_file is not None:
        (folder / f"{extension_file.name}.xz").write_bytes(lzma.compress(extension_file.read_bytes()))
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    manifest = {**_manifest(made, gpu, extension_file), "bytes": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    total = sum(files.values())
    if total > limit:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        mib = lambda size: f"{size / 2**20:.1f}"
        say = lambda part: ", ".join(f"{name} {mib(size)}" for name, size in part)
        shutil.rmtree(folder)
        raise ValueError(
            f"the package must be at most {mib(limit)} MiB, got {mib(total)}: {say(files.items())}; "
            f"the largest in the cache, unpacked and summed by name, are {say(largest)}"
        )
    return manifest


def _build_extension() -> Path:
    """Build `_C` for this Python and only Hopper, next to the tree's own."""
    where = ("--build-lib", "build/gpu-lib", "--build-temp", "build/gpu-temp")
    environment = {**os.environ, "CUMO_BUILD": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    command = (sys.executable, "setup.py", "-q", "build_ext", *where)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return ROOT / "build" / "gpu-lib" / "cumo_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _asked(gpu: Gpu) -> str:
    """Hash of what decides which kernels are needed, besides their sources: tile sizes and cases."""
    config = ROOT / "cumo_kernels" / "tiles" / "configs" / f"{gpu.name}.json"
    cases = sorted((ROOT / "cumo_kernels" / "verification").glob("*cases.py"))
    files = (config, *cases, Path(launches.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _differences(manifest: dict, backend: str) -> Iterator[str]:
    """Reasons why the package's `backend` does not fit this machine and tree."""
    here = _manifest(Made(), hardware.find(GPU), None)
    named = {"python": "Python", "torch": "torch", "triton": "Triton"}
    for key, name in named.items():
        if manifest[key] != here[key] and (key != "triton" or backend == "triton"):
            yield f"it was built with {name} {manifest[key]}, here it is {here[key]}"
    theirs, ours = manifest["sources"][backend], here["sources"][backend]
    if theirs != ours:
        yield f"it was built from source {theirs} of {backend}, here is {ours}"
    if torch.cuda.is_available():
        found = hardware.gpu_of(torch.device("cuda")).capability
        if found != manifest["capability"]:
            yield f"it was built for sm_{manifest['capability']}, this GPU is sm_{found}"


def _unpack(archive: Path, cache: Path) -> int:
    """-> folders added to `cache`; each is added atomically, and existing ones stay."""
    cache.mkdir(parents=True, exist_ok=True)
    folders: dict[str, dict[str, bytes]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name, file = member.name.split("/")
            folders.setdefault(name, {})[file] = tar.extractfile(member).read()
    taken = 0
    for name, files in folders.items():
        place = cache / name
        if any((*place.glob("__grp__*"), *place.glob("*.so"))):  # an empty folder is left by a failed search
            continue
        part = cache / f".{name}.{uuid.uuid4().hex}"
        part.mkdir()
        for file, data in files.items():
            if file.startswith("__grp__"):  # paths of the machine that compiled
                children = [child for child in json.loads(data)["child_paths"] if child in files]
                data = json.dumps({"child_paths": {child: str(place / child) for child in children}}).encode()
            (part / file).write_bytes(data)
        try:
            part.rename(place)
            taken += 1
        except OSError:  # another process was faster
            shutil.rmtree(part)
    libraries.place(cache, folders)
    return taken


def _place_extension(packed: Path, built: float, package: Path) -> str:
    target, data = package / packed.stem, lzma.decompress(packed.read_bytes())
    if target.exists():
        if target.read_bytes() == data:
            return f"{target.name} is in place already"
        if target.stat().st_mtime > built:
            return f"not taken: {target.name}, a newer one is in {package}"
    part = package / f".{target.name}.{os.getpid()}"
    part.write_bytes(data)  # with the time of now, so that setup.py finds nothing older than csrc/
    part.replace(target)
    return f"taken: {target.name}, {len(data) / 2**20:.1f} MiB"


def take(folder: Path, cache_dir: Path, package: Path = ROOT / "cumo_kernels") -> list[str]:
    """Install what fits this machine and this tree -> messages: what was taken, or why not.

    Of kernels only the binaries: codegen compiles again for its reports.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        words = []
        (folder / "taken").unlink(missing_ok=True)
        if reasons := list(_differences(manifest, "triton")):
            words.append(f"not taken: the compiled kernels, {'; '.join(reasons)}")
        else:
            number = _unpack(folder / KERNELS, cache_dir)
            words.append(
                f"taken: {manifest['kernels']} kernels of {manifest['commit']}, {number} new folders "
                f"in {cache_dir}"
            )
        if manifest["extension"] is None:
            words.append("not taken: the extension, which the package does not have")
        elif reasons := list(_differences(manifest, "cuda")):
            words.append(f"not taken: {manifest['extension']}, {'; '.join(reasons)}")
        else:
            words.append(_place_extension(folder / f"{manifest['extension']}.xz", manifest["built"], package))
        if manifest["asked"] != _asked(hardware.find(GPU)):
            words.append(
                "not taken whole: tile sizes or cases have changed since, so some kernels are missing"
            )
        if not any(line.startswith("not taken") for line in words):
            (folder / "taken").touch()  # tells the gate that there is nothing to compile
        return words
    except FileNotFoundError as error:
        return [f"nothing taken: there is no {error.filename}"]
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError, lzma.LZMAError) as error:
        return [f"not taken: {folder} cannot be read ({type(error).__name__}: {error})"]


def prove(todo: Iterable[Job], gpu: Gpu) -> tuple[int, list[str], list[str]]:
    """Launch `todo` with a stub driver -> number of launches, kernels compiled, libraries built by gcc."""
    from benchmarks.host import load_stub, use_stub

    stub, compiled, built = load_stub(), [], []
    original = triton_build._build

    def listen(*, metadata, cache_hit: bool, **_) -> None:
        if not cache_hit:
            compiled.append(metadata["name"])

    def build(name: str, *args, **options):
        built.append(name)
        return original(name, *args, **options)

    torch.set_num_threads(1)
    triton.knobs.compilation.listener, triton_build._build = listen, build
    use_stub()
    with on_the_cpu(), hardware.assume(gpu):
        for job in todo:
            job.run()
    return stub.stub_launches(), compiled, built


def rehearse(cache: Path, folder: Path, gpu: Gpu) -> int:
    """Pack what `compile --few` made in `cache`, take it into another cache, and prove that one."""
    from benchmarks.host import load_stub

    load_stub()  # replaces the driver, for `prove`
    made = Made(**{name: set(rows) for name, rows in json.loads((cache / MADE).read_text()).items()})
    pack(made, cache, None, folder / "package", gpu)
    shutil.rmtree(folder / "taken", ignore_errors=True)
    print("\n".join(take(folder / "package", folder / "taken")), flush=True)
    command = (sys.executable, "-m", __spec__.name, "prove", "--few", "--gpu", gpu.name)
    return subprocess.run([*command, "--cache", str(folder / "taken")], cwd=ROOT).returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.artifacts", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "build": "build and pack the extension and every kernel",
        "compile": "compile every kernel into Triton's cache",
        "take": "install the parts of a package that fit this machine",
        "prove": "launch with a stub driver, and count what had to be compiled",
        "try": "pack what compile --few made, take it into another cache, prove that",
    }
    for name, words in about.items():
        command = commands.add_parser(name, help=words)
        command.add_argument("--cache", type=Path, help="Triton's cache; build: build/gpu-cache")
        if name in ("build", "take", "try"):
            command.add_argument("--folder", type=Path, default=FOLDER, help="folder of the package")
        if name in ("build", "compile"):
            command.add_argument("--workers", type=int, default=os.cpu_count() or 1)
        if name != "take":
            command.add_argument(
                "--gpu", default=GPU, help="a name in cumo_kernels/tiles/hardware.py, or this"
            )
        if name not in ("take", "try"):
            command.add_argument("--few", action="store_true", help="a few kernels, to test the procedure")
            command.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="default: all")
        if name == "compile":
            words = "after which no call starts; the others compile at their first launch"
            command.add_argument("--seconds", type=float, default=math.inf, help=words)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # build keeps its cache: unchanged kernels are not compiled again
    cache = args.cache or (KEPT_CACHE if args.command == "build" else Path(triton.knobs.cache.dir))
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())  # for the workers too
    cache = cache.resolve()
    if args.command == "take":
        print("\n".join(take(args.folder, cache)))
        return 0
    gpu = codegen.gpu_named(args.gpu)
    if args.command == "try":
        return rehearse(cache, args.folder.resolve(), gpu)
    todo = jobs(args.few, tuple(args.dtype or DTYPES))
    if args.command == "prove":
        launches, compiled, built = prove(todo, gpu)
        print(f"{len(todo)} calls, {launches} launches: {len(compiled)} kernels compiled, {len(built)} built")
        print("\n".join(sorted({*compiled, *built})))
        return int(bool(compiled or built or not launches))
    begin = time.monotonic()
    if args.command == "build":
        library = None if args.few else _build_extension()
        print(f"extension: {time.monotonic() - begin:.0f} s", flush=True)
    seconds = args.seconds if args.command == "compile" else math.inf
    made = compile_all(todo, gpu, args.workers, lambda line: print(line, flush=True), seconds)
    (cache / MADE).write_text(
        json.dumps({name: sorted(getattr(made, name)) for name in ("kernels", "launchers")})
    )
    if args.command == "build":
        manifest = pack(made, cache, library, args.folder, gpu)
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in manifest["bytes"].items())
        print(f"in {args.folder}: {sizes}")
    for words in made.failures:
        print(f"FAILED {words}")
    words = f"{len(made.kernels)} kernels, {len(made.launchers)} libraries, {len(made.failures)} failures"
    print(f"{words}, {time.monotonic() - begin:.0f} s")
    return int(bool(made.failures))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main())
