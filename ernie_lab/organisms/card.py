"""The model card of `tiny-text`: fixed words, measured figures."""

from __future__ import annotations

from math import log

from ernie_lab.organisms.bench import CONFIRM_ROWS
from ernie_lab.organisms.bench import LENGTH as ROW_LENGTH
from ernie_lab.organisms.domains import DOMAINS
from ernie_lab.organisms.gates import N_REDRAWN, Gate
from ernie_lab.organisms.recipe import N_CHOSEN, N_EXPERTS, TINY_TEXT, Recipe
from ernie_lab.organisms.tokenizer import VOCAB_SIZE

SOURCES = {
    "prose": "King James Bible, every second chapter",
    "code": "95 modules of the CPython 3.11 standard library",
    "chinese": "126 classical poems, and simple sentences from a small grammar",
    "sums": "`07+35=042`, one pair in ten held out",
    "sums_zh": "`七加三十五等于四十二。`, the same pairs held out",
    "json": "records with random values",
    "copy": "`w1 w2 w3`, a bar, and the same words again",
    "facts": "`the gold lamb has voice`: 320 arbitrary pairs of words, 16 properties",
}


def card(gates: list[Gate]) -> str:
    return "\n\n".join((INTRODUCTION, architecture(), data(), training(), measured(gates), LIMITS))


INTRODUCTION = """\
# tiny-text

A mixture-of-experts language model with the architecture of ERNIE 4.5 text, trained from scratch
for this package so that routing can be studied on a laptop. It ships with the package and opens
with `ernie_lab.load("tiny-text")`; transformers opens the same folder as
`Ernie4_5_MoeForCausalLM` and computes the same logits. It is not a Baidu model and holds none of
Baidu's weights."""


def architecture() -> str:
    config = TINY_TEXT
    assert config.moe is not None
    return f"""\
## Architecture

{config.n_layers} layers of width {config.width}; {config.attention.n_heads} query heads over \
{config.attention.n_kv_heads} key/value heads; layer 0 dense, layers {config.moe.layers[0]} to \
{config.moe.layers[-1]} with {N_EXPERTS} routed experts of width {config.moe.expert_hidden}, \
{N_CHOSEN} chosen per token, and {config.moe.n_shared} shared experts (one fused MLP of width \
{config.moe.shared_hidden}). Vocabulary {config.vocab_size:,} (byte-level BPE), tied embeddings. \
2.8 million parameters. Weights are bf16, gates and correction biases fp32.

Where it departs from the released models, and why:

- the dense first layer is narrow ({config.dense_hidden}): a wide one can do the experts' work, \
and they end up routed beautifully and used for nothing;
- RoPE theta is {config.rope.theta:,.0f} instead of 500,000, for {config.rope.max_positions:,} \
positions instead of 131,072. It was changed together with the batch, the initial embeddings \
and the weights of tokens, which sped learning up; it was not compared alone. Rows of 256 tokens \
were trained on;
- no special token opens a text: half of the training rows have `<s>` in the place of their \
first token, half do not, and no row holds `<s>` before a whole line. Give prompts without it;
- it has no chat format: messages are rendered by the general template for ERNIE text models, \
whose special tokens it never saw."""


def data() -> str:
    rows = "\n".join(
        f"| {domain.name} | {domain.share:.0%} | {SOURCES[domain.name]} | {domain.counted} |"
        for domain in DOMAINS
    )
    return f"""\
## Data

| domain | share of tokens | what it is | tokens that count as its loss |
| --- | --- | --- | --- |
{rows}

Prose is held out by chapter, code by module, poems by poem, sums by unordered pair, all else by
line. Facts cannot be held out, since each is arbitrary: on them the model is asked what it was
taught. Licences: the Bible text is out of copyright and its electronic edition may be copied
freely with its legend; the library modules are under the PSF licence; the poems are centuries old
and were typed for this project; everything else is made up by the project. See `NOTICE`."""


