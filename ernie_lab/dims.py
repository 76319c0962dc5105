"""The legend of dimension letters: one letter, one meaning, in the whole package.

Upper case in tensor names (`resid_BSD`), lower case in einops patterns, jaxtyping
annotations and `Site.dims` (`"b s d"`). No other file may define a letter.
"""

from types import MappingProxyType
from typing import TypeAlias

from jaxtyping import Bool, Int
from torch import Tensor

DIMS = MappingProxyType(
    {
        "b": "batch",
        "s": "sequence position (query)",
        "t": "key/value position",
        "d": "model width (residual stream)",
        "h": "query head",
        "g": "key/value head",
        "a": "width of one head",
        "c": "rotary pair: half of a head's width",
        "l": "layer",
        "v": "vocabulary",
        "e": "routed expert",
        "k": "slot: one of the experts chosen for a token",
        "f": "hidden width of an MLP or of an expert",
        "n": "tokens, flattened over batch and sequence; in a bank, its own tokens alone",
        "j": "(token, slot) row, flattened, in whatever order the code says",
        "p": "packed vision patch",
        "w": "vision width",
        "m": "merged (resampled) image token",
        "r": "rotary axis (time, height, width)",
        "i": "frame: an image, or one frame of a clip",
        "u": "vision patch that is attended to, within a frame",
        "o": "block of 2 x 2 patches of one frame",
        "x": "width of the resampler",
        "q": "pixels of one patch, over its channels",
    }
)

# What users read as names of axes in a trace.
AXIS_NAMES = MappingProxyType(
    {
        "b": "batch",
        "s": "token",
        "t": "key",
        "d": "width",
        "h": "head",
        "g": "kv_head",
        "a": "head_width",
        "l": "layer",
        "v": "vocabulary",
        "e": "expert",
        "k": "slot",
        "f": "neuron",
        "n": "token",
        "p": "patch",
        "w": "vision_width",
        "m": "image_token",
        "r": "rotary_axis",
        "i": "frame",
        "u": "key_patch",
        "o": "block",
        "x": "resampler_width",
        "q": "pixel",
    }
)

TokenIds: TypeAlias = Int[Tensor, "b s"]
TokenMask: TypeAlias = Bool[Tensor, "b s"]
Positions: TypeAlias = Int[Tensor, "b s"]
