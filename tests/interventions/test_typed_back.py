"""What an edit prints makes it again, and an argument that no function has is told of."""

import re
from typing import Any

import edit_cases as cases
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions.calling import TOKENS
from ernie_lab.interventions.where import Tokens

TEXT, PICTURES = cases.lab(), cases.vl_lab()
NAMES: dict[str, Any] = {
    **{name: getattr(el, name) for name in ("at", "edits", "experts", "routing", "shared")},
    "trace": TEXT.run("another Reference", keep=cases.TEXT_REFERENCE).trace,
    "generation": TEXT.generate("hello", max_new_tokens=2, keep="routing"),
    "pictures": PICTURES.run(**cases.VL_PROMPT, keep=cases.VL_REFERENCE).trace,
    "direction": torch.linspace(-1, 1, 32),
    "donor": cases.lab(5),
    "inf": float("inf"),
}
SEEN = int(NAMES["trace"].expert_ids.sel(layer=2).values[0, 0])
CALLS = [
    "edits.zero('attn.z', layers=1, heads=[0, 2])",
    "edits.zero(['attn.z', 'blocks.1.resid_mid'])",
    "edits.zero('moe.shared_out', layers=range(1, 6), phase='decode')",
    "edits.scale('blocks.*.resid_mid', 1.5, layers=[0, -1], positions=slice(3, None))",
    "edits.scale('moe.shared_out', inf)",
    "edits.mean('attn.z', trace, heads=1, where=['text', 'delimiter'])",
    "edits.mean('moe.shared_out', trace)",
    "edits.resample('blocks.1.resid_mid', trace, seed=3, steps=[0, 2])",
    "edits.patch('attn.z', trace, missing='keep', positions=range(9))",
    "edits.patch('moe.shared_out', trace)",
    "edits.add('blocks.1.resid_mid', direction, -2.0, sequence=1)",
    "edits.knockout('text', ['image', 'delimiter'], layers=[1, 2], heads=0, keep_self=False)",
    "edits.knockout(edits.tokens(positions=slice(-3, None, 2)), edits.tokens(phase='decode'))",
    "shared.zero(3)",
    "shared.zero()",
    "shared.scale(0.5, [1, 2], positions=[0, 4], phase='prefill')",
    "shared.scale(0)",
    "shared.mean(trace)",
    "shared.resample(trace, 1, 2)",
    "shared.swap(1, -1, norm_matched=True)",
    "shared.swap(1, 2, where='text')",
    "shared.transplant(donor, 1, norm_matched=True)",
    "shared.permute_neurons(3, layers=[1, 2])",
    "shared.random_direction(1, [2], per='layer')",
    "experts.off(5, 8)",
    "experts.off([5, -1], [8, 3], 'renormalise', bank='vision', where='image')",
    "experts.off(None)",
    "experts.off(1, [2, 3], 'next_best')",
    f"experts.off(2, {SEEN}, 'mean', trace=trace)",
    f"experts.off(2, {SEEN}, 'resample', trace=trace, seed=4, positions=-1)",
    "experts.swap(2, 5, 6, bank='text')",
    "routing.forbid(2, 5, bank='vision', phase='prefill')",
    "routing.forbid(None, range(2, 9))",
    "routing.force([1, 2], 3, 'displaced', bank='text')",
    "routing.force(None, [3, 1], 0.25)",
    "routing.steer(1, 3, 2.0, on='selection', positions=slice(None, 4))",
    "routing.steer(1, [3], -inf)",
    "routing.temperature(2, [1, 2])",
    "routing.uniform(2, layers=1)",
    "routing.cross_bank('vision', layers=[2], where='delimiter')",
    "routing.top_k(3, 1, bank='text')",
    "routing.without_correction_bias(1, bank='vision')",
    "routing.random(1, 2, keep_bias=True)",
    "routing.random(0, 1, trace=trace)",
    "routing.share_router('vision', 1)",
    "routing.replay(trace)",
    "routing.replay(pictures, bank='text', same_tokens=False)",
    "routing.freeze(trace, ids_only=True, layers=-1, missing='keep')",
    "at(at(shared.zero(1), phase='prefill'), positions=0, steps=0)",
    "at(at(shared.swap(1, 2), phase='prefill'), phase='decode')",
]
# No edits, or made for `el.compare`.
OTHERS = {"tokens", "patch_grid", "path_patch", "to_json", "from_json", "save", "load"}
PUBLIC = [
    f"{family}.{name}"
    for family in ("edits", "experts", "routing", "shared")
    for name in dir(getattr(el, family))
    if name not in OTHERS | {"off_each_way"}
]


