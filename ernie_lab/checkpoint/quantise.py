"""Which weights are held in few bits, and the bytes that this takes.

nf4: blocks of 64 values, each value one of 16 levels (the quantiles of a normal distribution;
Dettmers et al. 2023, QLoRA, section 3) times the largest magnitude of its block, in float32. That
scale is not itself quantised ("double quantisation"): it would save 0.4 bits a weight, but one
matrix with rows of unlike size then gets scales that are wrong by their own amount.

int8: 255 levels from minus to plus the largest magnitude of the row (Dettmers et al. 2022,
LLM.int8(), section 2.1). Weights alone are quantised; activations are as without.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ernie_lab.checkpoint.parts import part_of
from ernie_lab.display import in_words

Scheme: TypeAlias = Literal["nf4", "int8"]
NF4_BLOCK = 64
ALWAYS = (
    "attention",
    "dense_mlp",
    "shared_experts",
    "routed_experts",
    "text_experts",
    "vision_experts",
)
ON_REQUEST = ("vision_tower", "resampler")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Weight matrices of the decoder's attention, MLPs and experts, and of the parts in `also`.

    Always as they are: routers with their correction biases, norms, biases, embeddings (of
    patches too) and the unembedding.
    """

    scheme: Scheme
    also: tuple[str, ...] = ()

    @classmethod
    def of(cls, quantize: str | None, also: Sequence[str] = ()) -> Quantisation | None:
        """From the arguments of `load`.

        Raises:
            ValueError: no such scheme or part.
            ImportError: nf4 without bitsandbytes.
        """
        parts = (also,) if isinstance(also, str) else tuple(also)
        if quantize is None:
            if parts:
                raise ValueError(f"quantize_also={parts}, but quantize= is not given")
            return None
        for scheme in get_args(Scheme):
            if scheme == quantize:
                break
        else:
            schemes = " or ".join(f'"{name}"' for name in get_args(Scheme))
            raise ValueError(f"quantize={quantize!r} must be {schemes}, or None")
        if unknown := [part for part in parts if part not in ON_REQUEST]:
            raise ValueError(
                f"quantize_also={unknown}: of the parts that are kept, only "
                f"{' and '.join(ON_REQUEST)} can be quantised; routers, norms, embeddings and the "
                "unembedding stay as they are"
            )
        if scheme == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                "quantize='nf4' needs bitsandbytes: pip install 'ernie-lab[quant]'. "
                "quantize='int8' needs nothing"
            )
        return cls(scheme, parts)

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Is the parameter of this name, ours, held in few bits?"""
        is_matrix = len(shape) >= 2 and "embed" not in name
        return is_matrix and part_of(name) in (*ALWAYS, *self.also)

    def n_bytes(self, shape: Sequence[int]) -> int:
        """Of a parameter `[… f d]`: its matrices are packed one by one."""
        *stack, rows, columns = shape
        n = rows * columns
        if self.scheme == "nf4":
            each = math.ceil(n / 2) + 4 * math.ceil(n / NF4_BLOCK)
        else:
            each = n + 4 * rows
        return math.prod(stack) * each


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Bytes that the tensors of a loaded model hold, by part: packed in few bits, and kept.

    `packed` includes the scales; `scheme` is None where nothing is packed. Measured, not
    estimated.
    """

    scheme: Scheme | None
    packed: Mapping[str, int]
    kept: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.packed.values()) + sum(self.kept.values())

    def __str__(self) -> str:
        kept = f"{in_words(sum(self.kept.values()))} kept ({_listed(self.kept)})"
        if self.scheme is None:
            return kept
        packed = in_words(sum(self.packed.values()))
        return f"{packed} in {self.scheme} ({_listed(self.packed)}), {kept}"


def _listed(by_part: Mapping[str, int]) -> str:
    largest = sorted(by_part, key=lambda part: -by_part[part])
    return ", ".join(f"{part} {in_words(by_part[part])}" for part in largest)
