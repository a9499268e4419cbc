"""Structure of the tree: allowed imports, the files of each kernel stem, file lengths.

The tables below define the architecture. When the tree changes, update them, docs/design.md and
CONTRIBUTING.md.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("cumo_kernels", "cumo_model", "benchmarks", "examples", "tests")
STEMS = ("routing", "permutation", "grouped_gemm", "activation", "experts")
MAX_LINES = 500

# Allowed imports among the project's modules: the first row whose pattern matches a module applies. "a"
# means the module a itself (for a package: its public names), "a.*" all modules below it, "." the module's
# own package.
KERNELS, TILES, VERIFICATION = "cumo_kernels", "cumo_kernels.tiles", "cumo_kernels.verification"
# modules of cumo_kernels that import none of its others, but for those in ARROWS
LEAVES = (
    "activations",
    "backends",
    "extension",
    "files",
    "interrupts",
    "moved",
    "types",
    "versions",
)
ARROWS = {
    **{f"{KERNELS}.{leaf}": () for leaf in LEAVES},
    f"{KERNELS}.extension": (f"{KERNELS}._C",),
    f"{KERNELS}.packing*": (f"{KERNELS}.packing.*", f"{KERNELS}.tracing"),
    f"{KERNELS}.tracing": (),
    f"{KERNELS}.activations": (f"{KERNELS}.tracing",),
    f"{KERNELS}.hostsync": (f"{KERNELS}.tracing",),
    # tiles: properties of GPUs, their tile sizes, and measured choices
    TILES: (),
    f"{TILES}.hardware": (),
    f"{TILES}.tuning": (f"{TILES}.hardware", f"{KERNELS}.files"),
    f"{TILES}.measured": (
        f"{TILES}.hardware",
        f"{TILES}.tuning",
        f"{KERNELS}.files",
        f"{KERNELS}.tracing",
    ),
    f"{TILES}.*": (
        f"{TILES}.*",
        f"{KERNELS}.activations",
        f"{KERNELS}.backends.triton*",
        f"{KERNELS}.packing.formats",
    ),  # tools: tune, codegen
    # verification: first the results that dispatch reads, then the programs that produce them
    VERIFICATION: (),
    f"{VERIFICATION}.verified": (
        f"{TILES}.hardware",
        f"{TILES}.measured",
        f"{KERNELS}.extension",
        f"{KERNELS}.versions",
    ),
    f"{VERIFICATION}.verdict_file": (f"{KERNELS}.files",),
    f"{VERIFICATION}.proofs": (
        f"{VERIFICATION}.verdict_file",
        f"{VERIFICATION}.verified",
        f"{TILES}.hardware",
        f"{KERNELS}.extension",
    ),
    f"{VERIFICATION}.rounding": (f"{KERNELS}.tracing",),
    f"{VERIFICATION}.accuracy": (f"{VERIFICATION}.rounding", f"{KERNELS}.ops*", f"{KERNELS}.types"),
    f"{VERIFICATION}.*": (KERNELS, f"{KERNELS}.*"),
    f"{KERNELS}.dispatch": (
        f"{TILES}.hardware",
        f"{TILES}.measured",
        f"{VERIFICATION}.proofs",
        f"{KERNELS}.extension",
        f"{KERNELS}.tracing",
    ),
    f"{KERNELS}.ops*": (
        f"{KERNELS}.ops.*",
        f"{KERNELS}.activations",
        f"{KERNELS}.dispatch",
        f"{KERNELS}.hostsync",
        f"{KERNELS}.packing.tensor",
        f"{KERNELS}.tracing",
        f"{KERNELS}.types",
    ),
    f"{KERNELS}.backends.reference*": (
        ".",
        f"{KERNELS}.activations",
        f"{KERNELS}.packing.formats",
        f"{KERNELS}.types",
    ),
    f"{KERNELS}.backends.torch*": (
        ".",
        f"{KERNELS}.backends.reference*",  # it uses the functions that need no host synchronisation
        f"{KERNELS}.activations",
        f"{KERNELS}.hostsync",
        f"{KERNELS}.types",
    ),
    f"{KERNELS}.backends.triton*": (
        ".",
        f"{KERNELS}.activations",
        f"{TILES}.hardware",
        f"{TILES}.tuning",
        f"{KERNELS}.packing.formats",
        f"{KERNELS}.types",
    ),
    f"{KERNELS}.backends.cuda*": (".", f"{KERNELS}.extension"),
    f"{KERNELS}.testing": (f"{VERIFICATION}.accuracy",),
    f"{KERNELS}.integrations*": (
        KERNELS,
        f"{KERNELS}.integrations.*",
        f"{KERNELS}.ops*",
        f"{KERNELS}.packing.*",
        f"{KERNELS}.types",
        f"{KERNELS}.versions",
    ),
    KERNELS: (
        f"{KERNELS}.activations",
        f"{KERNELS}.dispatch",
        f"{KERNELS}.interrupts",
        f"{KERNELS}.moved",
        f"{KERNELS}.ops*",  # ops.grouped_gemm is a module; in the package the name is its function
        f"{KERNELS}.packing.tensor",
        f"{KERNELS}.types",
        f"{KERNELS}.versions",
    ),
    f"{KERNELS}.*": (KERNELS, f"{KERNELS}.*"),  # the command line and its subcommands
    "cumo_model.training.monitor": ("cumo_model.*", f"{TILES}.hardware"),
    "cumo_model.model.moe": (
        "cumo_model.*",
        KERNELS,
        f"{KERNELS}.activations",
        f"{KERNELS}.integrations.peft",
        f"{KERNELS}.ops*",
        f"{KERNELS}.tracing",
    ),
    "cumo_model.model.replay": ("cumo_model.*", KERNELS, f"{KERNELS}.hostsync", f"{KERNELS}.ops*"),
    "cumo_model.model.routers": ("cumo_model.*", f"{KERNELS}.ops*"),
    "cumo_model.model.indexes": ("cumo_model.*", f"{KERNELS}.files"),
    **{
        f"cumo_model.{module}": ("cumo_model.*", f"{KERNELS}.packing*")
        for module in (
            "model.quantize",
            "model.quantizer",
            "checkpoints.expert_files",
            "checkpoints.published",
            "checkpoints.quantize_checkpoint",
        )
    },
    "cumo_model.model.image_tokens": ("cumo_model.*", f"{KERNELS}.hostsync"),
    "cumo_model.model.remote": ("cumo_model.*", f"{KERNELS}.files"),
    "cumo_model.checkpoints.folders": ("cumo_model.*", f"{KERNELS}.files"),
    "cumo_model.data.pictures": ("cumo_model.*", f"{KERNELS}.files"),
    "cumo_model.demo.packages": ("cumo_model.*", f"{KERNELS}.files"),
    "cumo_model.registered": ("cumo_model.*", f"{KERNELS}.integrations.transformers", f"{KERNELS}.moved"),
    "cumo_model": ("cumo_model.*",),
    "cumo_model*": (
        "cumo_model",
        "cumo_model.*",
        KERNELS,
        f"{KERNELS}.activations",
        f"{KERNELS}.integrations.*",
        f"{KERNELS}.packing.*",
        f"{KERNELS}.types",
    ),
    "benchmarks.peers*": (
        "benchmarks.peers.*",
        "benchmarks.cases.eager",  # the original's loop is a peer too
        "benchmarks.cases.shapes",
        "benchmarks.steps",
        KERNELS,
        f"{KERNELS}.*",
    ),
    "benchmarks.predictions*": (
        "benchmarks.predictions.*",
        "benchmarks.cases.shapes",
        "benchmarks.plot",
        KERNELS,
        f"{KERNELS}.*",
    ),
    "benchmarks.cases*": (
        "benchmarks.cases.*",
        "benchmarks.peers.packed",
        "benchmarks.peers.table",
        "benchmarks.harness",
        "benchmarks.steps",
        "cumo_model",
        "cumo_model.*",
        KERNELS,
        f"{KERNELS}.*",
    ),
    "benchmarks*": (
        "benchmarks",
        "benchmarks.*",
        "cumo_model",
        "cumo_model.*",
        KERNELS,
        f"{KERNELS}.*",
    ),
    "examples*": ("cumo_model", "cumo_kernels"),  # public names only: people copy them
    "tests.benchmarks*": (
        "benchmarks",
        "benchmarks.*",
        KERNELS,
        f"{KERNELS}.*",
        "tests.benchmarks.*",
        "tests.rounding",
    ),
    "tests*": ("tests.*", "cumo_model", "cumo_model.*", KERNELS, f"{KERNELS}.*"),
}

# A room of cumo_model, or a module beside the rooms -> the rooms and modules it uses. It may import these,
# itself, and what these use. The __init__ of every room may use EVERYWHERE.
EVERYWHERE = "names"
ROOMS = {
    "model": (),
    "processing": ("model",),
    "data": ("processing",),
    "checkpoints": ("processing",),
    "training": ("data", "checkpoints"),
    "analysis": ("data", "checkpoints"),
    "serving": ("analysis",),
    "evaluation": ("serving",),
    "demo": ("training", "evaluation"),
    "names": (),
    "old_paths": (),
    "registered": ("checkpoints", "old_paths"),
    "lazy": ("registered", "old_paths"),
    "signals": (),
    "command_line": (),
    "checks": ("data",),
    "__main__": ("demo", "command_line", "checks", "signals"),
}

# Heavy or optional packages may be imported only in these modules; benchmarks and tests may import anything.
FOREIGN = {
    "triton": ("cumo_kernels.backends.triton*", "cumo_kernels.tiles.codegen", "cumo_kernels.tiles.tuning"),
    "transformers": ("cumo_kernels.integrations*", "cumo_model*"),
    "matplotlib": ("cumo_model.demo*", "cumo_model.analysis.plots"),
    "resvg_py": ("cumo_model.demo*",),
    "gradio": ("cumo_model.serving.web.page",),
    "openai": ("cumo_model.serving.endpoint", "cumo_model.evaluation.judge"),
    "pyarrow": ("cumo_model.evaluation.tables",),
    "openpyxl": ("cumo_model.evaluation.tables",),
    "peft": ("cumo_kernels.integrations.peft", "cumo_model.training.lora"),
    "lmms_eval": ("cumo_model.evaluation.lmms.model", "cumo_model.evaluation.lmms.plugin"),
    "vllm": ("cumo_model.serving.vllm.model", "cumo_model.serving.vllm.plugin"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for top in TOP for path in sorted((ROOT / top).rglob("*.py"))}


def is_module(name: str) -> bool:
    return name in FILES or (ROOT / name.replace(".", "/")).is_dir() or name == "cumo_kernels._C"


def imports(module: str, source: str) -> Iterator[str]:
    """All modules that `source` imports, also inside functions. A submodule counts instead of its package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            submodules = {alias.name for alias in node.names if is_module(f"{base}.{alias.name}")}
            yield from (f"{base}.{name}" for name in submodules)
            if len(submodules) < len(node.names):
                yield base


