"""Hooks of mkdocs: where pages link to files outside docs/, the site gets copies of those files.

`../CONTRIBUTING.md` becomes the page repository/CONTRIBUTING.md; files that it links to are copied as well.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def target(source: str, link: str) -> str | None:
    """Path in the repository of a relative link from a page of the site, or None."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    base = source.removeprefix(f"{PLACE}/") if source.startswith(f"{PLACE}/") else f"docs/{source}"
    return os.path.normpath(PurePosixPath(base).parent / link)


def links(source: str, text: str) -> set[str]:
    """What a page links to outside docs/."""
    found = {target(source, link) for _, link, _ in LINK.findall(FENCE.sub("", text))}
    return {path for path in found if path and not path.startswith(("docs/", ".."))}


def on_files(files: Files, config) -> Files:
    todo = [file for file in files if file.is_documentation_page()]
    known: set[str] = set()
    while todo:
        page = todo.pop()
        for path in sorted(links(page.src_uri, page.content_string) - known):
            known.add(path)
            if (ROOT / path).is_file():
                added = File.generated(config, f"{PLACE}/{path}", abs_src_path=str(ROOT / path))
                files.append(added)
                todo += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    source = page.file.src_uri

    def moved(match: re.Match) -> str:
        path = target(source, match[2])
        if path is None or path.startswith(".."):
            return match[0]
        inside = path.removeprefix("docs/") if path.startswith("docs/") else f"{PLACE}/{path}"
        if inside not in files.src_uris:
            return match[0]
        relative = os.path.relpath(inside, PurePosixPath(source).parent)
        return f"{match[1]}{relative}{match[3] or ''})"

    return LINK.sub(moved, markdown)
