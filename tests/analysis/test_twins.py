"""The untrained twin: another decoder behind the same eye, and nothing of the model touched."""

import torch

import ernie_lab as el
from ernie_lab.analysis import untrained_twin
from ernie_lab.model.vl import eye
from ernie_lab.organisms.boards import samples
from ernie_lab.organisms.initial import initialise


def test_same_eye_other_decoder() -> None:
    lab = el.load("tiny-vl")
    before = {name: value.clone() for name, value in lab.model.state_dict().items()}
    twin, again = untrained_twin(lab), untrained_twin(lab)
    assert twin.model_id == "tiny-vl, untrained, std 0.02, seed 0" and twin.report is None
    assert twin.tokenizer is lab.tokenizer
    theirs, ours = dict(twin.model.named_parameters()), dict(lab.model.named_parameters())
    assert theirs.keys() == ours.keys()
    eyes = {name for name, _ in eye(lab.model)}
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]) == (name in eyes) or theirs[name].ndim == 1
    assert all(torch.equal(theirs[name], value) for name, value in again.model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in lab.model.state_dict().items())
    board = samples.boards()[0]
    first = [
        one.run("Value of red?", images=[board.picture], keep="embed_in").trace
        for one in (lab, twin)
    ]
    pictures = [trace.sel(content="image")["embed_in"].values for trace in first]
    assert (pictures[0] == pictures[1]).all()


def test_seeds_differ_and_text_models_have_twins() -> None:
    lab = el.load("tiny-text")
    begun = {"std": 0.06, "initialise": initialise}
    one, two = untrained_twin(lab, 0, **begun), untrained_twin(lab, 1, **begun)
    assert not torch.equal(one.model.embed_VD, two.model.embed_VD)
    assert 7 < float(one.run("And God said", logits="loss").loss) < 9
    assert abs(float(one.model.blocks[0].mlp.up.weight.detach().std()) - 0.06) < 0.005
    plain = untrained_twin(lab)
    assert abs(float(plain.model.embed_VD.detach().std()) - 0.02) < 0.001