def package_of(module: str) -> str:
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


def forbidden(module: str, source: str) -> list[str]:
    """The imports of one file that the tables above do not allow."""
    allowed = next((row for pattern, row in ARROWS.items() if fnmatch(module, pattern)), None)
    if allowed is None:
        return [f"{module} is in no row of ARROWS"]
    own = package_of(module)
    found = []
    for target in imports(module, source):
        root = target.split(".")[0]
        if root in FOREIGN and not module.startswith(("benchmarks", "examples", "tests")):
            if not any(fnmatch(module, pattern) for pattern in FOREIGN[root]):
                found.append(f"{module} -> {target}")
        if root not in TOP or target == module:
            continue
        inside = "." in allowed and (target == own or target.startswith(f"{own}."))
        if not inside and not any(fnmatch(target, pattern) for pattern in allowed):
            found.append(f"{module} -> {target}")
        if module.startswith("cumo_model.") and target.startswith("cumo_model."):
            if (wanted := room(target)) not in below(room(module)):
                found.append(f"{module} -> {target} ({wanted} is not below {room(module)})")
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def below(name: str) -> set[str]:
    """The room itself and all rooms it uses, directly or indirectly."""
    return {name, EVERYWHERE}.union(*map(below, ROOMS[name]))


def cycle(package: str) -> list[str]:
    """Modules of a package with a circular import, imports inside functions included."""
    is_file = lambda name: name in FILES and FILES[name].name != "__init__.py"
    arrows = {
        name: {
            target
            for target in imports(name, path.read_text())
            if target in FILES and FILES[target].name != "__init__.py"
        }
        for name, path in FILES.items()
        if name.startswith(f"{package}.") and is_file(name)
    }
    while free := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in free}
    return sorted(arrows)


