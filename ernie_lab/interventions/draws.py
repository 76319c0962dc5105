"""Random numbers for tokens, as a function of seed, site, position and token alone.

So a draw is the same in a batch as alone, and in generation as in one forward of the final
text. Two sequences with one token at one position share its draw.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ernie_lab.interventions.here import Here
from ernie_lab.sites import Site, select

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def key_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """What an edit that draws must read: the embeddings, which tell the token."""
    return select("embed", sites)


def token_keys(here: Here, site: Site, x: Tensor, seed: int) -> Tensor:
    """`[rows]`: one 64-bit number for each row of a site's value."""
    if "keys" not in here.kept:
        embed_BSD = here.value("embed").detach()
        bits_BSD = embed_BSD.contiguous().view(_BITS[embed_BSD.element_size()]).long()
        place_D = torch.arange(bits_BSD.shape[-1], device=bits_BSD.device)
        token_BS = mixed(bits_BSD ^ mixed(place_D)).sum(-1)
        n_new = embed_BSD.shape[1]
        pos_BS = here.past.positions[:, -n_new:].to(embed_BSD.device)
        here.kept["keys"] = mixed(token_BS ^ mixed(pos_BS))
    of_rows_N = here.kept["keys"].flatten()[here.rows(site, x)]
    salt = torch.tensor([seed, zlib.crc32(site.path.encode())], device=x.device)
    first, second = mixed(salt)
    return mixed(of_rows_N ^ first ^ mixed(second))


def uniforms(keys_N: Tensor, n: int) -> Tensor:
    """`[rows n]` in (0, 1), fp64."""
    counted = torch.arange(n, device=keys_N.device)
    bits = mixed(keys_N[:, None] ^ mixed(counted + 1))
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) / (1 << 53)


def normals(keys_N: Tensor, n: int) -> Tensor:
    """`[rows n]`, standard normal, by Box and Muller."""
    drawn = uniforms(keys_N, 2 * n)
    return (-2 * drawn[:, :n].log()).sqrt() * (2 * math.pi * drawn[:, n:]).cos()


def mixed(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood 2014); int64 wraps around, shifts are made logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(n: int) -> int:
    return n - (1 << 64) if n >= 1 << 63 else n
