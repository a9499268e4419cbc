"""The steps of both parts of `make gpu`, in order of value, for a GPU or as a rehearsal on a CPU.

A GPU is available for 15 minutes in all, including its start (about 45 s, observed once) and idle time, and
at most 10 minutes per command. Part "prove" fits into a command of 440 seconds, part "tune" into one of 340.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu.engine import ROOT, Step, find_tool, last_line
from cumo_kernels import extension

PARTS = ("prove", "tune")
BUDGET = {"prove": 440.0, "tune": 340.0}
# issue G2's targets; names of benchmarks/cases/shapes.py
LAYERS = (
    "clip-batch4", "clip-1-crop", "mixtral-train", "connector-4", "mixtral-decode16", "mixtral-decode1",
)  # fmt: skip
TINY = ("clip-1-crop", "mixtral-decode1")  # for a rehearsal, the first with biases, the second gated


@dataclass(frozen=True)
class Place:
    """Where a plan is to run."""

    device: str  # "cuda" or "cpu"
    out: Path
    capability: tuple[int, int] | None = None
    artifacts: Path = ROOT / "build" / "gpu-artifacts"
    case_seconds: float = 40.0  # time limit of one case of the smoke test

    @property
    def rehearses(self) -> bool:
        return self.device == "cpu"

    @property
    def cores(self) -> int:
        return min(os.cpu_count() or 1, 2 if self.rehearses else 16)

    @property
    def tree(self) -> Path:
        """The folder of benchmarks/results/ and the tables; a rehearsal has a temporary one."""
        return self.out / "rehearsed" if self.rehearses else ROOT

    @property
    def results(self) -> Path:
        return self.tree / "benchmarks" / "results"


def no_build() -> str | None:
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return "this tree has no csrc/bindings.cpp"
    if os.environ.get("CUDA_HOME") or find_tool("nvcc"):
        return None
    return "no nvcc on PATH, in /usr/local/cuda or under CUDA_HOME"


def _architectures() -> str | None:
    """The architectures of the extension, or None if there is none that fits this torch and csrc/.

    Determined in a separate process: this one caches the state at its start, and should not keep a file open
    that is rebuilt.
    """
    importlib.invalidate_caches()
    if importlib.util.find_spec("cumo_kernels._C") is None:
        return None
    code = (
        "import sys; from cumo_kernels import _C\n"
        "if getattr(_C, 'source', '') != sys.argv[1]: raise SystemExit('built from another csrc/')\n"
        "print(getattr(_C, 'architectures', ''))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, extension.hash_of_sources()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return None
    return last_line(done.stdout) if done.returncode == 0 else None


def _is_built(capability: tuple[int, int] | None) -> bool:
    """Whether the extension is built for this GPU; one from another machine is built again."""
    built = _architectures()
    if not built or capability is None:
        return built is not None
    return extension.runs_on(capability, built) and (capability != (9, 0) or "9.0a" in built)


def build_environment(capability: tuple[int, int] | None) -> dict[str, str]:
    """Compile only for this GPU, whatever list a container sets, and fail instead of continuing without."""
    if capability is None:
        return {"CUMO_BUILD": "1"}
    return {"CUMO_BUILD": "1", "TORCH_CUDA_ARCH_LIST": extension.architecture(capability)}


def _prepare(part: str, place: Place) -> list[Step]:
    """Steps for the extension and Triton's kernels: taken if built in advance, else compiled here."""
    python, cores = sys.executable, str(place.cores)
    artifacts = (python, "-m", "benchmarks.gpu.artifacts")
    machine = Step(
        "machine", (python, "-m", "cumo_kernels", "explain", "--device", place.device), 30, 8, must_pass=True
    )
    if place.rehearses:
        emulator = "from cumo_kernels import extension; extension.load(); print('the emulator is compiled')"
        folder = str(place.tree / "artifacts")
        return [
            machine,
            Step("build", (python, "-c", emulator), 240, 5,
                 environment={"CUMO_EMULATE": "1"}, must_pass=True),
            Step("compile", (*artifacts, "compile", "--few", "--gpu", "nvidia_h100", "--workers", cores,
                             "--cache", f"{folder}/made"), 120, 30),
            Step("take", (*artifacts, "try", "--cache", f"{folder}/made", "--folder", folder), 60, 10),
        ]  # fmt: skip
    # as long as nvcc takes; smoke, layers and bf16 come first, verify compiles the rest
    kernels = (*artifacts, "compile", "--gpu", "this", "--workers", cores, "--seconds", "45")
    parallel: list[bool] = []  # whether the extension was built, and Triton's kernels compiled with it

    def built() -> str | None:
        if _is_built(place.capability):
            return "it is built"
        parallel.append(True)
        return None

    def compiled() -> str | None:
        taken = "they were taken" if (place.artifacts / "taken").exists() else None
        return "compiled with the build" if parallel and no_build() is None else taken

    # the second part has the kernels of the first, or tune compiles what it needs
    proves = part == "prove"
    compile_step = [Step("compile", kernels, 60, 0, done=compiled)] if proves else []
    return [
        machine,
        Step(
            "take", (*artifacts, "take", "--folder", str(place.artifacts)), 30, 6,
            lambda: None if place.artifacts.exists() else "make gpu-artifacts has not made them",
        ),
        Step(
            "build", (python, "setup.py", "build_ext", "--inplace"), 180, 45, no_build, built,
            build_environment(place.capability), must_pass=True, parallel=kernels if proves else (),
        ),
        *compile_step,
    ]  # fmt: skip


