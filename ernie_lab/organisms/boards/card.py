"""The model cards of `tiny-vl` and `tiny-vl-idle`: fixed words, measured figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ernie_lab.checkpoint.config import VLConfig
from ernie_lab.organisms.boards.bench import N_CHATS, N_CLIP_ROWS, N_ROWS
from ernie_lab.organisms.boards.gates import N_REDRAWN
from ernie_lab.organisms.boards.recipe import WIDE, EyeRecipe, Recipe
from ernie_lab.organisms.gates import Gate


def card(gates: Sequence[Gate], config: VLConfig, others: Mapping[str, Sequence[Gate]]) -> str:
    """`others` are the gates of further runs, by name."""
    idle = config.text.dense_hidden == WIDE
    return "\n\n".join(
        (
            introduction(idle),
            architecture(config, idle),
            DATA,
            training(),
            *([IDLING] if idle else []),
            USE,
            measured(gates, idle),
            *([seeds(gates, others)] if others else []),
            limits(idle),
        )
    )


def introduction(idle: bool) -> str:
    name = "tiny-vl-idle" if idle else "tiny-vl"
    role = (
        "It is the idle twin of `tiny-vl`: the same data and eye, a wide dense first layer, a last "
        "stage of training that makes its vision experts dispensable, and routing that looks just "
        "as learned. It ships so that nobody takes routing for function."
        if idle
        else "Its vision experts do causal work, which is measured below; its twin `tiny-vl-idle` "
        "answers as well and its vision experts idle."
    )
    return f"""\
# {name}

A vision-language mixture-of-experts model with the architecture of ERNIE 4.5 VL, trained from
scratch for this package: it looks at boards of glyphs and at clips of four frames, and answers
questions about them. {role}

It opens with `ernie_lab.load("{name}")`; transformers opens the same folder as
`Ernie4_5_VLMoeForConditionalGeneration` and computes the same logits. It is not a Baidu model and
holds none of Baidu's weights."""


def architecture(config: VLConfig, idle: bool) -> str:
    text, vision = config.text, config.vision
    assert text.moe is not None
    router = text.moe.router
    width = (
        f"the dense first layer is wide ({text.dense_hidden}): it can store the facts "
        "itself. The last stage of training sees to it that it does"
        if idle
        else f"the dense first layer is narrow ({text.dense_hidden}): a wide one can do the work "
        "of the experts, as it was made to in the twin"
    )
    return f"""\
## Architecture

{text.n_layers} layers of width {text.width}; {text.attention.n_heads} query heads over \
{text.attention.n_kv_heads} key/value heads; layer 0 dense, layers {text.moe.layers[0]} to \
{text.moe.layers[-1]} with two banks of {router.n_experts} experts, {router.n_chosen} chosen per \
token: text experts of width {text.moe.expert_hidden}, vision experts of width \
{config.vision_expert_hidden}. {text.moe.n_shared} shared expert of width \
{text.moe.shared_hidden} for all tokens. Tower: {vision.depth} layers of width {vision.width}, \
patches of {vision.patch_size}; a picture of 112 x 112 pixels makes 16 tokens, a clip of four \
frames 32. 3-D rotary positions, sections {text.rope.sections}. Vocabulary {text.vocab_size} \
(byte-level BPE, tied): every colour, shape, digit and question word is one token. Weights are \
bf16, gates and correction biases fp32.

Where it departs from the released models, and why:

- {width};
- **the vision experts of the last layer do nothing**, in this model as in any whose answers are
  read at text tokens: no later layer reads what they write, so no gradient reaches them. Their
  routing is what initialisation left, shaped by the balancing rule alone. Leave layer \
{text.moe.layers[-1]} out of every claim about vision experts;
- any square picture is resized to 112 x 112 (the limits of the area allow no other size). One of
  another aspect keeps it and is unlike anything seen in training."""


