"""A trace as large as of a released model: 28 layers, the first dense, 64 experts, 2,000 tokens."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
from plots.cases import Ledger


class LargeTrace:
    banks, media, n_experts, n_chosen = ("text",), (), 64, 6
    provenance = SimpleNamespace(model="28 layers, random")

    def __init__(self, n_tokens: int = 2000) -> None:
        words = np.array([" the", " of", " and", " to", " in", " he", " a", " that"], object)
        texts = words[np.random.default_rng(0).integers(0, len(words), n_tokens)]
        self.tokens = pd.DataFrame({
            "sequence": 0, "pos": range(n_tokens), "text": texts, "phase": "prefill",
            "content": "text",
        })  # fmt: skip
        self.ledger = Ledger(self.tokens, list(range(1, 28)), self.n_experts, self.n_chosen, 0)

    def routing(self, bank=None):
        return self.ledger

    def pattern(self, layer, sequence=None):
        raise NotImplementedError