def _verify(place: Place, name: str, few: bool) -> tuple[str, ...]:
    words = (sys.executable, "-m", "cumo_kernels", "verify", "--device", place.device,
             "--backend", "triton", "--backend", "cuda", *(("--backend", "torch") if few else ()),
             "--workers", str(place.cores), "--json", str(place.out / f"{name}.json"))  # fmt: skip
    if place.rehearses:
        return (*words, "--tiny", "--dtype", "bf16" if few else "fp32")
    return (*words, "--few", "--dtype", "bf16") if few else words


def _bench(place: Place, *words: str) -> tuple[str, ...]:
    command = (sys.executable, "-m", "benchmarks", "--device", place.device, "--no-report",
               "--results", str(place.results), *words)  # fmt: skip
    command += ("--variant-seconds", "60" if place.rehearses else "20")
    return (*command, "--tiny", "--dtype", "bf16", "--seconds", "0.05") if place.rehearses else command


def _switches(place: Place) -> dict[str, str]:
    """Environment for a rehearsal on a CPU: Triton is interpreted, csrc/ emulated as on Hopper."""
    if not place.rehearses:
        return {}
    return {"TRITON_INTERPRET": "1", "CUMO_EMULATE": "1", "CUMO_EMULATE_CAPABILITY": "90"}


def _layers(
    place: Place, label: str, shapes: tuple[str, ...], patterns: tuple[str, ...], seconds: str
) -> list[Step]:
    """The expert layer at each size, gated, compared with dense cuBLAS, grouped_mm and every peer."""
    words = ("--seconds", seconds, *(w for p in patterns for w in ("--pattern", p)))
    steps = []
    for shape in shapes:
        command = _bench(place, "--only", "experts", "--shape", shape, *words)
        expected = 9 + 8 * len(patterns)  # a process and its gates, then the timings of each pattern
        steps.append(Step(f"{label} {shape}", command, 45, expected, environment=_switches(place)))
    return steps


def _smoke(place: Place) -> Step:
    words = (*_verify(place, "smoke", few=True), "--case-seconds", f"{place.case_seconds:g}")
    return Step("smoke", words, 90, 30, environment=_switches(place), must_pass=True)


