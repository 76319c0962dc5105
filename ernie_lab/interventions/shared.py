"""What the shared experts do: silence, scale, swap, transplant, and the controls for these.

A swap moves the shared MLP alone; the norm gain before it stays the receiver's. Layers are true
layer numbers, negative from the end; None means every layer with shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from ernie_lab.interventions import general
from ernie_lab.interventions.calling import called
from ernie_lab.interventions.donors import Donor
from ernie_lab.interventions.draws import key_sites, normals, token_keys
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.parts import beside, part_at
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.saying import as_call
from ernie_lab.interventions.targets import Layers, as_layers, in_layers, siblings, true_layer
from ernie_lab.interventions.where import Tokens, narrowed_to
from ernie_lab.model.kinds import Model
from ernie_lab.model.mlp import GatedMLP, MLPSites
from ernie_lab.sites import Site, all_sites
from ernie_lab.trace.integers import integer
from ernie_lab.trace.trace import Trace

__all__ = [
    "mean",
    "permute_neurons",
    "random_direction",
    "resample",
    "scale",
    "swap",
    "transplant",
    "zero",
]

SITE = general.SHARED_OUT
_BESIDE = MLPSites.under("donor", "donor", "a donor")


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__


@called("shared.zero")
def zero(layers: Layers = None, **tokens: Unpack[Tokens]) -> Edit:
    """The shared experts contribute nothing."""
    return general.zero(SITE, layers=layers, **tokens)


@called("shared.scale")
def scale(by: float, layers: Layers = None, **tokens: Unpack[Tokens]) -> Edit:
    """`by` times the shared experts' output."""
    return general.scale(SITE, by, layers=layers, **tokens)


@called("shared.mean")
def mean(trace: Trace, layers: Layers = None, **tokens: Unpack[Tokens]) -> Edit:
    """Their mean output over the tokens of `trace` (keep="moe.shared_out")."""
    return general.mean(SITE, trace, layers=layers, **tokens)


@called("shared.resample")
def resample(trace: Trace, seed: int = 0, layers: Layers = None, **tokens: Unpack[Tokens]) -> Edit:
    """Their output at a random token of `trace`, made from other prompts."""
    return general.resample(SITE, trace, seed=seed, layers=layers, **tokens)


