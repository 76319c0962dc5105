"""Committed notebooks: they run, and what is committed shows its pictures."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ernie_lab.demo import executed

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


WIDGET = "application/vnd.jupyter.widget-view+json"
# All that nbconvert's own page asks for: typesetting of formulas. Pictures and words need neither.
TEMPLATE_SCRIPTS = {"https://cdnjs.cloudflare.com"}


class Page(HTMLParser):
    """Pictures of a page, and the hosts that it asks without being clicked."""

    ASKING = ("src", "srcset", "poster", "data")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.hosts: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.pictures.append(found)
        asked = [found[name] or "" for name in self.ASKING if name in found]
        if tag == "link":
            asked.append(found.get("href") or "")
        asked += re.findall(r"url\(['\"]?([^)'\"]+)", found.get("style") or "")
        for address in asked:
            self.hosts |= set(re.findall(r"^(?:https?:)?//[^/]+", address))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_committed_form(path: Path) -> None:
    book = json.loads(path.read_text())
    assert path.stat().st_size < 1_000_000
    assert "widgets" not in book["metadata"], "widget state hides the pictures in viewers"
    cells = code_cells(path)
    assert all(cell.execution_count for cell in cells), "committed executed: make notebooks"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    assert all("alt=" in p["data"].get("text/html", "") for p in pictures)
    live = [o for o in outputs if WIDGET in o.get("data", {})]
    assert not live, "JupyterLab shows an error in place of a widget without its kernel"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_as_html_every_picture_is_shown_offline(path: Path) -> None:
    """The page's own pictures lie inside it, each with its words, and it asks nobody for more."""
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter().from_filename(str(path))
    page = Page(text)
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    drawn = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(page.pictures) >= len(drawn)
    for picture in page.pictures:
        assert (picture.get("src") or "").startswith("data:image/"), picture.get("src")
        assert (picture.get("alt") or "").strip(), "a picture without words"
    assert page.hosts <= TEMPLATE_SCRIPTS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_cells_are_short_and_lead_from_one_to_the_next(path: Path) -> None:
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 12, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two threads on small products are slower than one as soon as anything else runs.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target = executed(Path(shutil.copy(path, tmp_path)), tmp_path / "out.ipynb")
    outputs = [output for cell in code_cells(target) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