def _prove(place: Place) -> list[Step]:
    python, switches = sys.executable, _switches(place)
    sanitizer = find_tool("compute-sanitizer")
    need = lambda: None if sanitizer or place.rehearses else "compute-sanitizer is not installed"
    proofs = str(place.tree / "cumo_kernels" / "verification" / "verified.json")
    record = ("--record", proofs) if place.rehearses else ("--record",)
    kernels = (python, "-m", "benchmarks.gpu.kernels", "--device", place.device,
               "--lines", str(place.out / "kernels.jsonl"))  # fmt: skip
    tool = (sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no")
    small = "--tiny" if place.rehearses else "--few"
    memcheck = (
        *(() if place.rehearses else tool), python, "-m", "cumo_kernels", "verify", "--device", place.device,
        small, "--dtype", "bf16", "--op", "expert_mlp", "--op", "adapted_expert_mlp", "--op", "scored_route",
        "--backend", "triton", "--backend", "cuda",
    )  # fmt: skip
    return [
        _smoke(place),
        *_layers(place, "layer", TINY if place.rehearses else LAYERS, ("uniform",), "0.3"),
        Step("kernels", kernels, 75, 35, environment=switches),
        # if the budget ends first, incomplete groups are not recorded
        Step("verify", (*_verify(place, "verify", few=False), *record), 200, 110,
             environment=switches, must_pass=True, margin=30),
        Step("router", _bench(place, "--only", "layer", "--only", "routing", "--only", "permutation",
                              *(("--shape", "clip-1-crop") if place.rehearses else ()), "--seconds", "0.2"),
             60, 45, environment=switches, margin=15),
        Step("memcheck", memcheck, 60, 45, need, margin=10,
             environment={**switches, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ]  # fmt: skip


def _tune(place: Place) -> list[Step]:
    python, switches = sys.executable, _switches(place)
    tune = (python, "-m", "cumo_kernels", "tune")
    if place.rehearses:
        configs = place.tree / "cumo_kernels" / "tiles" / "configs"
        tune += ("--device", "cpu", "--few", "--workers", "1", "--configs", str(configs))
    # as at a first call on a GPU without entries in verified.json; tests most of what smoke does
    check = (python, "-m", "cumo_kernels", "self-check", "--again", "--device", place.device)
    check += ("--dtype", "fp32", "--op", "activate") if place.rehearses else ("--dtype", "bf16")
    kept = {**switches, "CUMO_CACHE": str(place.out), "CUMO_SELF_CHECK": "1"}
    words = (
        "--only experts --shape clip-1-crop --pattern uniform --backend triton --backend cuda --seconds 0.3"
    )
    overlap = _bench(place, *words.split())
    return [
        Step("self-check", check, 90, 30, environment=kept, must_pass=True),
        Step("tune", tune, 90, 80, environment=switches, margin=10),
        *_layers(
            place, "tuned layer", TINY[1:] if place.rehearses else LAYERS[:4], ("uniform", "skewed"), "0.3"
        ),
        # the effect of CUMO_PDL=1 on a crop, whose launches matter most
        Step("overlap", overlap, 45, 17, environment={**switches, "CUMO_PDL": "1"}),
        # weights in 4 bits and LoRA: the cases that fit into the time, decoding first
        Step(
            "four bits",
            _bench(
                place,
                "--only",
                "packed",
                "--only",
                "lora",
                "--backend",
                "triton",
                "--seconds",
                "0.1",
                "--budget",
                "16",
            ),
            40,
            20,
            environment=switches,
        ),
        # decoding has too few tokens for a skewed pattern
        *_layers(place, "tuned layer", () if place.rehearses else LAYERS[4:5], ("uniform",), "0.3"),
    ]


def _close(place: Place) -> list[Step]:
    python = sys.executable
    table = place.tree / "cumo_kernels" / "tiles" / "measured.json"
    choose = (python, "-m", "benchmarks.choose", "--results", str(place.results), "--out", str(table))
    choose += ("--rehearse",) if place.rehearses else ()
    report = (python, "-m", "benchmarks.plot", "--results", str(place.results))
    steps = [Step("choose", choose, 8, 3, always=True)]
    if "OUT" not in os.environ:  # pictures of a lent machine's results are made elsewhere
        steps.append(Step("report", report, 12, 6, always=True))
    return steps


def plan(part: str, place: Place) -> list[Step]:
    """Every step of `part`, in order."""
    middle: dict[str, Callable[[Place], list[Step]]] = {"prove": _prove, "tune": _tune}
    steps = [*_prepare(part, place), *middle[part](place), *_close(place)]
    # in a rehearsal the CPU may be shared
    return [replace(step, cap=2 * step.cap) for step in steps] if place.rehearses else steps


def expected(steps: list[Step], taken: bool) -> float:
    """Expected seconds of a plan, with artefacts that fit the machine or without."""
    return sum(step.expected for step in steps if step.name != ("build" if taken else "take"))


def listing(part: str, steps: list[Step]) -> str:
    """The plan with its expected seconds, as text."""
    at, lines = 0.0, [f"part {part}, {BUDGET[part]:.0f} s:"]
    for step in steps:
        note = ", required" if step.must_pass else ""
        lines.append(f"  {at:5.0f} s  {step.name}: {step.expected:.0f} s, at most {step.cap:.0f}{note}")
        at += step.expected * (step.name != "take")
    taken = expected(steps, taken=True)
    return "\n".join([*lines, f"  {at:5.0f} s  end; {taken:.0f} s with what make gpu-artifacts made"])