@pytest.mark.parametrize("call", CALLS)
def test_an_edit_prints_the_call_that_makes_it(call: str) -> None:
    edit = eval(call, NAMES)
    held = re.search(r"\b(trace|pictures|direction|donor)\b(?!=)", call)
    said = re.sub(r"<[^<>]*>", held[1], repr(edit)) if held else repr(edit)
    again = eval(said, NAMES)
    assert again == edit, said
    assert repr(again) == repr(edit)


def test_every_function_is_among_the_calls() -> None:
    assert [name for name in PUBLIC if not any(f"{name}(" in call for call in CALLS)] == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("experts.off([5], ids=8)", "experts.off(5, 8)"),
        ("experts.off(1, 2, 'next_best')", "routing.forbid(1, 2)"),
        ("edits.zero('moe.shared_out', layers=[3])", "shared.zero(layers=3)"),
        ("shared.scale(2, 3, positions=1)", "at(shared.scale(2.0, layers=3), positions=1)"),
        ("edits.tokens('image')", "edits.tokens(where='image')"),
        ("routing.force(2, [0, 1, 2, 3])", "routing.force(2, range(0, 4))"),
    ],
)
def test_as_short_as_one_would_type_it(call: str, said: str) -> None:
    assert repr(eval(call, NAMES)) == said


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "shared.zero(layer=3)",
            r"shared\.zero\(\) has no argument 'layer', did you mean 'layers'",
        ),
        ("shared.zero(3, pos=2)", "'pos', did you mean 'positions'.* to narrow tokens: phase, "),
        ("experts.off(layers=5, ids=8)", r"experts\.off\(\).* 'layers', did you mean 'layer'"),
        ("experts.off(layer=5, expert=8)", "'expert', did you mean 'ids'"),
        ("routing.forbid(5, ids=8)", "'ids', did you mean 'experts'"),
        ("routing.freeze(trace, id_only=True)", r"routing\.freeze\(\).*did you mean 'ids_only'"),
        (
            "routing.replay(trace, colour=1)",
            r"replay\(\) has no argument 'colour'\. It takes trace",
        ),
        ("routing.top_k(3, phase='decode')", r"'phase'\. It takes k, layers, bank$"),
        ("at(shared.zero(), position=1)", r"^at\(\) has no argument 'position', did you mean"),
        ("edits.knockout('text', 'text', layer=1)", r"edits\.knockout\(\) .* 'layers'"),
    ],
)
def test_an_argument_that_is_not_there(call: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        eval(call, NAMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("shared.scale('x')", "by='x': expected a number"),
        ("edits.add('embed', direction, None)", "by=None: expected a number"),
        ("routing.steer(1, 2, True)", "by=True: expected a number"),
        ("routing.temperature('hot')", "t='hot': expected a number"),
        ("routing.force(1, 2, [0.5])", r"weight=\[0\.5\]: expected a number"),
        ("routing.uniform(0.5)", "seed=0.5: expected an integer"),
    ],
)
def test_a_number_is_asked_for_by_name(call: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        eval(call, NAMES)


def test_numbers_of_other_libraries() -> None:
    assert el.shared.scale(torch.tensor(0.5)) == el.shared.scale(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("routing.freeze('run1')", r"routing\.freeze .*takes a trace, not 'run1': pass run\.trace"),
        ("routing.freeze(generation)", r"not a Generation: pass its \.trace"),
    ],
)
def test_freeze_takes_a_trace(call: str, message: str) -> None:
    with pytest.raises(el.EditError, match=message):
        eval(call, NAMES)


@pytest.mark.parametrize(
    "name", [n for n in PUBLIC if n not in ("routing.top_k", "edits.knockout")]
)
def test_help_says_how_to_narrow(name: str) -> None:
    said = eval(name, NAMES).__doc__
    assert all(f"`{token}=`" in said for token in TOKENS)


def test_the_tokens_are_those_of_at() -> None:
    assert set(TOKENS) == set(Tokens.__annotations__)
