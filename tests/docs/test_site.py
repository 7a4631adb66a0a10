"""The site builds without a warning and without a network; its links lead somewhere; its notebooks run."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pages
import pytest
from nbclient import NotebookClient

ROOT = pages.ROOT
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
NO_NETWORK = "import socket; socket.socket.connect = None; import runpy; runpy.run_module('sphinx', run_name='__main__')"


class Page(HTMLParser):
    """Ids of a page, and what it links to or loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(given.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("a site")
    command = [sys.executable, "-c", NO_NETWORK, "-q", "-W", "--keep-going", str(ROOT / "docs"), str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    return out


def test_every_page_is_there_and_every_verb_in_the_reference(site: Path) -> None:
    for page in pages.pages():
        if page.is_relative_to(ROOT / "docs"):
            assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").is_file()
    for notebook in NOTEBOOKS:
        assert (site / "tutorials" / f"{notebook.stem}.html").is_file()
    reference = (site / "reference" / "commands.html").read_text()
    for verb in ("predict", "serve start", "members select", "truth from-catalog"):
        assert f"deepdisc-ops {verb}" in re.sub("<[^>]+>", "", reference)


def test_links_lead_to_pages_and_places_that_are_there(site: Path) -> None:
    seen = {path: Page(path.read_text()) for path in site.rglob("*.html") if "_static" not in path.parts}
    broken = []
    for path, page in seen.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            target = target / "index.html" if target.is_dir() else target
            known = seen.get(target)
            if not target.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for source in Page(path.read_text()).loaded:
            assert not urlsplit(source).netloc, f"{path.name} loads {source}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]?(https?:)?//", path.read_text()), path.name


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models" / "README.md"], ids=lambda page: page.name
)
def test_links_of_pages_beside_the_site(page: Path) -> None:
    for link in pages.links(page):
        parts = urlsplit(link)
        if not parts.scheme:
            assert (page.parent / unquote(parts.path)).exists(), link


@pytest.mark.parametrize("page", [page for page in pages.pages() if "docs" in page.parts], ids=lambda page: page.name)
def test_anchors_into_pages_are_headings_of_them(page: Path) -> None:
    """What the README links to; the site's own are in the HTML above."""
    for link in pages.links(ROOT / "README.md"):
        parts = urlsplit(link)
        if parts.fragment and (ROOT / parts.path) == page:
            headings = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
                for line in page.read_text().splitlines()
                if line.startswith("#")
            ]
            assert parts.fragment in headings


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are drawn in the page
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "r"))
    book = nbformat.read(path, as_version=4)
    kept = [len(cell.get("outputs", ())) for cell in book.cells]
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [len(cell.get("outputs", ())) for cell in book.cells] == kept
