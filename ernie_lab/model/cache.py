"""Keys and values of the past: growing, or in memory that stays where it is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """What a layer asks of a cache."""

    def extend(self, layer: int, k_BSGA: Tensor, v_BSGA: Tensor, /) -> tuple[Tensor, Tensor]:
        """Write this pass's rows and return all `[b t g a]`."""
        ...


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

    @classmethod
    def within(cls, keys_LBTGA: Tensor, values_LBTGA: Tensor) -> KVCache:
        """An empty one that fills this memory before it takes any of its own."""
        cache = cls(len(keys_LBTGA))
        cache._keys = list(keys_LBTGA.unbind())
        cache._values = list(values_LBTGA.unbind())
        return cache

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


class StaticCache:
    """The cache of a step that is captured: its memory, and all it is told, lie in fixed places.

    `extend` writes one row a sequence at the column that `column` holds and returns all columns,
    of which those count that `visible_BST` names. `begin` lends the memory to a `KVCache` for a
    prefill and for steps that are not captured; each sees what the other wrote.
    """

    def __init__(
        self, n_layers: int, n_sequences: int, capacity: int, groups: tuple[int, int], like: Tensor
    ) -> None:
        """`groups` are the key/value heads and the width of each; dtype and device as `like`."""
        self.capacity = capacity
        self.keys_LBTGA = like.new_zeros(n_layers, n_sequences, capacity, *groups)
        self.values_LBTGA = torch.zeros_like(self.keys_LBTGA)
        self.column = like.new_zeros(1, dtype=torch.int64)
        self.visible_BST = like.new_zeros(n_sequences, 1, capacity, dtype=torch.bool)

    def begin(self, mask_BS: Tensor) -> KVCache:
        """Empty, for prompts whose real tokens `mask_BS` names."""
        # A row that does not count is multiplied by 0, so what is left in it must be finite.
        self.keys_LBTGA.zero_()
        self.values_LBTGA.zero_()
        self.visible_BST.zero_()
        self.visible_BST[:, 0, : mask_BS.shape[1]] = mask_BS
        return KVCache.within(self.keys_LBTGA, self.values_LBTGA)

    def aim(self, length: int, n_prompt: int) -> None:
        """The next row goes behind `length`; it counts, and so does all behind the prompts."""
        self.column.fill_(length)
        self.visible_BST[:, :, n_prompt : length + 1] = True

    def extend(self, layer: int, k_BSGA: Tensor, v_BSGA: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.extend` of one new token, but that the columns are all there are."""
        k_BTGA, v_BTGA = self.keys_LBTGA[layer], self.values_LBTGA[layer]
        k_BTGA.index_copy_(1, self.column, k_BSGA)
        v_BTGA.index_copy_(1, self.column, v_BSGA)
        return k_BTGA, v_BTGA


def _grown(held_BTGA: Tensor | None, length: int, capacity: int, like_BSGA: Tensor) -> Tensor:
    batch, _, *rest = like_BSGA.shape
    room = like_BSGA.new_empty(batch, capacity, *rest)
    if held_BTGA is not None:
        room[:, :length] = held_BTGA[:, :length]
    return room