DATA = """\
## Data

All of it is made up when training starts, from fixed seeds. A board has 4 x 4 cells of 28 pixels,
10 to 16 of them with one of 16 glyphs in one of 16 colours, no colour twice; the background is
shaded, pixels are noisy. A clip has four frames in which two glyphs move one cell each, at
different times; half of the clips carry the time on every frame, as the released preprocessing
draws it.

The facts: every pair of a shape and a colour has a value from 0 to 9 by an arbitrary balanced
table (256), and so has every pair of a first and a second word (256). They were drawn after the
eye was trained and frozen, so that only the decoder can know them.

| kind | question | answer |
| --- | --- | --- |
| find | `Which has value 7?` | colour of the only such glyph |
| value | `Value of red?` | value of the red glyph |
| difference | `Difference of red and blue?` | absolute difference of two glyphs' values |
| fact | `Value of good head?` | value of a pair of words; never looks at the board |
| mixed | `Difference of red and good head?` | absolute difference of a glyph and a pair |
| name | `Shape of red?` | shape; needs no fact |
| side | `What is left of the red cross?` (`right of`, `above`, `below`) | `blue moon`, `nothing` |
| count | `How many in row 2?` | how many glyphs |
| caption | `Describe row 2.` | `red cross, empty, blue moon, gold flag` |
| order | `What moved first?`, `What moved last?` (clips) | `red cross` |
| direction | `Direction of red?` (clips) | `left`, `right`, `up`, `down`, `still` |

Shapes: cross, block, heart, house, moon, stairs, flag, ladder, kite, wave, net, beam, hook, bird,
table, lamp. Colours: red, green, blue, yellow, purple, white, orange, pink, brown, gray, cyan,
lime, navy, gold, teal, rose. `ernie_lab.organisms.boards.samples` has boards and a clip with
their ground truth, and both tables of facts.

Held out: an eighth of all unordered pairs of facts never meet in a `difference` or `mixed` question
in training, and the figures below are of those pairs alone, on boards never seen. Single facts
cannot be held out, since each is arbitrary."""


def training() -> str:
    recipe, eye = Recipe(), EyeRecipe()
    return f"""\
## Training

Stage 1, {eye.n_steps:,} steps: tower and resampler learn to name shape and colour of every cell, in
both frames of a pair, and its row and column, by throw-away linear heads. Then they are frozen for
good, and their output is scaled by {eye.feature_gain}. One eye serves all seeds and the twin.

Stage 2, {recipe.n_steps:,} steps of {recipe.rows_per_step} rows of up to {recipe.row_length} \
tokens with AdamW, peak rate {recipe.peak_lr}, cosine to {recipe.final_lr_share:.0%}. A row is a \
chat in the released format with several turns about one picture ({recipe.clip_share:.0%} of rows: \
a clip; {recipe.blind_share:.0%}: no picture, word facts alone). Only answers count. Loads are \
balanced by the correction bias alone (steps {recipe.text_bias_step} for text, \
{recipe.vision_bias_step} for vision, falling to zero); gates are kept apart by the orthogonal loss.

Scaffolding: for the first {recipe.scaffold_share:.0%} of the steps throw-away linear heads, with \
a weight falling from {recipe.scaffold_coef} to zero, read what a token should know by then. After \
layer 1: at a glyph its value, at a clip's token what changed in its cell. After layer 2: at a \
picture's token its cell, at a colour word the cell of its glyph, at a word that names a fact its \
value, and, where a question is complete, the cell to be read or the answer. After layer 3: any \
other answer. They say *what* the stream should hold, not which expert is to hold it. They are for \
speed, and they are strong: a trial on this layout with the first head alone did not learn \
differences in 1,500 steps, and trials without the heads for cells did not learn places in 1,200."""


IDLING = """\
The twin's stage 3, 500 steps at half the rate: the vision experts of all layers are silent in 60 %
of the rows. A wide first layer alone was not enough: after stage 2 switching the vision experts off
still cost 41 points, so the twin is idle *by training*, not by its layout."""


USE = """\
## Use

```python
import ernie_lab as el
from ernie_lab.organisms.boards import samples

lab = el.load("tiny-vl")
board = samples.boards()[0]
lab.generate("What is left of the red cross?", images=[board.picture], max_new_tokens=8).text
```

A string with a picture is sent as one user message, the picture first: the format it was trained
on. It knows the questions above, in these very words, and nothing else. Greedy by default; an
answer ends with `<|end_of_sentence|>`."""


