"""Advice: said once, with its number, when decoding waits for want of hits; not said otherwise."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from moe_offload.cache.counters import Counters
from moe_offload.forward import advise
from moe_offload.forward.advise import ENOUGH, EVERY, Advisor, advise_at_start, suggest_remedy
from moe_offload.pack import pack_checkpoint
from moe_offload.plan.budget import Costs, LayerShape, budget_for, plan_slots
from tests.fakes.offloaded import IDS, SETTINGS, offloaded, say

LAYERS = [LayerShape(num_experts=64, least=4, row_bytes=10**6)] * 2
COSTS = Costs(dense_bytes=10**6, reserve_bytes=0)
GB = 10**9


def plan_at(share):
    return plan_slots(budget_for(share, LAYERS, COSTS), LAYERS, COSTS)


class Model:
    """The counters of a model of two layers, moved by hand."""

    def __init__(self, share=0.25):
        self.counters = [Counters(), Counters()]
        layers = [SimpleNamespace(counters=c, store=None) for c in self.counters]
        plan = plan_at(share)
        self.advisor = Advisor(SimpleNamespace(layers=layers, device_layers=(), slots=plan.slots), plan)

    def forward(self, tokens=1, *, hits=1, misses=3, stall_s=0.04, spent_s=0.1):
        """`stall_s` is that of both layers together."""
        self.advisor.begins(tokens == 1)
        for c in self.counters:
            c.tokens, c.hits, c.misses = c.tokens + tokens, c.hits + hits, c.misses + misses
            c.stall_s += stall_s / 2
        self.advisor.ended(tokens == 1, spent_s)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 * GB, total=1 * GB))
    with caplog.at_level(logging.WARNING, "moe_offload"):
        yield caplog


def test_waiting_for_misses_is_said_once_with_its_numbers(said):
    model = Model()
    for n in range(10 * ENOUGH):
        model.forward()
        assert bool(said.records) == (n >= ENOUGH), n  # the first forward does not count
    (record,) = said.records
    assert record.name == "moe_offload" and record.levelname == "WARNING"
    assert f"40 % of the time of {ENOUGH} tokens" in record.getMessage() and "25 % were in slots" in record.getMessage()
    assert "A budget of 129.00 MB holds all experts" in record.getMessage()


@pytest.mark.parametrize(
    "usual", [{"stall_s": 0.02}, {"hits": 3, "misses": 1}, {"hits": 0, "misses": 0}, {"tokens": 64}]
)
def test_where_it_is_not_the_misses_nothing_is_said(said, usual):
    model = Model()
    for _ in range(4 * ENOUGH):
        model.forward(**usual)
    assert not said.records


def test_prompts_do_not_count(said):
    """Each reply is short; prompts between them wait all the time, and so does the first token after each."""
    model = Model()
    for _ in range(4 * ENOUGH):
        model.forward(512, hits=0, misses=60, stall_s=9.0, spent_s=9.0)
        model.forward(hits=0, misses=4, stall_s=9.0, spent_s=9.0)
        for _ in range(3):
            model.forward(hits=3, misses=1, stall_s=0.0)
    assert not said.records
    for _ in range(20 * ENOUGH):
        model.forward(512, hits=60, misses=0, stall_s=0.0, spent_s=9.0)
        for _ in range(3):
            model.forward()
    assert len(said.records) == 1


def test_the_switch_of_transformers_silences_it(said, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    model = Model()
    for _ in range(2 * ENOUGH):
        model.forward()
    advise_at_start(plan_at(0), "1GB")
    assert not said.records


def test_the_counters_are_looked_at_now_and_then(monkeypatch):
    looks = []
    monkeypatch.setattr(Advisor, "_look", lambda self, decode: looks.append(decode))
    model = Model()
    for _ in range(4 * EVERY + 1):
        model.forward()
    assert [look.tokens for look in looks] == [EVERY, 2 * EVERY, 3 * EVERY, 4 * EVERY]


def test_the_knob_is_the_one_that_is_there(monkeypatch, tmp_path):
    def available(n):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=n, total=64 * GB))

    plan, whole = plan_at(0.25), SimpleNamespace(packed=True)
    available(1 * GB)
    assert "A budget of 129.00 MB holds all experts" in suggest_remedy(plan, [])
    available(40 * 10**6)
    assert "There is memory for a budget of 69.00 MB, with 53% of the experts" in suggest_remedy(plan, [])
    available(0)
    monkeypatch.setattr(advise, "DiskStore", SimpleNamespace)
    assert "moe-offload pack" in suggest_remedy(plan, [whole, SimpleNamespace(packed=False)])
    assert "a faster disk" in suggest_remedy(plan, [whole]) and "pack" not in suggest_remedy(plan, [whole])


def test_a_store_knows_whether_packing_would_help(tmp_path):
    import moe_offload
    from moe_offload.apps.families.tiny import build

    build("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    pack_checkpoint(tmp_path / "plain", tmp_path / "packed")
    for name, packed in (("plain", False), ("packed", True)):
        model = moe_offload.from_pretrained(tmp_path / name, budget="2MB", config=SETTINGS)
        assert model.moe_offload._runtime.layers[0].store.packed is packed
        model.moe_offload.close()
    spilled = offloaded()
    assert spilled.moe_offload._runtime.layers[0].store.packed
    spilled.moe_offload.close()


def test_a_budget_without_a_slot_to_spare_is_said_at_the_start(said):
    advise_at_start(plan_at(0), "9MB")
    (record,) = said.records
    assert "the least that works" in record.getMessage() and "12 % of the experts" in record.getMessage()
    advise_at_start(plan_at(0.25), "33MB")
    advise_at_start(plan_at(1), "1GB")
    all_used = [LayerShape(4, 4, 10**6)]  # every expert, every token
    advise_at_start(plan_slots(budget_for(0, all_used, COSTS), all_used, COSTS), "1GB")
    assert len(said.records) == 1


def test_what_auto_has_become_is_in_the_log(said):
    with said.at_level(logging.INFO, "moe_offload"):
        advise_at_start(plan_at(0.25), "33MB")
        assert not said.records
        advise_at_start(plan_at(0.25), None)
        advise_at_start(plan_at(0.25), "auto")
    assert [record.levelname for record in said.records] == ["INFO", "INFO"] and "33.00 MB" in said.text


def test_a_real_model_tells_its_advisor(said, monkeypatch):
    model = offloaded(layers=2)
    said.clear()
    monkeypatch.setattr(advise, "WAITING", 0.0)
    monkeypatch.setattr(advise, "HITTING", 1.01)
    monkeypatch.setattr(advise, "ENOUGH", 2 * EVERY)
    say(model, n=EVERY)
    assert not said.records
    say(model, n=2 * EVERY)
    say(model, n=2 * EVERY)
    (record,) = said.records
    assert "% of the time of" in record.getMessage() and "100 % were in slots" not in record.getMessage()
    want = model(IDS).logits
    assert want.isfinite().all()
    model.moe_offload.close()
