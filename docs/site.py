"""What the site takes from outside `docs`: CONTRIBUTING.md, CHANGELOG.md and pictures of the
committed records.

Pages link to files as they lie in the repository, so that they also work where the repository is
browsed. Here such links are led to the copies within the site, and one whose target does not exist
is a warning, which `mkdocs build --strict` turns into a failure.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = "benchmarks/results/*/*.png"
_LINK = re.compile(r"(?<=\]\()([^()\s#]+)((?:#[^()\s]*)?)(?=\))")
_log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures that lie outside `docs`."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for path in ROOT.glob(PICTURES):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leads links out of `docs` to their copies within the site."""
    at = page.file.src_uri
    sources = {name: source for source, name in PAGES.items()}
    # Where the page lies in the repository, and so what its relative links start from.
    folder = posixpath.dirname(sources.get(at, f"docs/{at}"))

    def led(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        if re.match(r"[a-z]+:", link):
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, link))
        if not (ROOT / target).exists():
            _log.warning("%s links to %s, which does not exist", at, target)
        inside = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None:
            _log.warning("%s links to %s, which is not part of the site", at, target)
        return posixpath.relpath(inside, posixpath.dirname(at) or ".") + anchor

    return _LINK.sub(led, markdown)
