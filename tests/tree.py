"""The tree of docs/design.md: every module and CUDA source, with the first sentence of its own head.

python -m tests.tree           print it
python -m tests.tree --write   put it into docs/design.md, between the two marks
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/design.md"
BEGIN, END = "<!-- tree: python -m tests.tree --write -->", "<!-- end of tree -->"
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
COLUMN, WIDTH = 28, 96

# top folder -> what it is, where it has no docstring of its own
TOPS = {
    "cumo_kernels": None,
    "csrc": "CUDA C++ sources of the backend `cuda`; the same code runs in emulation on a CPU.",
    "cumo_model": None,
    "benchmarks": None,
    "tests": "The same folders as the packages, a test_<module>.py each; only helpers are listed.",
}
# files and folders that are no modules
OTHERS = {
    "cumo_kernels/tiles/configs/": "Tile sizes, one JSON per GPU, written by `tune`.",
    "cumo_kernels/tiles/measured.json": "Which backend was faster, by GPU, op and shape; no GPU in it yet.",
    "cumo_kernels/verification/verified.json": "Which backend is verified on which GPU; no GPU in it yet.",
    "cumo_model/training/recipes/": "Shipped stages as YAML: demo, mistral-7b, mixtral-8x7b; engine configs.",
    "benchmarks/NOTES.md": "Predictions and measurements, one entry per kernel and question.",
    "benchmarks/REPORT.md": "The report, generated from the CSV files in results/.",
    "benchmarks/peers/wheels.txt": "Pinned wheels of other implementations, which run.",
    "benchmarks/peers/sources.txt": "Wheels that are only read for their signatures.",
    "benchmarks/predictions/predicted/": "Committed predictions, which `--check` compares with.",
    "benchmarks/results/": "Committed measurements, one folder per machine.",
    "benchmarks/stub_driver.c": "A driver that does nothing, for host.py.",
}


def sentence(text: str) -> str:
    """The first sentence of the first paragraph."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.match(r".*?[.!?](?=\s|$)|.*", paragraph)[0]


def head(path: Path) -> str:
    """What a source says of itself: the docstring of a module, the first comment of a C++ file."""
    source = path.read_text()
    if path.suffix == ".py":
        return sentence(ast.get_docstring(ast.parse(source)) or "")
    comment = re.match(r"(?:// ?.*\n)*", source)[0]
    return sentence(re.sub(r"^// ?", "", comment, flags=re.MULTILINE))


def shown(path: Path) -> bool:
    if "__pycache__" in path.parts:
        return False
    return path.suffix in SUFFIXES and not (path.parts[0] == "tests" and path.name.startswith("test_"))


def entries(top: str) -> dict[str, str]:
    """Path (a folder ends in /) -> its sentence, for everything below a top folder."""
    paths = [path.relative_to(ROOT) for path in (ROOT / top).rglob("*")]
    found = {other: text for other, text in OTHERS.items() if other.startswith(f"{top}/")}
    for path in filter(shown, paths):
        for folder in path.parents:
            if folder != Path():
                found.setdefault(f"{folder}/", TOPS.get(str(folder)) or "")
        if path.name == "__init__.py":
            found[f"{path.parent}/"] = head(ROOT / path)
        else:
            found[str(path)] = head(ROOT / path)
    return found


def order(path: str) -> list[tuple[bool, str]]:
    """Files of a folder first, then its folders, both by name."""
    parts = path.rstrip("/").split("/")
    last = len(parts) - 1
    return [(i < last or path.endswith("/"), part) for i, part in enumerate(parts)]


def lines(top: str) -> Iterator[str]:
    found = entries(top)
    for path in sorted(found, key=order):
        depth = path.rstrip("/").count("/")
        name = path.rstrip("/").rsplit("/", 1)[-1] + ("/" if path.endswith("/") else "")
        start = "  " * depth + name
        start = start.ljust(COLUMN) if len(start) < COLUMN else start + "  "
        text = re.sub(rf"^{re.escape(Path(name).stem)}: ", "", found[path])
        yield from textwrap.wrap(start + text, WIDTH, subsequent_indent=" " * COLUMN) or [start.rstrip()]


def tree() -> str:
    blocks = ["```text\n" + "\n".join(line.rstrip() for line in lines(top)) + "\n```" for top in TOPS]
    return "\n\n".join(blocks)


def written(page: str) -> str:
    """The page with the tree of today between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE.name} must have the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tree()}\n\n{END}{after}"


def main() -> int:
    if "--write" not in sys.argv[1:]:
        print(tree())
        return 0
    PAGE.write_text(written(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
