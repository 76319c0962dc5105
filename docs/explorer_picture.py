"""The README's picture of an explorer, from a real JupyterLab: `python docs/explorer_picture.py`.

Needs Debian's Chromium and the extra `e2e`. Chooses layer 3 and a token, and writes
docs/explore_routing.png.
"""

import io
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from e2e.browser import Page, chromium, jupyterlab  # noqa: E402

CELLS = (
    'import ernie_lab as el\n\nlab = el.load("tiny-text")\n'
    'gen = lab.generate("And God said unto him, Behold, I will give thee", max_new_tokens=12, '
    'temperature=0, keep="routing")\nel.widgets.explore_routing(gen.trace)',
    'print("DONE")',
)


def main() -> None:
    root = Path(tempfile.mkdtemp())
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, root / "x.ipynb")
    with jupyterlab(root) as address, chromium() as browser:
        page = Page(browser, address)
        page.open("x.ipynb")
        page.run_all("DONE")
        explorer = page.page.locator(".ernie-explorer").first
        explorer.wait_for()
        explorer.locator("canvas.ernie-map").focus()
        for key in ("l", "l", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown"):
            page.page.keyboard.press(key)
            page.page.wait_for_timeout(300)
        page.page.wait_for_timeout(1500)
        png = explorer.screenshot()
    few = Image.open(io.BytesIO(png)).convert("RGB").quantize(160, dither=Image.Dither.NONE)
    few.save(HERE / "explore_routing.png", optimize=True)


if __name__ == "__main__":
    main()
