"""Keys and values of the past."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values of every layer, `[b t g a]`, growing by doubling.

    A forward pass writes behind `length` and moves `length` only when it has finished, so an
    interrupted pass leaves the cache as it was: the next one overwrites the unfinished rows.

    `next_position_B` is where each sequence goes on, which after a picture is not `length`.
    transformers keeps this on the model, where a later call may find a stale one.
    """

    def __init__(self, n_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers
        self.length = 0
        self.next_position_B: Tensor | None = None

    def get_seq_length(self) -> int:
        """`length`, by transformers' name."""
        return self.length

    def extend(self, layer: int, k_BSGA: Tensor, v_BSGA: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's rows and return all `[b t g a]`, t = past + new."""
        return (
            self._write(self._keys, layer, k_BSGA),
            self._write(self._values, layer, v_BSGA),
        )

    def commit(self, n_new: int, next_position_B: Tensor | None = None) -> None:
        """Called once at the very end of a pass, when nothing of it can fail any more."""
        self.length += n_new
        self.next_position_B = next_position_B

    def _write(self, store: list[Tensor | None], layer: int, new_BSGA: Tensor) -> Tensor:
        end = self.length + new_BSGA.shape[1]
        held_BTGA = store[layer]
        if held_BTGA is None or held_BTGA.shape[1] < end:
            held_BTGA = _grown(held_BTGA, self.length, max(end, 2 * self.length), new_BSGA)
        if new_BSGA.shape[0] != held_BTGA.shape[0]:
            raise ValueError(
                f"the cache holds {held_BTGA.shape[0]} sequences, the input has "
                f"{new_BSGA.shape[0]}; start with a new cache"
            )
        if torch.is_grad_enabled() and (new_BSGA.requires_grad or held_BTGA.requires_grad):
            # Out of place: rows already in a graph must stay what they were.
            held_BTGA = torch.cat([held_BTGA[:, : self.length], new_BSGA], dim=1)
        else:
            held_BTGA[:, self.length : end] = new_BSGA
        store[layer] = held_BTGA
        return held_BTGA[:, :end]


def _grown(held_BTGA: Tensor | None, length: int, capacity: int, like_BSGA: Tensor) -> Tensor:
    batch, _, *rest = like_BSGA.shape
    room = like_BSGA.new_empty(batch, capacity, *rest)
    if held_BTGA is not None:
        room[:, :length] = held_BTGA[:, :length]
    return room
