"""The handle: what it says of itself."""

from __future__ import annotations

from moe_offload.observe.watched import Watched
from tests.fakes.offloaded import offloaded, say


def test_repr_is_one_line_with_model_slots_and_hit_rate():
    model = offloaded(layers=2)
    handle = model.moe_offload
    asked = {name for name in vars(Watched) if not name.startswith("_")}
    assert asked and asked <= set(dir(handle)), "what metrics and notebook ask for"
    slots, experts = sum(handle.plan.slots), sum(layer.experts for layer in handle.stats().layers)
    assert repr(handle) == f"<moe_offload: {handle.name}, {slots} slots for {experts} experts, nothing has run yet>"
    say(model, n=3)
    assert f"hit rate {handle.stats().hit_rate:.1%}>" in repr(handle) and handle.stats().hits
    handle.close()
    assert repr(handle).endswith(", closed>")
