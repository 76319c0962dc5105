"""What routing would tell of a label had nobody taught the router to: three nulls.

*Permuted labels* have no meaning left; they show what a small sample gives. *An untrained twin*
shows what tokens give away in a network of the same shape that learned nothing. *A redrawn
router* reads the trained model's own states with a gate at random: it shows how far apart the
states are, whoever looks. The last is the one that a claim about a router must beat: random
gates beat permuted labels by far.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_lab.analysis.information import Codes
from ernie_lab.model.initial import initialise as initialise_normal
from ernie_lab.model.kinds import Model, build
from ernie_lab.model.redraw import (
    Variant,
    chosen,
    gaussian_gate,
    matched_bias,
    max_violation,
    router_probs,
    thinned,
)
from ernie_lab.model.vl import VLModel, eye

Integers: TypeAlias = NDArray[np.int64]
Permuted: TypeAlias = Literal["documents", "tokens of a document", "tokens of equal given"]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Whom a router chose and how much each counts, `[n k]`; its MaxVio where it was fitted."""

    ids_NK: Integers
    weights_NK: NDArray[np.floating]
    max_violation: float = np.nan


def permuted(label_N: Codes, within_N: Codes, how: Permuted, rng: np.random.Generator) -> Codes:
    """Labels without meaning.

    `"documents"`: the label of each document (`within_N`) is given to another one, all its tokens
    with it. For labels that are constant in a document this is the only honest way: permuting
    tokens would pretend that a document's tokens are independent. Else labels are permuted
    among the tokens of equal `within_N`.
    """
    if how == "documents":
        documents, first, inverse = np.unique(within_N, return_index=True, return_inverse=True)
        labels = label_N[first]
        return np.asarray(labels[rng.permutation(len(documents))][inverse])
    order = np.lexsort((rng.random(len(label_N)), within_N))
    new_N = np.empty_like(label_N)
    new_N[np.argsort(within_N, kind="stable")] = label_N[order]
    return new_N


def constant_within(label_N: Codes, document_N: Codes) -> bool:
    """Has every document one label?"""
    pairs = np.unique(np.stack([document_N, label_N], axis=1), axis=0)
    return len(pairs) == len(np.unique(document_N))


def halves(label_N: Codes, document_N: Codes) -> NDArray[np.bool_]:
    """Tokens of every other document, `[n]`, documents of one label next to each other.

    So both halves have documents of every label that has two. A document's label is its commonest;
    -1 counts as one, so documents without labelled tokens are shared out too.
    """
    documents = np.unique(document_N)
    commonest = [np.bincount(label_N[document_N == d] + 1).argmax() for d in documents]
    order = np.lexsort((documents, commonest))
    return np.isin(document_N, documents[order[::2]])


def halves_by_lot(document_N: Codes, seed: int) -> NDArray[np.bool_]:
    """Tokens of half of the documents, `[n]`, drawn: every other one of texts that take turns by
    domain would be one domain's, and the other half another's."""
    documents = np.unique(document_N)
    drawn = np.random.default_rng(seed).permutation(documents)
    return np.isin(document_N, drawn[: -(-len(documents) // 2)])


def halves_of(
    label_N: Codes | None, names: Sequence[Any], document_N: Codes, seed: int
) -> NDArray[np.bool_]:
    """`halves` where there are labels, called `names`, and by lot where there are none.

    Warns of labels that are in one half alone: of them nothing is known in the other.
    """
    if label_N is None:
        return halves_by_lot(document_N, seed)
    mine_N = halves(label_N, document_N)
    there = [set(np.unique(label_N[half])) - {-1} for half in (mine_N, ~mine_N)]
    if lone := sorted(there[0] ^ there[1]):
        told = ", ".join(repr(str(names[code])) for code in lone[:5]) + (" …" if lone[5:] else "")
        warnings.warn(
            f"{len(lone)} of {len(names)} labels have documents in one half only ({told}): what "
            "is fitted or picked in one half is not of what the other has. Take two documents or "
            "more of each label",
            stacklevel=3,
        )
    return mine_N


def redrawn(
    learned_ED: Tensor,
    states_ND: Tensor,
    fitted_N: NDArray[np.bool_],
    k: int,
    target: float,
    seed: int,
    variant: Variant,
) -> Choice:
    """The choice of a Gaussian gate on these states, its bias fitted on the rows `fitted_N`.

    Its rows have the learned rows' norms, or equal variance of w . h (`variant`) on the fitted
    rows, and its bias gives the MaxVio `target` there, within 0.05.
    """
    fitted_FD = thinned(states_ND[torch.from_numpy(fitted_N)])
    weight_ED = gaussian_gate(learned_ED, seed, variant, fitted_FD)
    bias_E = matched_bias(router_probs(fitted_FD, weight_ED), k, target)
    return _choice(router_probs(states_ND, weight_ED), bias_E, fitted_N, k)


def balanced(probs_NE: Tensor, fitted_N: NDArray[np.bool_], k: int, target: float) -> Choice:
    """The choice by given probabilities (an untrained twin's), its bias fitted likewise."""
    bias_E = matched_bias(thinned(probs_NE[torch.from_numpy(fitted_N)]), k, target)
    return _choice(probs_NE, bias_E, fitted_N, k)


def _choice(probs_NE: Tensor, bias_E: Tensor, fitted_N: NDArray[np.bool_], k: int) -> Choice:
    ids_NK = chosen(probs_NE, bias_E, k)
    weights_NK = probs_NE.gather(-1, ids_NK)
    weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    worst = max_violation(ids_NK[torch.from_numpy(fitted_N)], len(bias_E))
    return Choice(ids_NK.numpy(), weights_NK.numpy(), worst)


class LabLike(Protocol):
    """A `Lab`, as far as a twin needs one."""

    @property
    def model(self) -> Model: ...
    @property
    def model_id(self) -> str: ...
    @property
    def report(self) -> Any: ...


AnyLab = TypeVar("AnyLab", bound=LabLike)


@torch.no_grad()
def untrained_twin(
    lab: AnyLab,
    seed: int = 0,
    *,
    std: float = 0.02,
    initialise: Callable[[Any, int, float], None] = initialise_normal,
) -> AnyLab:
    """A lab of the same config, tokenizer and preprocessing, its decoder untrained.

    `initialise(model, seed, std)` fills the weights: all normal with deviation `std`, biases zero,
    unless the training began otherwise. That of the built-in models is
    `ernie_lab.organisms.initial.initialise` with `std=0.06`: what writes to the residual stream
    starts smaller, embeddings larger. A twin that began otherwise than the training is another
    null; its name has the `std` ("tiny-text, untrained, std 0.02, seed 0").

    Of a vision-language model the tower and the resampler stay as they are: pictures enter the
    twin as they enter the model, and what differs is the decoder (the built-in models' eye was
    frozen while their decoder learned). A twin takes the memory of a second model.
    """
    weights = next(lab.model.parameters())
    model = build(lab.model.config)
    initialise(model, seed, std)
    if isinstance(model, VLModel):
        learned = dict(lab.model.named_parameters())
        for name, parameter in eye(model):
            parameter.copy_(learned[name])
    model = model.to(device=weights.device, dtype=weights.dtype).eval()
    name = f"{lab.model_id}, untrained, std {std:g}, seed {seed}"
    return dataclasses.replace(lab, model=model, model_id=name, report=None)  # type: ignore[type-var]