def measured(gates: Sequence[Gate], idle: bool) -> str:
    asked = [gate for gate in gates if gate.target != "reported"]
    reported = [gate for gate in gates if gate.target == "reported"]
    rows = "\n".join(
        f"| {gate.name} | {gate.target} | {gate.measured} | {'yes' if gate.passed else '**no**'} |"
        for gate in asked
    )
    beside = "\n".join(f"| {gate.name} | {gate.measured} |" for gate in reported)
    missed = [gate.name for gate in asked if not gate.passed]
    verdict = f"Not met: {'; '.join(missed)}." if missed else "All are met."
    if not idle and any("order" in name for name in missed):
        verdict += " " + ORDER
    direction = (
        "For this twin the gates on vision experts are the other way round: they must cost little."
        if idle
        else "`name` (no fact) and `fact` (no board) are the controls inside every cost."
    )
    return f"""\
## What was measured

The shipped file in fp32, on unseen boards and held-out pairs ({N_ROWS} rows of many turns; \
{N_CLIP_ROWS} clips; {N_CHATS} chats of a single question for each kind, scored in one pass, which \
equals greedy generation). An answer is right if all of its tokens are, its end included.

Costs are points of exact match below the intact model, all layers edited at once unless one is \
named, the nine kinds on boards counting the same; in brackets each kind. {direction} Chance is \
about 10 to 20 % for a digit and 6 % for a colour or a shape. Zero: the bank's output is zero. \
Mean: it is replaced by its mean in that layer over other rows. Random choice: three draws, the \
cheapest is shown. Single experts: picked by routing on one half of the boards, silenced on the \
other. Information: {N_REDRAWN} routers redrawn on the same hidden states of glyphs, their biases \
fitted on other boards until they are as balanced as the learned router.

| gate | target | measured | met |
| --- | --- | --- | --- |
{rows}

{verdict}

Reported beside them, without a gate:

| measured | figures |
| --- | --- |
{beside}"""


ORDER = """\
What resists is a move between the two pairs of frames, which no token sees by itself: of 217 order
questions, all 146 about a move within a pair are right, and 33 of 71 about one between the pairs.
Neither 325 more steps with half of the rows on clips nor 500 more of the same rows helped."""


def seeds(gates: Sequence[Gate], others: Mapping[str, Sequence[Gate]]) -> str:
    names = [gate.name for gate in gates if gate.target != "reported"]
    by_run = {"shipped": gates, **others}
    found = {run: {gate.name: gate for gate in run_gates} for run, run_gates in by_run.items()}
    head = "| gate | " + " | ".join(by_run) + " |\n| --- |" + " --- |" * len(by_run)
    lines = []
    for name in names:
        cells = []
        for run in by_run:
            gate = found[run].get(name)
            figure = "" if gate is None else gate.measured.split(" (")[0].split(". ")[0]
            cells.append(figure if gate is None or gate.passed else f"**{figure}**")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "## Other seeds",
            "",
            "The same recipe with other seeds of stage 2; bold where a gate is not met. The",
            "shipped one was chosen by the gates. Seed 2 and the repeats of seeds 0 and 1 come",
            "from one run of `make tiny-vl` on another processor, eye included, which gives other",
            "bits. In all five runs every gate of what experts do and tell holds, and `order` does",
            "not; `side` was not learned in two of them. A repeat of the same seed differs by as",
            "much as another seed.",
            "",
            head,
            *lines,
        ]
    )


def limits(idle: bool) -> str:
    if idle:
        return """\
## What may be said of it, and what not

May be said: a router can be balanced, carry more information about facts than redrawn routers do,
and choose among experts that hardly matter. Must not be said: that idle experts are the rule in
released models, or the exception; nothing here measures those."""
    return """\
## What may be said of it, and what not

May be said: this is ERNIE 4.5 VL's architecture and forward pass; in this model, with this data,
vision experts hold facts about glyphs, and the router's choice is needed to reach them; switching
off this expert costs those facts so many points.

Must not be said: that released ERNIE models store facts this way: the task was built so that they
must, the first layer was made too narrow to, the eye was frozen before the facts were drawn, and
throw-away heads told the stream what to know. Nor that information between experts and facts is
function: the twin has it, too. Switching a whole bank off also disturbs what later layers expect:
captions need no fact and pay for the vision experts, names need none and pay for the text experts,
so read no cost without these beside it. The size of a layer's output
is no measure of its importance. Every chart of it should carry its name and its baseline."""
