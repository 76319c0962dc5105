"""The notebook that the browser test drives: one small case of each explorer, and a large one."""

from pathlib import Path

LAST_WORDS = "ALL CELLS DONE"

CELLS = {
    "load": """
import ernie_lab as el
from ernie_lab.organisms.boards import samples

lab = el.load("tiny-text")
text = "And God said unto him, Behold, I will give thee"
read = lab.run(text, keep=["routing", "attention"]).trace
""",
    "routing": "el.widgets.explore_routing(read)",
    "pair": """
import ipywidgets

left, right = el.widgets.explore_routing(read), el.widgets.explore_routing(read)
left.add_class("left")
right.add_class("right")
ipywidgets.HBox([left, right])
""",
    "large": f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from e2e.large import LargeTrace

el.widgets.explore_routing(LargeTrace())
""",
    "image": """
vl, board = el.load("tiny-vl"), samples.boards()[0]
seen = vl.run(board.questions[0].text, images=[board.picture], keep="routing").trace
el.widgets.explore_image(seen)
""",
    "attention": "el.widgets.explore_attention(read)",
    "ablation": "el.widgets.explore_ablation(lab, text)",
    "last": f'print("{LAST_WORDS}")',
}


def write(path: Path) -> None:
    import nbformat

    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS.values()]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, path)
