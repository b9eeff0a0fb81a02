"""The device_map grammar and max_memory: which tier each experts module's rows rest in."""

from __future__ import annotations

import re

import pytest

from moe_offload.errors import ConfigError, UnsupportedModelError
from moe_offload.placement import budget_from, place

NAMES = [f"model.layers.{i}.mlp.experts" for i in range(12)]
MODULES = ["", "lm_head", "model", "model.embed_tokens", "model.layers"]
MODULES += [name for i in range(12) for name in (f"model.layers.{i}", f"model.layers.{i}.mlp", NAMES[i])]


def tiers(device_map):
    return place(NAMES, MODULES, device_map)


def on_host(device_map):
    """The layers whose rows rest in RAM."""
    found = tiers(device_map)
    assert set(found) <= {"disk", "host"} and len(found) == len(NAMES)
    return [i for i, tier in enumerate(found) if tier == "host"]


ALL = list(range(12))


@pytest.mark.parametrize(
    ("device_map", "layers"),
    [
        (None, []),
        ("auto", []),
        ("disk", []),
        ("cpu", ALL),
        ({}, []),
        ({"": "cpu"}, ALL),
        ({"": "auto"}, []),
        ({"model": "cpu"}, ALL),
        ({"lm_head": "cpu"}, []),  # dense: says nothing of experts
        ({"model.layers.3": "cpu"}, [3]),
        ({"model.layers.1": "cpu"}, [1]),  # and not 10 and 11, which begin like it
        ({NAMES[2]: "cpu", NAMES[11]: "cpu"}, [2, 11]),
    ],
)
def test_a_key_covers_all_that_is_inside(device_map, layers):
    assert on_host(device_map) == layers


@pytest.mark.parametrize("flip", [False, True], ids=["in order", "reversed"])
@pytest.mark.parametrize(
    ("device_map", "layers"),
    [
        ({"": "cpu", "model.layers.3": "disk"}, [i for i in ALL if i != 3]),
        ({"model": "disk", "model.layers.3": "cpu", "model.layers.3.mlp.experts": "disk"}, []),
        ({"": "disk", "model.layers": "cpu", "model.layers.4.mlp": "disk"}, [i for i in ALL if i != 4]),
        ({"": "cpu", "model.layers.*.mlp.experts": "disk"}, []),
        ({"": "cpu", "model.layers.1?": "disk"}, list(range(10))),
        ({"model.layers.10": "cpu", "model.layers.*.mlp.experts": "disk"}, []),  # the deeper key wins
        ({"*": "cpu", "model.layers.[0-4]": "disk"}, [5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_the_longest_key_wins_in_any_order(device_map, layers, flip):
    assert on_host(dict(reversed(device_map.items())) if flip else device_map) == layers


def test_a_name_wins_over_a_pattern_of_the_same_length():
    assert on_host({"model.layers.*.mlp.experts": "disk", "model.layers.3.mlp.experts": "cpu"}) == [3]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("model.layers.*", ALL),
        ("model.layers.?", list(range(10))),
        ("*.layers.1*.mlp.experts", [1, 10, 11]),
        ("model.layers.*.experts", None),  # a star stays within one name
        ("Model.layers.3", None),  # letter case counts
        ("model.layers.[!0-9]*", None),
        ("model.layers.12", None),
        ("model.layers.3.mlp.experts.0", None),
        ("layers.3", None),
    ],
)
def test_patterns(pattern, layers):
    if layers is None:
        with pytest.raises(ConfigError, match=f"key {re.escape(repr(pattern))} names no module.*{re.escape(NAMES[0])}"):
            tiers({"": "cpu", pattern: "cpu"})
    else:
        assert on_host({pattern: "cpu"}) == layers


@pytest.mark.parametrize("value", [0, "0", "cuda", "cuda:0", "mps", "xpu:1", "npu"])
@pytest.mark.parametrize("key", ["", "model.layers.3", "lm_head"])
def test_other_devices_are_refused_by_name(key, value):
    with pytest.raises(UnsupportedModelError, match=f"{key or 'the whole model'}.*{value}.*CPU"):
        tiers({"model": "disk", key: value})


@pytest.mark.parametrize("value", ["dsik", "CPU ", "", True, None, -1, 1.5])
def test_a_value_that_is_no_device_is_refused(value):
    with pytest.raises((ConfigError, UnsupportedModelError)):
        tiers({"": value})


@pytest.mark.parametrize("text", ["balanced", "sequential", "meta", ""])
def test_a_map_in_one_word_is_auto_or_a_tier(text):
    with pytest.raises(ConfigError, match="whole model"):
        tiers(text)


@pytest.mark.parametrize(
    ("max_memory", "budget"),
    [
        (None, None),
        ({}, None),
        ({"cpu": "8GB"}, "8GB"),
        ({"cpu": 10**9, "disk": "1TB"}, 10**9),
        ({"disk": "1TB"}, None),
    ],
)
def test_max_memory_gives_the_budget_of_the_device_we_compute_on(max_memory, budget):
    assert budget_from(max_memory) == budget


@pytest.mark.parametrize("device", [0, "cuda:0", "mps"])
def test_max_memory_of_another_device_is_refused(device):
    with pytest.raises(UnsupportedModelError, match=f"device {device!r}"):
        budget_from({"cpu": "8GB", device: "8GB"})


@pytest.mark.parametrize("device", ["cpu", "disk", 0])
@pytest.mark.parametrize("size", ["8 gigs", "", 0, -1, None, 1.5])
def test_max_memory_with_a_size_that_means_nothing_is_refused(device, size):
    with pytest.raises(ConfigError):
        budget_from({device: size})
