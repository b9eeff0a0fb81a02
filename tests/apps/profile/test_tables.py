"""What a replay says of a profile is what `optimize` would do with it."""

from __future__ import annotations

from moe_offload.apps.profile.tables import start_from
from moe_offload.cache import POLICIES
from moe_offload.cache.layer_cache import LayerCache
from tests.fakes.offloaded import SETTINGS, offloaded, say


def test_a_replay_starts_as_an_optimised_model_does():
    first = offloaded(layers=2, residency=0.5)
    say(first)
    profile = first.moe_offload.profile()
    first.moe_offload.close()
    model = offloaded(layers=2, residency=0.5, profile=profile)
    slots = model.moe_offload.plan.slots
    for layer in model.moe_offload._runtime.layers:
        experts = layer.moe.num_experts
        cache = LayerCache(experts, layer.cache.slots, POLICIES[SETTINGS.policy](experts, SETTINGS.half_life))
        start_from(cache, profile, layer.moe.index, slots)
        assert cache.expert_at == layer.cache.expert_at and any(e >= 0 for e in cache.expert_at)
        everybody = range(experts)
        assert cache.policy.victims(everybody, experts) == layer.cache.policy.victims(everybody, experts)
    model.moe_offload.close()
