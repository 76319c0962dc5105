"""Decoding after pictures against transformers: logits step by step, and greedy generation."""

import numpy as np
import pytest
import torch
from support.vl_inputs import Inputs, Picture, Prompt, image, video
from support.vl_oracle import (
    Pair,
    decode_positions,
    given,
    pair,
    shared_placeholder_pair,
    theirs_sees,
)
from torch import Tensor

from ernie_lab.inference.generate import Settings, decode
from ernie_lab.inputs.batch import pad_batch
from ernie_lab.inputs.media import Media
from ernie_lab.model.cache import KVCache
from ernie_lab.model.vl import VLModel

CLOSE = {"atol": 1e-5, "rtol": 1e-5}

CONFIGS = {
    "plain": {},
    "no-shared": {"text": {"moe_num_shared_experts": 0}, "tied": False},
    "wide-heads": {"text": {"head_dim": 20, "use_bias": True}, "sections": (3, 3, 4)},
    "top-1": {"text": {"moe_k": 1, "moe_num_experts": 4, "mlp_layer_types": ["sparse"] * 3}},
}
PROMPTS: dict[str, list[Prompt]] = {
    "text": [[5, 6, 7, 8]],
    "image": [[5, 6, image(4, 6), 7]],
    "picture-last": [[5, 6, video(2, 2, 6)]],
    "unequal": [[5, 6], [3, image(4, 6), 4, video(4, 4, 2), 5], [6, image(2, 2), 7]],
    "pictures-and-none": [[3, 4, 5, 6, 7, 8, 9], [image(2, 4), 5]],
}
# Its `generate` counts on from the last token, on each axis. Its forward goes on after the
# largest position, as we and the reference do. Only where a picture holds it do they differ.
PLACED: dict[str, list[Prompt]] = {
    "bare-picture-last": [[5, video(2, 4, 4, bare=True)]],
    "long-clip": [[5, video(12, 4, 2), 6, 7], [3, 4]],
}


@pytest.fixture(scope="module", params=CONFIGS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    return pair(tmp_path_factory.mktemp("vl"), seed=len(name), **CONFIGS[name])


@pytest.mark.parametrize("prompt", [*PROMPTS, *PLACED])
def test_cached_decode(both: Pair, prompt: str) -> None:
    """Also of tokens that look like pictures: in decoding they are text, for both."""
    inputs = Inputs.of(*(PROMPTS | PLACED)[prompt], config=both.config)
    mask_BT, n = inputs.mask_BS, len(inputs.ids_BS)
    new_BN = torch.tensor([[9, 92, 90, 93, 10, 11]]).expand(n, -1)
    past = theirs_sees(both.theirs, inputs, use_cache=True).output.past_key_values
    if not inputs.pixels:
        # It computes no deltas for a batch without pictures, and counts padding too.
        both.theirs.model.rope_deltas = None
    cache = KVCache(both.config.text.n_layers)
    with torch.no_grad():
        both.ours(**inputs.given(), past_key_values=cache, positions="transformers")
        for new_B1 in new_BN.split(1, dim=1):
            mask_BT = torch.cat([mask_BT, torch.ones(n, 1, dtype=torch.long)], dim=1)
            theirs = both.theirs(
                new_B1,
                mask_BT,
                position_ids=decode_positions(both.theirs, mask_BT),
                past_key_values=past,
            )
            ours = both.ours(new_B1, mask_BT, past_key_values=cache)
            torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)


def test_chunks_after_a_picture(both: Pair) -> None:
    """Several tokens at once on a filled cache."""
    inputs = Inputs.of(*PROMPTS["image"], config=both.config)
    cache = KVCache(both.config.text.n_layers)
    past = theirs_sees(both.theirs, inputs, use_cache=True).output.past_key_values
    with torch.no_grad():
        both.ours(**inputs.given(), past_key_values=cache)
        for chunk in (torch.tensor([[9, 10, 11]]), torch.tensor([[12, 13]])):
            # Without a mask it counts on by itself.
            theirs = both.theirs(chunk, past_key_values=past)
            ours = both.ours(chunk, past_key_values=cache)
            torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)


def greedy(model: VLModel, inputs: Inputs, n_new: int) -> Tensor:
    """`[b n]`, by the plain forward."""
    cache, tokens = KVCache(model.config.text.n_layers), []
    mask_BT = inputs.mask_BS
    with torch.no_grad():
        out = model(**inputs.given(), past_key_values=cache)
        for _ in range(n_new):
            tokens.append(out.logits[:, -1:].argmax(-1))
            mask_BT = torch.cat([mask_BT, torch.ones_like(tokens[-1])], dim=1)
            out = model(tokens[-1], mask_BT, past_key_values=cache)
    return torch.cat(tokens, dim=1)


def their_greedy(both: Pair, inputs: Inputs, n_new: int) -> Tensor:
    both.theirs.model.rope_deltas = None
    out = both.theirs.generate(
        **given(inputs), max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[:, inputs.ids_BS.shape[1] :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_generation(both: Pair, prompt: str) -> None:
    inputs = Inputs.of(*PROMPTS[prompt], config=both.config)
    assert torch.equal(greedy(both.ours, inputs, 12), their_greedy(both, inputs, 12))


def test_a_batch_generates_what_its_prompts_do_alone(both: Pair) -> None:
    inputs = Inputs.of(*PROMPTS["unequal"], config=both.config)
    together = greedy(both.ours, inputs, 10)
    for i, row in enumerate(together):
        assert torch.equal(row, greedy(both.ours, inputs.alone(i, both.config), 10)[0])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generation_of_the_library(both: Pair, prompt: str) -> None:
    """`decode`, on a batch that was padded and laid out by the library itself."""
    inputs = Inputs.of(*PROMPTS[prompt], config=both.config)
    batch = pad_batch(
        [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs.ids_BS, inputs.mask_BS, strict=True)
        ],
        pad_id=0,
        media=media(inputs),
        ids=both.config.ids,
    )
    new = [list(step.values()) for step in decode(both.ours, batch, Settings(max_new_tokens=12))]
    assert torch.tensor(new).T.tolist() == their_greedy(both, inputs, 12).tolist()


def media(inputs: Inputs) -> list[list[Media]]:
    """The pictures of each prompt; of their frames nothing is read."""
    left = dict(inputs.pixels)
    every = []
    for prompt in inputs.prompts:
        every.append([])
        for part in prompt:
            if isinstance(part, Picture):
                t, h, w = part.grid
                own, left[part.kind] = left[part.kind].tensor_split([t * h * w])
                frames = np.zeros((t, 2 * h, 2 * w, 3), dtype=np.uint8)
                every[-1].append(Media(part.kind, own, part.grid, frames, (2 * h, 2 * w)))
    return every


def test_generation_with_one_placeholder_for_both(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    both = shared_placeholder_pair(tmp_path_factory.mktemp("vl"))
    inputs = Inputs.of(*PROMPTS["unequal"], config=both.config)
    assert torch.equal(greedy(both.ours, inputs, 12), their_greedy(both, inputs, 12))
