"""What must hold of any forward pass with pictures, whatever the weights."""

from typing import Any

import pytest
import torch
from support.models import small_vl_config, small_vl_model
from support.taps import Collect, Replace, cheap
from support.vl_inputs import Inputs, Prompt, image, video
from torch import Tensor, nn
from torch.nn.functional import linear

from ernie_lab.interventions import EditTap, edit
from ernie_lab.model.banks import BankedMoE
from ernie_lab.model.cache import KVCache
from ernie_lab.model.vl import VLModel
from ernie_lab.sites import all_sites

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CONFIG = small_vl_config()
# Delimiters are 52 to 55; sequence 0 has 3 + 8 tokens, sequence 1 has 20.
MIXED: tuple[Prompt, ...] = (
    [5, 6, image(4, 4), 7, 8, 9],
    [3, image(2, 6), 4, video(4, 4, 4), 10, 11, 12],
)
BANKS = ("text", "vision")


@pytest.fixture(scope="module")
def model() -> VLModel:
    return small_vl_model()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.of(*MIXED, config=CONFIG)


@pytest.fixture(scope="module")
def single() -> Inputs:
    return Inputs.of(MIXED[0], config=CONFIG)


def run(model: VLModel, inputs: Inputs, tap: Any = None, **more: Any) -> Tensor:
    with torch.no_grad():
        out = model(**{**inputs.given(), **more}, **({} if tap is None else {"tap": tap}))
    return out.logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_two_equals_two_singles(model: VLModel, side: str) -> None:
    inputs, together = Inputs.of(*MIXED, config=CONFIG, side=side), Collect(cheap)
    logits = run(model, inputs, together)
    real_BS = inputs.mask_BS.bool()
    for i in range(2):
        alone = Collect(cheap)
        own = run(model, inputs.alone(i, CONFIG), alone)
        torch.testing.assert_close(logits[i][real_BS[i]], own[0], **CLOSE)
        in_row = torch.zeros_like(real_BS)
        in_row[i] = real_BS[i]
        for number, bank in enumerate(BANKS):
            mine_N = in_row[inputs.bank_BS == number]
            ids = f"blocks.1.moe.{bank}.expert_ids"
            assert torch.equal(together[ids][mine_N], alone[ids])


def test_padding_content_is_irrelevant(model: VLModel, inputs: Inputs) -> None:
    """Ordinary tokens, delimiters and placeholders alike: what is masked is not there."""
    real_BS, plain = inputs.mask_BS.bool(), run(model, inputs)
    for token in (17, CONFIG.ids.image_start, CONFIG.ids.image):
        ids_BS = inputs.ids_BS.masked_fill(~real_BS, token)
        other = run(model, inputs, input_ids=ids_BS)
        assert not other.isnan().any()
        torch.testing.assert_close(other[real_BS], plain[real_BS], **CLOSE)


def test_a_patch_reaches_its_own_image_alone(model: VLModel, inputs: Inputs) -> None:
    pixels = inputs.pixels["image"].clone()
    pixels[16 + 5] += 1.0
    before, after = Collect(cheap), Collect(cheap)
    run(model, inputs, before)
    run(model, inputs, after, pixel_values=pixels)
    differs_BS = (before["embed_in"] != after["embed_in"]).any(-1)
    expected_BS = torch.zeros_like(differs_BS)
    expected_BS[1, 2:5] = True
    assert torch.equal(differs_BS, expected_BS)
    assert torch.equal(before["embed"], after["embed"])
    # Later tokens of that sequence see it, earlier ones and the other sequence do not.
    last = "blocks.2.resid_post"
    moved_BS = (before[last] - after[last]).abs().amax(-1) > 1e-5
    assert moved_BS[1, 2:].all()
    assert not moved_BS[1, :2].any()
    assert not moved_BS[0].any()


def test_the_future_does_not_reach_the_past(model: VLModel, single: Inputs) -> None:
    changed = single.ids_BS.clone()
    changed[:, 9:] += 1
    before, after = run(model, single), run(model, single, input_ids=changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], **CLOSE)
    assert not torch.allclose(before[:, 9:], after[:, 9:], **CLOSE)


