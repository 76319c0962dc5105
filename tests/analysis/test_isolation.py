"""The isolation of the two banks: seen where it holds, and every planted leak found."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import small_vl_config, small_vl_model
from support.vl_inputs import Inputs, image, video
from torch import Tensor

from ernie_lab.analysis.isolation import expected_bank, isolation_report, router_cosines
from ernie_lab.inputs.batch import pad_batch
from ernie_lab.inputs.media import Grid, Media
from ernie_lab.interventions import edit
from ernie_lab.model.vl import VLModel

CONFIG = small_vl_config()
# 4 of padding, 5 text and 2 + 4 + 2 vision tokens; then 4 text and 2 + 3 + 2 + 8.
INPUTS = Inputs.of(
    [5, 6, image(4, 4), 7, 8, 9], [3, image(2, 6), 4, 5, video(4, 4, 4), 10], config=CONFIG
)
ROUTED = dict(zip(("layer", "sequence", "pos", "id"), (2, 0, 3, CONFIG.ids.image), strict=True))


@pytest.fixture
def model() -> VLModel:
    return small_vl_model()


def report(model: VLModel, inputs: Inputs = INPUTS, **more: object):
    given = inputs.given()
    return isolation_report(model, given.pop("input_ids"), **given, **more)


def moved(pos: int, sequence: int = 0):
    """An edit that sends one token of a padded batch to the other bank."""

    def move(bank_BS: Tensor) -> Tensor:
        other_BS = bank_BS.clone()
        other_BS[sequence, pos] = 1 - other_BS[sequence, pos]
        return other_BS

    return move


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_model_has_no_leaks(model: VLModel, dtype: torch.dtype) -> None:
    found = report(model.to(dtype))
    assert found.isolated
    assert found.leaks.empty
    assert found.n_undecided == 0
    assert found.layers == (1, 2)
    n_text, n_vision = 9, 21
    assert found.n_tokens == n_text + n_vision
    assert found.table["expected"].tolist() == [n_text, n_vision] * 2
    assert found.table["used"].tolist() == [n_text, n_vision] * 2
    assert found.deviation < 1e-5
    assert found.other_gate > 0.1
    assert "9 text, 21 vision): no leaks." in repr(found)


def test_a_planted_leak_is_the_one_reported(model: VLModel) -> None:
    padding = int((INPUTS.mask_BS[0] == 0).sum())
    found = report(model, edits=[edit("blocks.2.moe.bank", moved(padding + 3))])
    (leak,) = found.leaks.to_dict("records")
    assert leak == ROUTED | {"expected": "vision", "used": "text"}
    assert not found.isolated
    assert found.table["leaks"].tolist() == [0, 0, 0, 1]
    assert found.table["used"].tolist() == [9, 21, 10, 20]
    assert "1 leaks in layers 2" in repr(found)


def test_a_text_token_among_the_pictures(model: VLModel) -> None:
    padding = int((INPUTS.mask_BS[0] == 0).sum())
    found = report(model, edits=[edit("moe.bank", moved(padding))])
    assert found.leaks["layer"].tolist() == [1, 2]
    assert found.leaks["pos"].tolist() == [0, 0]
    assert set(found.leaks["expected"]) == {"text"}
    assert set(found.leaks["used"]) == {"vision"}


def test_lost_token_types(model: VLModel) -> None:
    """What other engines do in silence: everything through the text bank."""
    found = report(model, bank=torch.zeros_like(INPUTS.bank_BS))
    assert len(found.leaks) == 2 * 21
    assert set(found.leaks["expected"]) == {"vision"}
    assert set(found.leaks["used"]) == {"text"}


def test_padding_is_no_token(model: VLModel) -> None:
    """Nor is a delimiter on it a leak."""
    ids_BS = INPUTS.ids_BS.masked_fill(INPUTS.mask_BS == 0, CONFIG.ids.image_start)
    given = INPUTS.given() | {"input_ids": ids_BS}
    found = isolation_report(model, given.pop("input_ids"), **given)
    assert found.isolated
    assert found.n_tokens == 30


def test_a_damaged_gate(model: VLModel) -> None:
    """Against weights that were kept, for the model's own are the damaged ones."""
    kept = {
        bank: {layer: router.weight_ED.detach().clone() for layer, router in by_layer.items()}
        for bank, by_layer in model.routers().items()
    }
    assert report(model, gates=kept).isolated
    with torch.no_grad():
        model.blocks[1].moe.vision.router.weight_ED[3] += 0.05
    assert report(model).isolated
    found = report(model, gates=kept)
    assert set(found.leaks["layer"]) == {1}
    assert set(found.leaks["used"]) == {"neither"}
    assert len(found.leaks) == 21
    assert math.isnan(found.table.loc[(1, "vision"), "deviation"])


