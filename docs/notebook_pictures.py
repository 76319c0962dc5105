"""Takes a picture out of each executed notebook for the index: `python docs/notebook_pictures.py`.

Writes docs/notebooks/NAME.png, no wider than 640 pixels and below 60 kB, for notebooks/README.md.
"""

import base64
import io
from pathlib import Path

import nbformat
from PIL import Image

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
WIDE, MOST_BYTES = 640, 60_000
# The beginning of the figure's title.
PICKED = {
    "01_quickstart": "Which experts each token went to",
    "02_images_and_experts": "Which vision expert each part of image 0",
    "03_shared_experts": "Shared experts of two layers exchanged",
    "04_routing_experiments": "Layer 3, expert 3 off, in five senses",
    "05_routing_balance": "Balance with the bias, without it",
    "06_modality_isolation": "Text and pictures in tiny-vl",
    "07_specialisation": "What an expert tells of the domain",
    "08_attention": "Second copies, one head cut at a time",
    "09_on_your_gpu": "Shared and routed experts off, layer by layer",
    "10_corpus": "Layer 3: which experts each domain goes to",
}


def main() -> None:
    for name, title in PICKED.items():
        png = small(picture(NOTEBOOKS / f"{name}.ipynb", title))
        target = HERE / "notebooks" / f"{name}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(png)


def picture(path: Path, title: str) -> bytes:
    """The first picture of the notebook whose figure has this title."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                found.setdefault(data["text/plain"], data["image/png"])
    for text, png in found.items():
        if text.startswith(title):
            return base64.b64decode(png)
    titles = [text.splitlines()[0] for text in found]
    raise ValueError(f"{path.name} has no picture {title!r}; it has {titles}")


def small(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((WIDE, 10_000), Image.Resampling.LANCZOS)
    for colours in (128, 64, 32):
        file = io.BytesIO()
        shown = rgb.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        shown.save(file, "png", compress_level=9)
        if file.tell() < MOST_BYTES:
            return file.getvalue()
    raise ValueError(f"{file.tell()} bytes: pick a smaller picture")


if __name__ == "__main__":
    main()