@pytest.mark.parametrize("pieces", [(1, 1, 1), (3,), (2, 1)])
def test_cached_decode_equals_full_forward(
    model: VLModel, inputs: Inputs, pieces: tuple[int, ...]
) -> None:
    """Token by token and chunk by chunk, with left padding, behind pictures."""
    cache, start = KVCache(3), inputs.ids_BS.shape[1] - 3
    prompt = {"input_ids": inputs.ids_BS[:, :start], "attention_mask": inputs.mask_BS[:, :start]}
    out = [run(model, inputs, past_key_values=cache, **prompt)]
    for piece in inputs.ids_BS[:, start:].split(pieces, dim=1):
        with torch.no_grad():
            mask_BT = inputs.mask_BS[:, : cache.length + piece.shape[1]]
            out.append(model(piece, mask_BT, past_key_values=cache).logits)
    full, real_BS = run(model, inputs), inputs.mask_BS.bool()
    torch.testing.assert_close(torch.cat(out, dim=1)[real_BS], full[real_BS], **CLOSE)


def test_decoding_goes_on_behind_a_long_clip(model: VLModel) -> None:
    """Where the largest position is in time, and where no text follows it."""
    for prompt in ([5, video(12, 4, 2, bare=True)], [5, video(12, 4, 2), 6], [image(2, 8)]):
        whole = Inputs.of([*prompt, 9, 10], config=CONFIG)
        start, cache = whole.ids_BS.shape[1] - 2, KVCache(3)
        begun = {"input_ids": whole.ids_BS[:, :start], "attention_mask": None}
        run(model, whole, past_key_values=cache, **begun)
        with torch.no_grad():
            rest = model(whole.ids_BS[:, start:], past_key_values=cache).logits
        torch.testing.assert_close(rest, run(model, whole)[:, start:], **CLOSE)


def test_recording_changes_nothing_bit_for_bit(inputs: Inputs) -> None:
    """Every site, on demand or not, in the tower too; and an idle tap is no tap."""
    for dtype in (torch.float32, torch.bfloat16):
        model = small_vl_model().to(dtype)
        plain = run(model, inputs)
        for wanted in (lambda site: True, cheap, lambda site: "expert" in site.path):
            assert torch.equal(run(model, inputs, Collect(wanted)), plain)


def test_an_identity_edit_changes_nothing(model: VLModel, single: Inputs) -> None:
    """A clone goes the explicit way; `EditTap` hands on the original, and no bit changes."""
    plain, sites = run(model, single), all_sites(model)
    # The explicit formula of the tower's attention rounds otherwise than the fused kernel, by
    # how much depends on the processor: 1e-5 of the largest logit, not of each.
    close = CLOSE | {"atol": 1e-5 * float(plain.abs().max())}
    for site in sites:
        out = run(model, single, Replace(site.path, torch.clone, Collect(cheap)))
        torch.testing.assert_close(out, plain, **close, msg=site.path)
    edits = EditTap.of([edit(site.path, lambda x: x * 1) for site in sites], sites)
    assert torch.equal(run(model, single, edits), plain)
    assert {(count.n_fired, count.n_changed) for count in edits.counts} == {(1, 0)}


def test_every_float_site_matters(model: VLModel, inputs: Inputs) -> None:
    """An edit that nothing downstream reads would be an edit that silently does nothing."""
    plain, generator = run(model, inputs), torch.Generator().manual_seed(3)

    def disturb(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=generator).to(x.dtype)

    for site in all_sites(model):
        if site.dtype != "int64":
            out = run(model, inputs, Replace(site.path, disturb, Collect(cheap)))
            assert (out - plain).abs().max() > 1e-3, site.path