@dataclass(frozen=True, slots=True, repr=False)
class SharedSwap:
    """The shared experts of two layers change places. See `swap`."""

    kind: ClassVar[str] = "shared.swap"
    i: int
    j: int
    norm_matched: bool = False
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_layers(SITE, (self.i, self.j), sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return siblings(self.select(sites), "in", sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        sites = all_sites(model)
        i, j = (_path(true_layer(layer, sites)) for layer in (self.i, self.j))
        one, other = part_at(model, i), part_at(model, j)
        return {i: beside(other, one), j: beside(one, other)}

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        return _against_own(site, x, here, self.norm_matched)

    def beside(self, site: Site, here: Here, /) -> Tensor:
        donor = _run(here.parts, site, here)
        return _against_own(site, donor, here, self.norm_matched)


@dataclass(frozen=True, slots=True, repr=False)
class SharedTransplant:
    """Another checkpoint's shared experts. See `transplant`."""

    kind: ClassVar[str] = "shared.transplant"
    donor: Donor
    layers: tuple[int, ...] | None = None
    norm_matched: bool = False
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_layers(SITE, self.layers, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return siblings(self.select(sites), "in", sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        paths = [_path(site.layer) for site in self.select(all_sites(model))]
        return {path: self.donor.part(path) for path in paths}

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        return _against_own(site, x, here, self.norm_matched)

    def beside(self, site: Site, here: Here, /) -> Tensor:
        return _against_own(site, _run(here.parts, site, here), here, self.norm_matched)


@dataclass(frozen=True, slots=True, repr=False)
class PermuteNeurons:
    """The shared experts' neurons in another order. See `permute_neurons`."""

    kind: ClassVar[str] = "shared.permute_neurons"
    seed: int
    layers: tuple[int, ...] | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_layers(SITE, self.layers, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return siblings(self.select(sites), "in", sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        parts = {}
        for site in self.select(all_sites(model)):
            assert site.layer is not None
            path = _path(site.layer)
            own = part_at(model, path)
            assert isinstance(own, GatedMLP)
            parts[path] = _permuted(own, self.seed * 1009 + site.layer)
        return parts

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x

    def beside(self, site: Site, here: Here, /) -> Tensor:
        return _run(here.parts, site, here)


@dataclass(frozen=True, slots=True, repr=False)
class RandomDirection:
    """A random direction of the norm that the output had. See `random_direction`."""

    kind: ClassVar[str] = "shared.random_direction"
    seed: int
    layers: tuple[int, ...] | None = None
    per: Literal["token", "layer"] = "token"
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_layers(SITE, self.layers, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return key_sites(sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        width = x.shape[-1]
        if self.per == "token":
            drawn = normals(token_keys(here, site, x, self.seed), width).view_as(x)
        else:
            assert site.layer is not None
            generator = torch.Generator().manual_seed(self.seed * 1009 + site.layer)
            drawn = torch.randn(width, generator=generator).double().to(x.device)
        unit = drawn / drawn.norm(dim=-1, keepdim=True)
        turned: Tensor = unit * x.double().norm(dim=-1, keepdim=True)
        return turned.to(x.dtype)


@called("shared.swap")
def swap(i: int, j: int, *, norm_matched: bool = False, **tokens: Unpack[Tokens]) -> Edit:
    """The shared experts of layers `i` and `j` change places; no weight is copied, but between
    layers on different devices.

    The count of the edit reports the norm ratio: mean over tokens of ||donor's output|| /
    ||own output|| on the same input, from the run itself (the own part runs beside). With
    `norm_matched` each token's output is scaled to the norm that the own part's would have.
    """
    i, j = integer(i, "i"), integer(j, "j")
    return narrowed_to(SharedSwap(i, j, norm_matched), tokens)


@called("shared.transplant")
def transplant(
    lab: Any, layers: Layers = None, *, norm_matched: bool = False, **tokens: Unpack[Tokens]
) -> Edit:
    """The shared experts of another lab's model, of the same width, in the same layers.

    The other lab must be loaded in the same dtype, on the same device; its tensors are used as
    they are. Norms as in `swap`.
    """
    return narrowed_to(SharedTransplant(Donor.of(lab), as_layers(layers), norm_matched), tokens)


@called("shared.permute_neurons")
def permute_neurons(seed: int = 0, layers: Layers = None, **tokens: Unpack[Tokens]) -> Edit:
    """A control that does nothing: gate, up and down in another order of neurons.

    The output differs by rounding alone. (This one holds permuted copies of the shared MLPs.)
    """
    return narrowed_to(PermuteNeurons(integer(seed, "seed"), as_layers(layers)), tokens)


@called("shared.random_direction")
def random_direction(
    seed: int = 0,
    layers: Layers = None,
    *,
    per: Literal["token", "layer"] = "token",
    **tokens: Unpack[Tokens],
) -> Edit:
    """A control of equal norm: each token's output turned to a random direction.

    `per="token"` draws one for each token, `per="layer"` one that all tokens share.
    """
    if per not in ("token", "layer"):
        raise EditError(f'per={per!r} must be "token" or "layer"')
    return narrowed_to(RandomDirection(integer(seed, "seed"), as_layers(layers), per), tokens)


def _path(layer: int | None) -> str:
    return f"blocks.{layer}.moe.shared"


def _run(parts: Mapping[str, nn.Module], site: Site, here: Here) -> Tensor:
    """A shared MLP on what this layer's really read."""
    part = parts[_path(site.layer)]
    assert isinstance(part, GatedMLP)
    out_BSD: Tensor = part(here.value(f"blocks.{site.layer}.moe.in"), _BESIDE)
    return out_BSD


def _against_own(site: Site, donor_BSD: Tensor, here: Here, matched: bool) -> Tensor:
    own_BS = _run(here.before, site, here).float().norm(dim=-1)
    donor_BS = donor_BSD.float().norm(dim=-1)
    here.tell("norm ratio", site, donor_BS / own_BS)
    if not matched:
        return donor_BSD
    ratio_BS = torch.where(donor_BS > 0, own_BS / donor_BS, 1.0)
    matched_BSD: Tensor = donor_BSD * ratio_BS.unsqueeze(-1)
    return matched_BSD.to(donor_BSD.dtype)


def _permuted(own: GatedMLP, seed: int) -> GatedMLP:
    generator = torch.Generator().manual_seed(seed)
    hidden, width = own.gate.weight.shape
    order = torch.randperm(hidden, generator=generator).to(own.gate.weight.device)
    with torch.device("meta"):
        twin = GatedMLP(width, hidden, own.gate.bias is not None)
    for name in ("gate", "up", "down"):
        mine, theirs = getattr(twin, name), getattr(own, name)
        weight = theirs.weight.detach()
        weight = weight[:, order] if name == "down" else weight[order]
        mine.weight = nn.Parameter(weight, requires_grad=False)
        if theirs.bias is not None:
            bias = theirs.bias.detach()
            mine.bias = nn.Parameter(bias if name == "down" else bias[order], requires_grad=False)
    return twin.train(own.training)
