"""Routing from another engine: the same store as a recording of the same texts, or a refusal."""

import base64

import numpy as np
import pytest
import torch
from support.labs import small_lab, small_vl_lab

from ernie_lab.corpus import (
    CorpusError,
    RecordPlan,
    RoutedDocument,
    RoutingStore,
    decode_sglang,
    ingest_routed_experts,
)

TEXTS = [("the quick brown fox", "prose"), ("Jumps, over!", "shout"), ("a lazy dog", "prose")]


@pytest.fixture(scope="module")
def lab():
    return small_lab()


def routed(lab, layers="mixture", last=True, change=lambda ids: ids):
    """What an engine would return: chosen experts in any order, dense layers as zeros."""
    rng = np.random.default_rng(0)
    for text, domain in TEXTS:
        run = lab.run(text, keep="routing")
        ids = run.trace.expert_ids.transpose("token", "layer", "slot").values
        ids = rng.permuted(ids, axis=-1)
        if layers == "all":
            every = np.zeros((len(ids), lab.config.n_layers, ids.shape[2]), np.int16)
            every[:, list(run.trace.layers)] = ids
            ids = every
        tokens = run.trace.expert_ids["id"].values.tolist()
        yield RoutedDocument(change(ids if last else ids[:-1]), tokens, domain)


def ingested(lab, folder, documents=None, **changed):
    given = routed(lab) if documents is None else documents
    settings = {"model": lab, "backend": "vllm 0.21, triton", "unit_tokens": 20}
    return ingest_routed_experts(given, folder, **settings | changed)


@pytest.mark.parametrize("layers", ["mixture", "all"])
def test_the_counts_of_a_recording(lab, tmp_path, layers) -> None:
    store = ingested(lab, tmp_path / "in", routed(lab, layers))
    corpus = [{"text": text, "domain": domain} for text, domain in TEXTS]
    plan = RecordPlan(model=lab, corpus=corpus, folder=tmp_path / "rec", rows="ids")
    recorded = plan.run(progress=False)
    for name in ("tokens", "counts", "content_counts", "coactivation"):
        assert torch.equal(store.statistics().sums[name], recorded.statistics().sums[name]), name
    ours, theirs = (s.sample(10**6).expert_ids.sortby("sequence") for s in (store, recorded))
    assert (np.sort(ours.values) == np.sort(theirs.values)).all()
    assert store.plan["ingested"] == "vllm 0.21, triton" and "expert ids alone" in repr(store)
    assert (store.reference == 1).all().all() and store.reference.attrs["n_documents"] == 3
    again = ingested(lab, tmp_path / "in", routed(lab, layers))
    assert torch.equal(again.statistics().sums["counts"], store.statistics().sums["counts"])


def test_what_is_absent_is_refused(lab, tmp_path) -> None:
    store = ingested(lab, tmp_path, model=lab.config, model_id="small")
    for ask in (store.router_probs, lambda: store.histogram("margin"), store.transitions):
        with pytest.raises(CorpusError, match=r"is not known: vllm 0\.21, triton told expert ids"):
            ask()
    with pytest.raises(CorpusError, match="weights were not recorded"):
        store.search(1, 2, min_weight=0.1)
    with pytest.raises(CorpusError, match="was not compared"):
        _ = store.reference


def test_the_last_token_may_be_missing(lab, tmp_path) -> None:
    store = ingested(lab, tmp_path, routed(lab, last=False))
    assert store.statistics().n_tokens == sum(len(text) - 1 for text, _ in TEXTS)


def changed(place, value):
    def change(ids):
        ids = ids.copy()
        ids[place] = value
        return ids

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ids: ids[:-2], "document 0: 17 routed tokens for 19 token ids"),
        (lambda ids: ids * 0, "all ids are zero: kernels that route internally"),
        (changed((3, 1, 0), 8), r"ids from 0 to 8, expected 0\.\.7"),
        (changed((3, 1, 0), -1), "ids from -1 to"),
        (changed((3, 1), 5), r"token 3 has an expert twice in layer 2: \[5, 5\] \(1 such"),
        (lambda ids: ids[:, :, :1], r"shape \(19, 2, 1\).*\[token layer 2\]"),
        (lambda ids: ids.astype(float), "type float64, expected whole numbers"),
        (lambda ids: ids[:, :1], "1 layers, expected the 2 mixture layers or all 3"),
        (lambda ids: np.concatenate([ids, ids[:, :1]], 1), r"dense layers \[0\] have ids"),
    ],
)
def test_gates(lab, tmp_path, change, said) -> None:
    with pytest.raises(CorpusError, match=said):
        ingested(lab, tmp_path, routed(lab, change=change))
    assert RoutingStore(tmp_path).status().empty


def test_other_experts_are_not_this_model_s(lab, tmp_path) -> None:
    def shifted(ids):
        return ids[:, ::-1]

    with pytest.raises(CorpusError, match=r"not those of this model.*least_agreement=0\.9"):
        ingested(lab, tmp_path, routed(lab, change=shifted))
    store = ingested(lab, tmp_path, routed(lab, change=shifted), layers=[2, 1])
    assert (store.reference == 1).all().all(), "layers= says which they are"


def test_what_cannot_be_ingested(lab, tmp_path) -> None:
    with pytest.raises(ValueError, match="backend='' must name the engine"):
        ingested(lab, tmp_path, backend="")
    with pytest.raises(ValueError, match="model_id= must name"):
        ingested(lab, tmp_path, model=lab.config)
    with pytest.raises(ValueError, match=r"the mixture layers are \[1, 2\]"):
        ingested(lab, tmp_path, layers=[0, 1])
    with pytest.raises(CorpusError, match="no document was given"):
        ingested(lab, tmp_path, [])
    with pytest.raises(CorpusError, match="two banks of experts"):
        ingested(small_vl_lab(), tmp_path)


def test_sglang(lab) -> None:
    ids = np.arange(24, dtype="<i4").reshape(4, 3, 2)
    data = base64.b64encode(ids.tobytes()).decode()
    assert (decode_sglang(data, 3, 2) == ids).all()
    with pytest.raises(CorpusError, match="24 ids are no whole number of tokens"):
        decode_sglang(data, 5, 2)
