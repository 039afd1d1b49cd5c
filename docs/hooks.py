"""Pages of the web site that are not in docs/: README, CONTRIBUTING and CHANGELOG, and the API reference from docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PACKAGES = ("flowseg_jax", "convert_weights")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and lists those of the API in the navigation."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_relinked((ROOT / source).read_text(encoding="utf-8"))))
    reference = _reference()
    for page, content in reference.items():
        files.append(File.generated(config, page, content=content))
    config.nav[-1] = {"API": [{title: page} for page in reference for title in [_title(page)]]}
    return files


def _relinked(text: str) -> str:
    """Links as seen from docs/: those into docs/ and to the pages above stay links, others become text."""
    names = {source: page for page, source in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        if target.startswith("docs/"):
            return f"[{label}]({target.removeprefix('docs/')})"
        if "://" in target or target in names:
            return f"[{label}]({names.get(target, target)})"
        return label

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def _title(page: str) -> str:
    return page.removeprefix("api/").removesuffix(".md")


def _reference() -> dict[str, str]:
    """Page -> text: one page per package, which names its modules; mkdocstrings fills them in."""
    modules: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if parts[-1].startswith("_") or (len(parts) == 1 and package != PACKAGES[0]):
                continue
            folder = path.parent.relative_to(ROOT).parts
            modules.setdefault(".".join(folder), []).append(".".join(parts))
    return {
        f"api/{folder}.md": f"# {folder}\n\n" + "\n\n".join(f"::: {name}" for name in sorted(names))
        for folder, names in sorted(modules.items())
    }
