"""What single experts put out for the tokens of a reference trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ernie_lab.interventions.here import EditError
from ernie_lab.interventions.targets import in_bank, sibling
from ernie_lab.interventions.values import Values, kept_paths
from ernie_lab.trace.trace import Trace


def expert_means(
    trace: Trace, layers: Sequence[int], experts: Sequence[int], bank: str | None
) -> Values:
    """`path#expert`: the mean `[d]` over the tokens that chose it."""
    found = _outputs(trace, layers, experts, bank)
    means = {name: rows.double().mean(0).to(rows.dtype) for name, rows in found}
    return Values(means, f"means of {len(means)} experts over {len(trace)} tokens")


def expert_rows(
    trace: Trace, layers: Sequence[int], experts: Sequence[int], bank: str | None
) -> Values:
    """`path#expert`: one row `[d]` for each token that chose it."""
    rows = dict(_outputs(trace, layers, experts, bank))
    return Values(rows, f"outputs of {len(rows)} experts over {len(trace)} tokens")


def _outputs(
    trace: Trace, layers: Sequence[int], experts: Sequence[int], bank: str | None
) -> Iterator[tuple[str, Tensor]]:
    for site in in_bank("expert_out", tuple(layers), bank, trace.known_sites):
        ids_path = sibling(site, "expert_ids")
        kept_paths(trace, [site.path, ids_path], every=True)
        out, ids = (trace.values[path].parts[None] for path in (site.path, ids_path))
        if not torch.equal(out.rows_N, ids.rows_N):
            raise EditError(
                f"{site.path} and {ids_path} were kept at other tokens; keep both alike"
            )
        for expert in experts:
            rows_MD = out.values[ids.values == expert].detach().cpu()
            if not len(rows_MD):
                raise EditError(
                    f"no token of the trace chose expert {expert} at {site.path}; take a longer "
                    "reference"
                )
            yield f"{site.path}#{expert}", rows_MD