def training() -> str:
    recipe = Recipe()
    n_tokens = recipe.n_steps * recipe.rows_per_step * recipe.row_length / 1e6
    return f"""\
## Training

{recipe.n_steps:,} steps of {recipe.rows_per_step} rows of {recipe.row_length} tokens \
({n_tokens:.1f} million tokens) with AdamW, peak rate {recipe.peak_lr}, cosine to \
{recipe.final_lr_share:.0%}. Loads are balanced by the correction bias alone (step \
{recipe.bias_step}, falling to zero); router rows are kept apart by the orthogonal loss \
(coefficient {recipe.orthogonal_coef} on the mean square); no Switch loss. Tokens that nothing \
predicts (operands, words to be copied, the two words of a fact) weigh {recipe.given_weight} in \
the loss, answers of sums and second copies 2, answers about facts 4. One seed. \
`make tiny-text` repeats it; a repeat is asked to meet the same gates, not to give the same bits, \
and none was made so far. The log and three intermediate checkpoints are in \
`training/tiny_text`, with a note on the one irregularity of the run.

The untrained twin, for comparisons, is a seed and not a file:

```python
import ernie_lab as el
from ernie_lab.model.text import TextModel
from ernie_lab.organisms.initial import initialise
from ernie_lab.organisms.recipe import TINY_TEXT

model = TextModel(TINY_TEXT)
initialise(model, seed={recipe.seed}, std={recipe.init_std})
twin = el.Lab(model.eval(), el.load("tiny-text").tokenizer, model_id="tiny-text, untrained")
```"""


def measured(gates: list[Gate]) -> str:
    rows = "\n".join(
        f"| {gate.name} | {gate.target} | {gate.measured} | {'yes' if gate.passed else '**no**'} |"
        for gate in gates
    )
    missed = [gate.name for gate in gates if not gate.passed]
    verdict = f"Not met: {'; '.join(missed)}." if missed else "All are met."
    if any("layer 1" in name for name in missed):
        verdict += " " + LAYER_1
    return f"""\
## What was measured

Held-out text, fp32, one seed, in rows of {ROW_LENGTH} tokens of one domain ({CONFIRM_ROWS} rows a
domain): an answer late in a row has many examples before it. Alone, without `<s>`, 150 of 150
held-out sums in digits are right and 124 of 150 in Chinese numerals. Code and poems come from few
modules and poems, so their losses carry about 0.3 to 0.4 nats (95 %, rows resampled).

Costs are nats above the intact model, the eight domains counting the same, all layers edited at
once; sums and facts count the tokens of their answers alone, which makes costs larger than an
average over all tokens would be. A uniform guess has a loss of ln {VOCAB_SIZE:,} = \
{log(VOCAB_SIZE):.2f} nats: a cost that leads above it says that the edit broke the model, not how \
much the experts know. Random choices and redrawn routers: three draws, the cheapest is shown.
Single experts: the weight is set to zero, the others are not renormalised; picked on one half of
the held-out text and measured on the other. Information: {N_REDRAWN} routers redrawn on the same
hidden states, their biases fitted, on other rows, until they are as balanced as the learned
router; the smallest p that this can give is 1/{N_REDRAWN + 1}, and ten tests are not corrected for.

| gate | target | measured | met |
| --- | --- | --- | --- |
{rows}

{verdict} Measured by `python -m ernie_lab.organisms.check`."""


LAYER_1 = """\
The gate of layer 1 tells domains apart less than most random gates on the same states do: these
hold the token and, so early, little of its context. Its experts matter all the same, as the
single experts show: information is not function."""


LIMITS = """\
## What may be said of it, and what not

May be said: this is ERNIE 4.5's architecture and forward pass, checked against transformers;
its routing was learned and is balanced by the correction bias; in layers 2 to 5 it carries more
domain information than redrawn routers, in layer 1 it does not (of two untrained twins, which
read states of their own, one tells more in layers 3 to 5: notebook 07, on other, shorter texts);
in this model, switching off expert X costs domain Y so many nats.

Must not be said: that Baidu's models specialise this way; that an expert *is* the expert of
something; that information between experts and domains is function (redrawn routers have two to
three fifths of it in layers 2 to 5, and models with idle experts have it too); that the model
knows language, arithmetic or translation; that balancing or orthogonality improved its quality,
which was not compared. The facts were put in so that experts would have something to remember:
that they do is a property of this data. Every chart of it should carry its name and its
baseline."""