def test_slots_and_shared_are_the_layer(model: VLModel, inputs: Inputs) -> None:
    tap = Collect()
    run(model, inputs, tap)
    for layer in CONFIG.text.moe.layers:
        at = f"blocks.{layer}.moe"
        routed_BSD = torch.zeros_like(tap[f"{at}.in"])
        for number, bank in enumerate(BANKS):
            weights_NK = tap[f"{at}.{bank}.expert_weights"]
            slots_NKD = tap[f"{at}.{bank}.expert_out"] * weights_NK[..., None]
            assert torch.equal(slots_NKD, tap[f"{at}.{bank}.slot_out"])
            out_ND = tap[f"{at}.{bank}.routed_out"]
            torch.testing.assert_close(slots_NKD.sum(1), out_ND, **CLOSE)
            torch.testing.assert_close(weights_NK.sum(1), torch.ones(len(weights_NK)))
            routed_BSD[tap[f"{at}.bank"] == number] = out_ND
        assert torch.equal(routed_BSD, tap[f"{at}.routed_out"])
        both = routed_BSD + tap[f"{at}.shared_out"]
        torch.testing.assert_close(both, tap[f"{at}.moe_out"], **CLOSE)


def test_residual_writes_add_up(model: VLModel, inputs: Inputs) -> None:
    tap, writes = Collect(), {"attn.attn_out", "mlp.mlp_out", "moe.moe_out"}
    run(model, inputs, tap)
    total = tap["embed_in"] + sum(x for site, x in tap.seen if site.quantity in writes)
    torch.testing.assert_close(total, tap["blocks.2.resid_post"], **CLOSE)


def by_hand(moe: BankedMoE, bank: str, x_ND: Tensor) -> Tensor:
    """The formula, one token and one expert at a time."""
    own = getattr(moe, bank)
    out_ND = torch.zeros_like(x_ND)
    for n, x_D in enumerate(x_ND):
        probs_E = (own.router.weight_ED @ x_D).softmax(-1)
        chosen = (probs_E + own.router.correction_bias_E).topk(2).indices
        for e in chosen:
            gate_FD, up_FD = own.experts.gate_up_E2FD[e]
            act_F = torch.nn.functional.silu(gate_FD @ x_D) * (up_FD @ x_D)
            weight = probs_E[e] / probs_E[chosen].sum()
            out_ND[n] += weight * (own.experts.down_EDF[e] @ act_F)
    return out_ND


@torch.no_grad()
def test_each_token_goes_to_its_bank(model: VLModel, inputs: Inputs) -> None:
    tap, real_BS = Collect(cheap), inputs.mask_BS.bool()
    run(model, inputs, tap)
    for number, bank in enumerate(BANKS):
        mine_BS = (inputs.bank_BS == number) & real_BS
        expected = by_hand(model.blocks[1].moe, bank, tap["blocks.1.moe.in"][mine_BS])
        torch.testing.assert_close(tap["blocks.1.moe.routed_out"][mine_BS], expected, **CLOSE)


@torch.no_grad()
def test_editing_the_bank_moves_tokens(model: VLModel, inputs: Inputs) -> None:
    """Vision tokens through the text bank, in one layer."""
    edit, moe = Replace("blocks.1.moe.bank", torch.zeros_like), model.blocks[1].moe
    run(model, inputs, edit)
    tap = edit.then
    vision_BS = inputs.bank_BS == 1
    expected = by_hand(moe, "text", tap["blocks.1.moe.in"][vision_BS])
    torch.testing.assert_close(tap["blocks.1.moe.routed_out"][vision_BS], expected, **CLOSE)
    assert len(tap["blocks.1.moe.vision.expert_ids"]) == 0
    # Only there: the next layer sorts them by its own assignment again.
    assert torch.equal(tap["blocks.2.moe.bank"], inputs.bank_BS)
    for wrong in (lambda bank: bank + 1, lambda bank: bank - 1):
        with pytest.raises(ValueError, match=r"blocks\.1\.moe\.bank was edited to"):
            run(model, inputs, Replace("blocks.1.moe.bank", wrong))


