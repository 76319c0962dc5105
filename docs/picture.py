"""Draws the pictures of the README, docs/*.png: `python docs/picture.py`."""

from pathlib import Path

from matplotlib.figure import Figure

import ernie_lab as el
from ernie_lab.demo import TEXTS
from ernie_lab.organisms.boards import samples

HERE = Path(__file__).parent
N_TOKENS, LAYERS = 18, (1, 3, 5)


def main() -> None:
    expert_map(HERE / "expert_map.png")
    image_experts(HERE / "image_experts.png")


def expert_map(target: Path) -> None:
    lab = el.load("tiny-text")
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for ax, (name, text) in zip(figure.subplots(1, 3), TEXTS.items(), strict=True):
        trace = lab.run(text, keep="routing").trace.sel(position=slice(0, N_TOKENS))
        el.plots.plot_expert_map(
            trace.expert_ids,
            trace.expert_weights,
            n_experts=trace.n_experts,
            only_layers=LAYERS,
            ax=ax,
            title=name,
        )
    figure.savefig(target, dpi=110)


def image_experts(target: Path) -> None:
    lab, board = el.load("tiny-vl"), samples.boards()[0]
    question = board.questions[0].text
    trace = lab.run(question, images=[board.picture], keep="routing").trace
    el.plots.plot_image_experts(trace, layers=[1, 2], model="tiny-vl").save(target, dpi=110)


if __name__ == "__main__":
    main()
