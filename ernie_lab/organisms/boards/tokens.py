"""The tokenizer of the glyph boards: byte-level BPE in which every word they use is one token.

Its special tokens carry the names of the released ones. `User:` and a new line with `Assistant:`
are single tokens, which makes a turn of a chat three tokens longer than its question and answer.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ernie_lab.organisms.boards.words import (
    COLOURS,
    DIGITS,
    DIRECTIONS,
    EMPTY,
    FIRSTS,
    NOTHING,
    SECONDS,
    SHAPES,
    SIDES,
    STILL,
)
from ernie_lab.organisms.lines import words
from ernie_lab.organisms.tokenizer import SPECIAL_TOKENS

# As many as it takes: no merge is left once every word is whole.
VOCAB_SIZE = 643
USER, ASSISTANT = "User:", "\nAssistant:"
# Digits one by one, words with the space before them, and the marks of a chat whole.
PIECES = Regex(r"\nAssistant:|User:|\n\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s")
ASKED = words(
    "Which has value Value of Difference and Shape What is the How many in row Describe moved "
    "first last Direction Picture Video"
)
_SIDES = words(" ".join(SIDES))
_ALL = (
    SHAPES,
    COLOURS,
    FIRSTS,
    SECONDS,
    DIGITS,
    DIRECTIONS,
    (NOTHING, EMPTY, STILL),
    ASKED,
    _SIDES,
)
WORDS = tuple(dict.fromkeys(word for group in _ALL for word in group))


def train_tokenizer() -> Tokenizer:
    """Merges are learned from the words alone, with and without a space, until each is whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*WORDS, *(f" {w}" for w in WORDS), USER, ASSISTANT, "\n\n"], trainer
    )
    require_single(tokenizer)
    return tokenizer


def require_single(tokenizer: Tokenizer) -> None:
    """Raises ValueError unless every word, bare and after a space, is one token."""
    pieces = [*WORDS, *(f" {word}" for word in WORDS), USER, ASSISTANT, *SPECIAL_TOKENS]
    split = [piece for piece in pieces if len(tokenizer.encode(piece).ids) != 1]
    if split:
        raise ValueError(f"{len(split)} words are several tokens, the first: {split[:5]}")


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a run, made and saved where there is none yet."""
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))
