"""The demo: an English, a Python and a Chinese text through the built-in model, as one page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ernie_lab.loading import load
from ernie_lab.plots.trace_report import Reported, routing_report
from ernie_lab.trace.folders import require_folder

TEXTS = {
    "English": "And God said unto him, Behold, I will give thee the land, and thou shalt",
    "Python": "def read(self, name):\n    if name is None:\n        return self.path\n    for",
    "Chinese": "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，",
}
NOTEBOOK = Path("notebooks") / "01_quickstart.ipynb"


def demo(out: Path, source: str = "tiny-text") -> list[Path]:
    """Run the texts, write the report, execute the quickstart notebook; return what was written.

    The notebook is executed only from a checkout of the repository, where it stands.
    """
    started = time.perf_counter()
    require_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    lab = load(source)
    print(lab, end="\n\n")
    texts = {}
    for name, prompt in TEXTS.items():
        gen = lab.generate(prompt, max_new_tokens=24, keep="routing")
        texts[name] = Reported(source, gen.trace, gen.texts[0])
        print(f"{name:8} {prompt!r}\n      -> {gen.text!r}")
    written = [routing_report(out / "report.html", f"Expert routing in {source}", texts)]
    if NOTEBOOK.is_file():
        written.append(executed(NOTEBOOK, out / NOTEBOOK.name))
    else:
        print(
            f"\nno notebook was written: {NOTEBOOK} is not here, but in a clone of the repository"
        )
    print(f"\ndone in {time.perf_counter() - started:.0f} s; open in a browser or in JupyterLab:")
    for path in written:
        print(f"  {path.resolve()}")
    return written


def executed(notebook: Path, target: Path) -> Path:
    """Execute a notebook from top to bottom in its own folder and write it `as_committed`."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    NotebookClient(
        book,
        timeout=600,
        resources={"metadata": {"path": notebook.parent}},
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    nbformat.write(as_committed(book), target)
    return target


def as_committed(book: Any) -> Any:
    """Without live widgets and their state, and without time stamps; changes `book`.

    Widget state keeps viewers from showing pictures. A widget without its kernel is an error
    message in JupyterLab; when it is gone, the picture beside it is shown.
    """
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return book