@pytest.mark.parametrize("package", ["cumo_kernels", "cumo_model", "benchmarks"])
def test_no_circle(package):
    assert cycle(package) == []


@pytest.mark.parametrize("module", FILES)
def test_no_arrow_points_up(module):
    assert forbidden(module, FILES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cumo_kernels.types", "from cumo_kernels.dispatch import choose"),
        ("cumo_kernels.backends.reference.routing", "from cumo_kernels.ops import route"),
        ("cumo_kernels.backends.reference.routing", "from cumo_kernels.backends import triton"),
        ("cumo_kernels.backends.reference.routing", "def f():\n    import triton"),
        ("cumo_kernels.ops.routing", "from cumo_kernels.backends import reference"),
        ("cumo_kernels.ops.routing", "from ..backends.reference import routing"),
        ("cumo_kernels.dispatch", "import transformers"),
        ("cumo_kernels", "import cumo_model"),
        ("examples.moe_layer", "from cumo_model.model.moe import MoELayer"),
    ],
)
def test_a_forbidden_arrow_is_seen(module, line):
    assert len(forbidden(module, line)) == 1


def test_every_model_module_lies_in_a_room():
    modules = {name.split(".")[1] for name in FILES if name.startswith("cumo_model.")}
    assert modules == set(ROOMS)


