"""notebooks/README.md: every notebook is in it, with a small picture that has words."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEX = (ROOT / "notebooks" / "README.md").read_text()
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_every_notebook_is_in_the_index_once_and_in_order() -> None:
    assert re.findall(r"^## \[[^\]]*\]\((\w+)\.ipynb\)", INDEX, re.M) == NOTEBOOKS


def test_each_has_a_small_picture_with_words() -> None:
    pictures = re.findall(r'<img src="\.\./([^"]*)" width="\d+" alt="([^"]{40,})">', INDEX)
    assert [Path(path).stem for path, _ in pictures] == NOTEBOOKS
    for path, _ in pictures:
        assert 1_000 < (ROOT / path).stat().st_size < 60_000, path
