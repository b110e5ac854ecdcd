"""Links that lead out of docs/ become pages of the site: Markdown as it is, sources as text.

Who reads the repository follows such a link to the file. The site has no other place to lead to, and with pages of its own links are
checked like all others, anchors included. What is linked on such a page becomes a page, too.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FOLDER = "repository/"
_ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])([^)#\s]+)(?=[)#])")
_LANGUAGES = {
    ".py": "python",
    ".pyi": "python",
    ".sh": "bash",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".json": "json",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    waiting = [*_ALWAYS]
    for file in files.documentation_pages():
        waiting += _linked(f"docs/{file.src_uri}", file.content_string)
    while waiting:
        path = waiting.pop()
        if path.startswith(("docs/", "../")) or not (root / path).is_file() or files.get_file_from_path(_uri(path)):
            continue
        text = (root / path).read_text()
        if path.endswith(".md"):
            waiting += _linked(path, text)
        else:
            text = f"# {path}\n\n~~~~~{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n~~~~~\n"
        files.append(File.generated(config, _uri(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    path = here.removeprefix(_FOLDER) if here.startswith(_FOLDER) else f"docs/{here}"

    def lead(link: re.Match[str]) -> str:
        uri = _uri(_target(path, link[0]))
        return posixpath.relpath(uri, posixpath.dirname(here) or ".") if files.get_file_from_path(uri) else link[0]

    return _LINK.sub(lead, markdown)


def _linked(path: str, markdown: str) -> Iterator[str]:
    """Where the relative links of a file lead, as paths in the repository."""
    return (_target(path, link) for link in _LINK.findall(markdown))


def _target(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _uri(path: str) -> str:
    """Where the page of a file of the repository lies among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return _FOLDER + (path if path.endswith(".md") else f"{path}.md")