@pytest.mark.parametrize("bank", BANKS)
def test_edited_router_logits_reroute_their_bank(model: VLModel, inputs: Inputs, bank: str) -> None:
    base, edit = Collect(cheap), Replace(f"blocks.1.moe.{bank}.router_logits", torch.neg)
    plain, out = run(model, inputs, base), run(model, inputs, edit)
    for name in BANKS:
        at = f"blocks.1.moe.{name}.expert_ids"
        same = torch.equal(edit.then[at].sort().values, base[at].sort().values)
        assert same == (name != bank)
    assert (out - plain).abs().max() > 1e-3


@pytest.mark.parametrize("n_shared", [0, 2])
def test_every_site_fires_once_in_order_with_its_dims(n_shared: int, inputs: Inputs) -> None:
    text = small_vl_config().text
    moe = type(text.moe)(
        layers=text.moe.layers, router=text.moe.router, expert_hidden=16, n_shared=n_shared
    )
    fields = {name: getattr(text, name) for name in text.__slots__} | {"moe": moe}
    model, tap = small_vl_model(text=type(text)(**fields)), Collect()
    run(model, inputs, tap)
    assert [site for site, _ in tap.seen] == list(all_sites(model))
    n_vision = int(inputs.bank_BS.sum())
    b, s = inputs.ids_BS.shape
    sizes = {"b": b, "s": s, "t": s, "d": 32, "g": 2, "v": 61, "e": 8, "k": 2, "w": 24, "x": 96}
    sizes |= {"p": 16 + 12 + 64, "i": 6, "u": 16, "o": 23, "m": 4 + 3 + 8}
    for site, x in tap.seen:
        own = {"h": 2, "a": 12, "f": 40} if site.path.startswith("vision") else {"h": 4, "a": 8}
        # Within a frame, `p` are its own patches alone.
        own["p"] = 16 if "i" in site.dims else sizes["p"]
        own["n"] = n_vision if ".vision." in site.path else b * s - n_vision
        for part, f in ((".mlp.", 48), (".shared.", 32), (".text.", 16), (".vision.", 12)):
            if site.path.startswith("blocks") and part in site.path:
                own["f"] = f
        assert x.shape == tuple((sizes | own)[d] for d in site.dims.split()), site.path
        assert x.dtype == (torch.float32 if site.dtype == "model" else getattr(torch, site.dtype))


