"""The device_map grammar and max_memory: which tier each experts module's rows rest in."""

from __future__ import annotations

import re

import pytest

from moe_offload.config.device_map import Spot, find_spots, parse_limits, refuse_absent, settle_tiers
from moe_offload.errors import BudgetError, ConfigError, UnsupportedModelError

NAMES = [f"model.layers.{i}.mlp.experts" for i in range(12)]
MODULES = ["", "lm_head", "model", "model.embed_tokens", "model.layers"]
MODULES += [name for i in range(12) for name in (f"model.layers.{i}", f"model.layers.{i}.mlp", NAMES[i])]


def placed(device_map, devices=()):
    return find_spots(NAMES, MODULES, device_map, devices)


def tiers(device_map, room_bytes=None):
    return [spot.tier for spot in settle_tiers(placed(device_map), [10] * len(NAMES), room_bytes)]


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


@pytest.mark.parametrize(
    ("value", "device"), [(0, "cuda:0"), ("1", "cuda:1"), ("cuda", "cuda:0"), ("mps", "mps:0"), ("xpu:1", "xpu:1")]
)
def test_an_accelerator_computes_and_its_rows_rest_where_auto_puts_them(value, device):
    found = placed({"": "cpu", "model.layers.3": value, "model.layers.4": value, "model.layers.4.mlp.experts": "disk"})
    assert [s.device for s in found] == ["cpu"] * 3 + [device] * 2 + ["cpu"] * 7
    assert [s.tier for s in found] == ["host"] * 3 + ["auto", "disk"] + ["host"] * 7
    with pytest.raises(UnsupportedModelError, match=f"{device}.*computes on cpu only"):
        refuse_absent((spot.device for spot in found), ["cpu"])
    refuse_absent((spot.device for spot in found), ["cpu", device.partition(":")[0]])


def test_auto_gives_each_accelerator_a_run_of_layers():
    assert [s.device for s in placed("auto", ["cuda:0"])] == ["cuda:0"] * 12
    assert [s.device for s in placed(None, ["cuda:0", "cuda:1"])] == ["cuda:0"] * 6 + ["cuda:1"] * 6
    assert [s.device for s in placed("disk", ["cuda:0"])] == ["cpu"] * 12, "a map says all there is to say"


def test_the_rule_that_decided_is_told():
    found = placed({"": "cpu", "model.layers.*.mlp.experts": "disk", "model.layers.7.mlp.experts": "cpu"})
    assert (
        found[0].rule == '"model.layers.*.mlp.experts": "disk"'
        and found[7].rule == '"model.layers.7.mlp.experts": "cpu"'
    )
    assert placed(None)[0].rule == "default" and placed("disk")[0].rule == "device_map 'disk'"
    assert placed({"lm_head": "cpu"})[0].rule == "no key of device_map"


@pytest.mark.parametrize(("room", "on_host"), [(None, 0), (-5, 0), (9, 0), (10, 1), (35, 3), (1000, 12)])
def test_auto_rests_first_layers_in_ram_as_far_as_there_is_room(room, on_host):
    assert tiers(None, room) == ["host"] * on_host + ["disk"] * (12 - on_host)


def test_what_a_map_sends_to_ram_comes_first_and_must_fit():
    assert on_host({"model.layers.5": "cpu"}) == [5]
    assert tiers({"model.layers.5": "cpu"}, 25) == ["host"] + ["disk"] * 4 + ["host"] + ["disk"] * 6
    with pytest.raises(BudgetError, match=r"120 B of experts to 'cpu'.*100 B"):
        tiers("cpu", 100)


def test_a_layer_whose_rows_all_have_slots_takes_no_ram():
    found = settle_tiers([Spot("cpu", "auto", "default")] * 2, [0, 10], 10)
    assert [spot.tier for spot in found] == ["disk", "host"] and "every row has a slot" in found[0].rule


@pytest.mark.parametrize("value", ["dsik", "CPU ", "", True, None, -1, 1.5])
def test_a_value_that_is_no_device_is_refused(value):
    with pytest.raises((ConfigError, UnsupportedModelError)):
        tiers({"": value})


@pytest.mark.parametrize("text", ["balanced", "sequential", "meta", ""])
def test_a_map_in_one_word_is_auto_or_a_tier(text):
    with pytest.raises(ConfigError, match="whole model"):
        tiers(text)


@pytest.mark.parametrize(
    ("max_memory", "found"),
    [
        (None, {}),
        ({}, {}),
        ({"cpu": "8GB"}, {"cpu": 8 * 10**9}),
        ({"cpu": "50%", "disk": "1TB"}, {"cpu": 500}),
        ({0: "8GiB", "cuda:1": 5, "cpu": 7}, {"cuda:0": 2**33, "cuda:1": 5, "cpu": 7}),
    ],
)
def test_limits_in_bytes(max_memory, found):
    assert parse_limits(max_memory, available=1000) == found


@pytest.mark.parametrize("device", ["cpu", "disk", 0])
@pytest.mark.parametrize("size", ["8 gigs", "", 0, -1, None, 1.5])
def test_max_memory_with_a_size_that_means_nothing_is_refused(device, size):
    with pytest.raises(ConfigError):
        parse_limits({device: size}, available=1000)


def test_a_share_of_a_device_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match="no total"):
        parse_limits({0: "80%"}, available=1000)
    with pytest.raises(ConfigError, match="'gpu'"):
        parse_limits({"gpu": "8GB"}, available=1000)
