"""TransformerLens' cache: raw tensors with their batch axis, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ernie_lab.sites import Site, SiteError
from ernie_lab.trace.keys import Key, lookup

_GRAD = "_grad"


class ActivationCache(Mapping[str, Tensor]):
    """`cache["blocks.3.attn.hook_pattern"]`, `cache["pattern", 3]`, `cache["scale", 1, "ln1"]`.

    Values are `[batch, position, …]` as the model has them, padding rows included: take care in
    a batch of unequal prompts, or use a `Trace`, which has none. In a vision-language model, what
    belongs to one bank of experts has one row for each of its tokens, and the vision tower one
    for each patch. Iterating gives our own paths.
    With `incl_bwd`, `cache["resid_post_grad", 3]` is the gradient of the loss, the mean over the
    tokens that have a next one.
    """

    def __init__(self, values: Mapping[str, Tensor], sites: Sequence[Site]) -> None:
        self._values = dict(values)
        self._sites = tuple(sites)
        self._of_pictures = frozenset(site.path for site in sites if site.of_pictures)

    def __getitem__(self, key: Key) -> Tensor:
        if isinstance(key, str) and key in self._values:
            return self._values[key]
        path = self._path(key)
        if path not in self._values:
            hint = " and pass incl_bwd=True" if path.endswith(_GRAD) else ""
            if path.removesuffix(_GRAD) in self._of_pictures:
                hint += ", or pass pictures: it fires with them alone"
            raise SiteError(f"{path} exists but was not cached; widen names_filter{hint}")
        return self._values[path]

    def _path(self, key: Key) -> str:
        """Of the value, or of its gradient for a name that ends in `_grad`."""
        suffix, plain = "", key
        if isinstance(key, str) and key.endswith(_GRAD):
            suffix, plain = _GRAD, key.removesuffix(_GRAD)
        elif isinstance(key, tuple) and key and str(key[0]).endswith(_GRAD):
            suffix, plain = _GRAD, (key[0].removesuffix(_GRAD), *key[1:])
        found = lookup(plain, self._sites)
        if not isinstance(found, Site):
            raise SiteError(f"{key!r} is a site of every layer; name one, ({key!r}, layer)")
        return found.path + suffix

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        some = ", ".join(list(self)[:4]) + (", …" if len(self) > 4 else "")
        return f"ActivationCache({len(self)} values{': ' * bool(some)}{some})"

    def remove_batch_dim(self) -> ActivationCache:
        """The same without the batch axis, which must have length 1.

        Values without one stay: those of a bank of experts, patches and image tokens.
        """
        packed = {site.path for site in self._sites if site.row != "b"}
        batched = {k: v for k, v in self._values.items() if k.removesuffix(_GRAD) not in packed}
        sizes = {len(value) for value in batched.values()}
        if sizes - {1} or not self._values:
            raise ValueError(f"the batch has {sorted(sizes)} sequences, expected 1")
        values = {k: v[0] if k in batched else v for k, v in self._values.items()}
        return ActivationCache(values, self._sites)

    def to(self, device: torch.device | str) -> ActivationCache:
        return ActivationCache({k: v.to(device) for k, v in self._values.items()}, self._sites)


class CacheTap:
    """Keeps the tensors themselves of the chosen sites; with `grad`, their gradients later."""

    def __init__(self, sites: Sequence[Site], grad: bool = False) -> None:
        self._paths = frozenset(site.path for site in sites)
        self._grad = grad
        self.values: dict[str, Tensor] = {}

    def wants(self, site: Site, /) -> bool:
        return site.path in self._paths

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in self._paths:
            self.values[site.path] = x
            if self._grad and x.requires_grad:
                x.retain_grad()
        return x

    def cache(self, sites: Sequence[Site], loss: Tensor | None = None) -> ActivationCache:
        """What was kept, without its graph; with a loss, its gradients too, run backwards now."""
        values = {path: x.detach() for path, x in self.values.items()}
        if loss is not None:
            values |= self.gradients(loss)
        return ActivationCache(values, sites)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of the loss, by `path + "_grad"`; values without a gradient are left out.

        The backward pass ends at the kept values, so that no parameter gets a gradient.
        """
        through = [x for x in self.values.values() if x.requires_grad]
        if not through:
            raise ValueError("incl_bwd: no cached site has a gradient (integers? no pictures?)")
        loss.backward(inputs=through)
        return {
            f"{path}_grad": x.grad
            for path, x in self.values.items()
            if x.requires_grad and x.grad is not None
        }