def test_swapped_gates(model: VLModel) -> None:
    """A model loaded with its gates exchanged is found out by the checkpoint's."""
    swapped = {
        bank: {layer: router.weight_ED for layer, router in model.routers()[other].items()}
        for bank, other in (("text", "vision"), ("vision", "text"))
    }
    found = report(model, gates=swapped)
    assert len(found.leaks) == 2 * 30
    assert (found.leaks["used"] != found.leaks["expected"]).all()


def test_edited_logits_are_of_no_gate(model: VLModel) -> None:
    found = report(model, edits=[edit("blocks.1.moe.text.router_logits", torch.neg)])
    assert set(found.leaks["used"]) == {"neither"}
    assert len(found.leaks) == 9


def test_equal_gates_cannot_tell(model: VLModel) -> None:
    with torch.no_grad():
        for moe in (model.blocks[1].moe, model.blocks[2].moe):
            moe.vision.router.weight_ED.copy_(moe.text.router.weight_ED)
    found = report(model)
    assert found.leaks.empty
    assert found.n_undecided == 60
    assert not found.isolated
    assert "undecided" in repr(found)


def test_text_alone(model: VLModel) -> None:
    found = isolation_report(model, torch.tensor([[5, 6, 7]]))
    assert found.isolated
    assert found.table["used"].tolist() == [3, 0, 3, 0]


def test_many_rows_at_once(model: VLModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = report(model)
    monkeypatch.setattr("ernie_lab.analysis.isolation._ROWS", 4)
    pieces = report(model)
    assert pieces.isolated
    pd.testing.assert_frame_equal(whole.table, pieces.table, atol=1e-5)


def test_of_a_prepared_batch(model: VLModel) -> None:
    """As `lab.prepare` returns it."""
    frames = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    picture = Media("image", torch.randn(16, 12), Grid(1, 4, 4), frames, (8, 8))
    ids = CONFIG.ids
    sequences = [[5, 6], [3, ids.image_start, *[ids.image] * 4, ids.image_end, 9]]
    batch = pad_batch(sequences, pad_id=0, media=[[], [picture]], ids=ids)
    found = isolation_report(model, batch)
    assert found.isolated
    assert found.table["used"].tolist() == [4, 6] * 2
    leaky = isolation_report(model, batch, edits=[edit("blocks.1.moe.bank", moved(6, 0))])
    assert leaky.leaks[["sequence", "pos", "id"]].to_numpy().tolist() == [[0, 0, 5]]
    with pytest.raises(ValueError, match="holds its own mask"):
        isolation_report(model, batch, batch.mask)


def test_expected_bank() -> None:
    ids = CONFIG.ids
    prompt = [[5, ids.image_start, ids.image, ids.image_end, 6]]
    prompt += [[ids.video_start, ids.video, ids.video_end, 7, 8]]
    assert expected_bank(torch.tensor(prompt), ids).tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


def test_router_cosines() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    vision = torch.tensor([[3.0, 3.0], [-1.0, 0.0]])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(router_cosines(text, vision), [[half, -1], [half, 0]], atol=1e-7)