@pytest.mark.parametrize(
    "module, line",
    [
        ("cumo_model.model.config", "from cumo_model.checkpoints.original_config import from_original"),
        ("cumo_model.model.cumo", "def f():\n    from cumo_model.processing.processor import load_tokenizer"),
        ("cumo_model.data.records", "from cumo_model.training.recipe import Recipe"),
        ("cumo_model.serving.chat", "from cumo_model.demo.run import run_demo"),
    ],
)
def test_a_room_imports_no_room_above_it(module, line):
    assert len(forbidden(module, line)) == 1


def backends() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "cumo_kernels/backends").glob("*/__init__.py"))


def places(stem: str) -> list[str]:
    """All files that a kernel stem must have, in the folders that exist."""
    paths = [f"cumo_kernels/ops/{stem}.py", f"tests/kernels/test_{stem}.py"]
    paths += [f"cumo_kernels/backends/{backend}/{stem}.py" for backend in backends()]
    paths += [f"csrc/{stem}.cu"] if (ROOT / "csrc").is_dir() else []
    paths += [f"benchmarks/cases/bench_{stem}.py"] if (ROOT / "benchmarks").is_dir() else []
    return paths


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_is_everywhere(stem):
    assert [path for path in places(stem) if not (ROOT / path).is_file()] == []


def test_every_op_belongs_to_a_stem():
    from cumo_kernels import dispatch

    assert set(dispatch.OPS.values()) == set(STEMS)
    assert {row.name for row in dispatch.BACKENDS} >= set(backends())


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