def test_which_sites_fire_without_pictures(model: VLModel, inputs: Inputs) -> None:
    """In a prompt of text, and in decoding: all but the tower's and the resampler's."""
    expected = [s for s in all_sites(model) if not s.path.startswith(("vision", "resampler"))]
    text, decode, cache = Collect(), Collect(), KVCache(3)
    run(model, Inputs.of([5, 6, 7], config=CONFIG), text)
    run(model, inputs, past_key_values=cache)
    mask_BT = torch.cat([inputs.mask_BS, torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(torch.tensor([[52], [50]]), mask_BT, past_key_values=cache, tap=decode)
    for tap in (text, decode):
        assert [site for site, _ in tap.seen] == expected
        assert len(tap["blocks.1.moe.vision.router_logits"]) == 0


def test_dtypes_in_bf16(inputs: Inputs) -> None:
    tap = Collect()
    run(small_vl_model().bfloat16(), inputs, tap)
    for site, x in tap.seen:
        wanted = torch.bfloat16 if site.dtype == "model" else getattr(torch, site.dtype)
        assert x.dtype == wanted, site.path


def state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that hangs on every module."""
    return {
        name: {key: value for key, value in vars(module).items() if key != "_modules"}
        for name, module in model.named_modules()
    }


def test_a_run_leaves_nothing_on_the_model(model: VLModel, inputs: Inputs) -> None:
    before = {name: {k: repr(v) for k, v in own.items()} for name, own in state(model).items()}
    cache = KVCache(3)
    run(model, inputs, Collect(), past_key_values=cache)
    with torch.no_grad():
        model(torch.tensor([[5], [6]]), past_key_values=cache)
    after = {name: {k: repr(v) for k, v in own.items()} for name, own in state(model).items()}
    assert before == after
    # And what one prompt leaves behind nothing else can find.
    text = Inputs.of([5, 6, 7], config=CONFIG)
    assert torch.equal(run(model, text), run(small_vl_model(), text))


def test_gradients_reach_pixels_and_both_banks(inputs: Inputs) -> None:
    model, given = small_vl_model(), inputs.given()
    for name in ("pixel_values", "pixel_values_videos"):
        given[name] = given[name].clone().requires_grad_()
    labels = inputs.ids_BS.masked_fill(inputs.bank_BS == 1, -100)
    tap = Collect()
    model(**given, labels=labels, tap=tap).loss.backward()
    for name in ("pixel_values", "pixel_values_videos"):
        assert given[name].grad.isfinite().all()
        assert given[name].grad.any(-1).all()
    for name, parameter in model.named_parameters():
        if not name.endswith("correction_bias_E"):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


class TestArguments:
    """What cannot be meant is refused, and said."""

    @pytest.mark.parametrize("number", [2, -1])
    def test_banks_that_do_not_exist(self, model: VLModel, single: Inputs, number: int) -> None:
        """Token types are 2 for clips in other code; such a token would go to no bank."""
        with pytest.raises(ValueError, match=r"expected 0 \(text\) and 1 \(vision"):
            run(model, single, bank=single.bank_BS * number)
        with pytest.raises(ValueError, match="one value for each token"):
            run(model, single, bank=single.bank_BS[:, :3])

    def test_positions_as_transformers_has_them(self, model: VLModel, single: Inputs) -> None:
        counted = torch.arange(single.ids_BS.shape[1])[None]
        plain = run(model, single, position_ids=counted)
        for axes in (counted.expand(3, 1, -1), counted[..., None].expand(-1, -1, 3)):
            assert torch.equal(run(model, single, position_ids=axes), plain)
        with pytest.raises(ValueError, match=r"expected \[b s\], \[b s 3\] or \[3 b s\]"):
            run(model, single, position_ids=counted[:, :4])
        three = Inputs.of(*[[5, 6, 7]] * 3, config=CONFIG)
        with pytest.raises(ValueError, match="run the sequences apart"):
            run(model, three, position_ids=torch.zeros(3, 3, 3, dtype=torch.long))

    def test_a_picture_in_a_later_chunk(self, model: VLModel, single: Inputs) -> None:
        cache, ids = KVCache(3), single.ids_BS
        with torch.no_grad():
            model(ids[:, :2], past_key_values=cache)
            with pytest.raises(ValueError, match="pass them with the input_ids"):
                run(model, single, input_ids=ids[:, 2:], past_key_values=cache)
            with pytest.raises(ValueError, match="4 placeholders of pictures came with a filled"):
                model(ids[:, 2:], past_key_values=cache)

    def test_embeddings_do_not_tell(self, model: VLModel) -> None:
        with pytest.raises(ValueError, match="pass bank="):
            model(inputs_embeds=torch.zeros(1, 3, 32))

    def test_cross_bank_by_argument_equals_by_edit(self, model: VLModel, single: Inputs) -> None:
        everywhere = run(model, single, bank=torch.zeros_like(single.bank_BS))
        sites = all_sites(model)
        edits = EditTap.of([edit("moe.bank", torch.zeros_like)], sites)
        assert torch.equal(run(model, single, edits), everywhere)
        assert (everywhere - run(model, single)).abs().max() > 1e-3


def test_router_logits_are_of_their_own_gate(model: VLModel, inputs: Inputs) -> None:
    tap = Collect(cheap)
    run(model, inputs, tap)
    for number, (bank, by_layer) in enumerate(model.routers().items()):
        for layer, router in by_layer.items():
            x_ND = tap[f"blocks.{layer}.moe.in"][tap[f"blocks.{layer}.moe.bank"] == number]
            logits = tap[f"blocks.{layer}.moe.{bank}.router_logits"]
            torch.testing.assert_close(linear(x_ND, router.weight_ED), logits, **CLOSE)
