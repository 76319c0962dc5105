"""The wrapper: mime bundle, saving, and that nothing global is touched."""

import base64
import html
import io
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from plots.cases import VisionTrace

from ernie_lab import plots
from ernie_lab.plots.png import compressed


@pytest.fixture
def view():
    return plots.plot_router_token(
        [0.5, 0.3, 0.2], [0], token='<b>"', layer=1, caption="A caption with $ and _."
    )


def test_bundle_has_picture_alt_and_text(view):
    bundle = view._repr_mimebundle_(include=None, exclude=None)
    png = base64.b64decode(bundle["image/png"])
    assert png.startswith(b"\x89PNG")
    assert f'alt="{html.escape(view.alt)}"' in bundle["text/html"]
    assert "<b>" not in bundle["text/html"]
    assert bundle["image/png"] in bundle["text/html"]
    assert view.title in bundle["text/plain"] and view.alt in bundle["text/plain"]


@pytest.mark.parametrize(
    "name, start", [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("new/a.pdf", b"%PDF")]
)
def test_save_by_suffix_leaves_nothing_else(view, tmp_path, name, start):
    path = view.save(tmp_path / name)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [path.name]
    first = path.read_bytes()
    assert view.save(path).read_bytes() == first  # reproducible: no dates in the files


def test_save_refuses_other_suffixes_and_keeps_the_old_file(view, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\.gif"):
        view.save(tmp_path / "a.gif")
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        view.save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_huge_pictures_are_refused(view):
    with pytest.raises(ValueError, match="megapixels"):
        view.png(dpi=3000)


def test_callers_settings_are_kept(view):
    before = dict(mpl.rcParams)
    view.png()
    assert dict(mpl.rcParams) == before


def test_pyplot_is_never_imported():
    code = (
        "import sys, numpy as np; from ernie_lab import plots;"
        "plots.plot_expert_load(np.ones((2, 4)), n_tokens=9, k=1).png();"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert not {'ernie_lab.widgets', 'IPython'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def drawn(view, dpi):
    """The picture before it is made small, as RGB."""
    raw = io.BytesIO()
    view._write(raw, "png", dpi)
    with Image.open(raw) as image:
        return np.asarray(image.convert("RGB"))


def opened(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("n_colours, mode", [(200, "P"), (600, "RGB")])
def test_the_colour_of_every_cell_survives_exactly(n_colours, mode):
    rng = np.random.default_rng(0)
    cells = rng.permutation(n_colours).reshape(-1, 4)
    colours = rng.integers(0, 256, (n_colours, 3)).astype(np.uint8)
    figure = Figure(figsize=(5, 5), layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(colours[cells], aspect="auto", interpolation="nearest")
    ax.set_title("letters whose edges take colours of their own: Ωßgq@&%")
    for i, word in enumerate(("red", "green", "blue", "orange", "purple")):
        ax.text(i / 5, 1.08, word * 3, color=word, transform=ax.transAxes)
    view = plots.View(figure, title="cells", alt="cells")
    before = drawn(view, 150)
    png = compressed(Image.fromarray(before), 150, small=False)
    after = opened(png)
    inside = ax.get_window_extent()
    scale = 150 / figure.dpi
    left, right = int(inside.x0 * scale) + 3, int(inside.x1 * scale) - 3
    bottom, top = (int(before.shape[0] - y * scale) for y in (inside.y0, inside.y1))
    part = np.s_[top + 3 : bottom - 3, left:right]
    shown = {tuple(colour) for colour in before[part].reshape(-1, 3).tolist()}
    assert len(shown & set(map(tuple, colours.tolist()))) > 0.98 * n_colours
    np.testing.assert_array_equal(after[part], before[part])
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == mode


def test_heat_maps_are_exact_and_small_in_a_notebook_too():
    rng = np.random.default_rng(1)
    load = rng.poisson(30, (8, 32)).astype(float)
    view = plots.plot_expert_load(load, n_tokens=int(load[0].sum()), k=1)
    png = view.png()
    before, after = drawn(view, 144), opened(png)
    assert before.shape == after.shape
    same = [before[:-1, :-1], before[1:, :-1], before[:-1, 1:], before[1:, 1:]]
    filled = np.all([(same[0] == other).all(-1) for other in same], axis=0)
    np.testing.assert_array_equal(after[:-1, :-1][filled], before[:-1, :-1][filled])
    assert len(png) < 60_000  # true colours: twice as much


def test_a_photograph_is_small_in_a_notebook_and_exact_in_a_file():
    view = plots.plot_image_experts(VisionTrace())
    small, whole = view.png(), view.png(dpi=144)
    assert len(small) < len(whole) / 2
    np.testing.assert_array_equal(opened(whole), drawn(view, 144))
    ground = opened(small)[0, 0]
    np.testing.assert_array_equal(ground, drawn(view, 144)[0, 0])
