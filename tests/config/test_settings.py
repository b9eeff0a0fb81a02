"""Settings: defaults, validation, the environment, and who wins."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

from moe_offload.cache import POLICIES
from moe_offload.config import settings as config_module
from moe_offload.config.settings import OffloadConfig, resolve_settings
from moe_offload.errors import ConfigError

FIELDS = [field.name for field in dataclasses.fields(OffloadConfig)]


def test_every_field_has_a_rule_a_parser_and_a_sentence():
    assert list(config_module.RULES) == FIELDS
    assert {str(field.type) for field in dataclasses.fields(OffloadConfig)} == set(config_module.PARSERS)
    for name in FIELDS:
        assert re.search(rf"^ *{name}: ", inspect.getdoc(OffloadConfig), re.MULTILINE), f"{name} is not explained"


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OffloadConfig().policy = "lru"


def test_round_trips():
    said = {"policy": "lru", "half_life": 8, "dynamic": None, "reserve": "1GB", "offload_folder": "packed"}
    said |= {"budget": "8GB", "max_memory": {0: "8GB", "cpu": 10**9}, "device_map": {"": 0, "lm_head": "cpu"}}
    config = OffloadConfig(**said)
    assert OffloadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, "JSON has no numbers as keys"
    assert OffloadConfig.from_dict(config.to_dict()) == config
    assert OffloadConfig.from_json(config.to_json()) == config
    assert OffloadConfig.from_yaml(config.to_yaml()) == config
    assert config.changed() == said and OffloadConfig().changed() == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_in_the_table_is_accepted(policy):
    assert OffloadConfig(policy=policy).policy == policy


def test_a_policy_added_later_is_accepted_and_named(monkeypatch):
    monkeypatch.setitem(POLICIES, "mine", POLICIES["lru"])
    assert OffloadConfig(policy="mine").policy == "mine"
    with pytest.raises(ConfigError, match="'mine'"):
        OffloadConfig(policy="yours")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("budget", "8 gigs", '"8GiB"'),
        ("budget", 0, "bytes"),
        ("budget", True, "bytes"),
        ("device_map", 3, '"disk"'),
        ("device_map", {"": None}, '"disk"'),
        ("device_map", {None: "cpu"}, '"disk"'),
        ("max_memory", "8GB", "{device: size}"),
        ("max_memory", {"cpu": "much"}, "{device: size}"),
        ("profile", "", "the name of a workload"),
        ("lock_memory", "yes", 'or "auto"'),
        ("policy", "lfu2", "'decayed_lfu'"),
        ("policy", ["lru"], "'lru'"),
        ("half_life", 0, "above 0"),
        ("half_life", -1.0, "above 0"),
        ("half_life", float("nan"), "finite"),
        ("half_life", float("inf"), "finite"),
        ("half_life", True, "finite"),
        ("half_life", "32", "finite"),
        ("experts_implementation", "eager", "'grouped_mm', 'batched_mm'"),
        ("compile", "eager", "'inductor', 'graph'"),
        ("compile", True, "'inductor', 'graph'"),
        ("dynamic", "auto", "True, False or None"),
        ("dynamic", 1, "True, False or None"),
        ("wave_rows", 0, "of 1 or more"),
        ("wave_rows", 4.0, "an integer"),
        ("wave_rows", True, "an integer"),
        ("kv_tokens", -1, "of 0 or more"),
        ("reserve", "some", '"1GB"'),
        ("reserve", "80%", '"1GB"'),
        ("reserve", -1, "0 for none"),
        ("reserve", False, "0 for none"),
        ("reserve", None, '"auto"'),
        ("offload_folder", "", "or None"),
        ("offload_folder", 3, "or None"),
        ("poison", 1, "True or False"),
        ("prewarm", None, "True or False"),
        ("fullgraph", "yes", "True or False"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, accepted):
    with pytest.raises(ConfigError) as error:
        OffloadConfig(**{field: value})
    assert str(error.value).startswith(f"{field}={value!r} is not accepted")
    assert accepted in str(error.value)


@pytest.mark.parametrize(("reserve", "size"), [("auto", None), (0, 0), (512, 512), ("1GB", 10**9), ("1GiB", 2**30)])
def test_reserve_in_bytes(reserve, size):
    assert OffloadConfig(reserve=reserve).reserve_bytes == size


def test_a_path_is_kept_as_text():
    assert OffloadConfig(offload_folder=Path("packed")).offload_folder == "packed"


@pytest.mark.parametrize(
    "make", [OffloadConfig.from_dict, resolve_settings, lambda values: resolve_settings(None, **values)]
)
def test_an_unknown_key_names_the_nearest(make):
    with pytest.raises(ConfigError, match=r"'halflife'.*did you mean 'half_life'\?"):
        make({"halflife": 3})
    with pytest.raises(ConfigError, match=r"'zzz'.*the fields are budget, device_map"):
        make({"zzz": 3})


def test_an_unknown_override_of_a_config_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'wave_rows'"):
        resolve_settings(OffloadConfig(), wave_row=3)


def test_resolve_refuses_what_is_no_config():
    with pytest.raises(ConfigError, match="OffloadConfig, a dict"):
        resolve_settings(3)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("budget", "8GB", "8GB"),
        ("budget", "8000000000", 8 * 10**9),
        ("device_map", "disk", "disk"),
        ("device_map", '{"": 0, "model.layers.*.mlp.experts": cpu}', {"": 0, "model.layers.*.mlp.experts": "cpu"}),
        ("max_memory", "{0: 8GB, cpu: 60GiB}", {0: "8GB", "cpu": "60GiB"}),
        ("profile", "it.json", "it.json"),
        ("policy", "lru", "lru"),
        ("half_life", "16", 16.0),
        ("experts_implementation", "batched_mm", "batched_mm"),
        ("compile", " graph ", "graph"),
        ("dynamic", "none", None),
        ("dynamic", "False", False),
        ("wave_rows", "2", 2),
        ("kv_tokens", "0", 0),
        ("reserve", "0", 0),
        ("reserve", "1GB", "1GB"),
        ("reserve", "auto", "auto"),
        ("offload_folder", "packed", "packed"),
        ("lock_memory", "auto", "auto"),
        ("lock_memory", "true", True),
        ("poison", "1", True),
        ("prewarm", "off", False),
        ("fullgraph", "YES", True),
    ],
)
def test_environment(monkeypatch, tmp_path, field, text, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.json").touch()  # a profile that is not there is refused
    monkeypatch.setenv(f"MOE_OFFLOAD_{field.upper()}", text)
    assert resolve_settings() == OffloadConfig(**{field: value})
    assert getattr(resolve_settings({"policy": "decayed_lfu"} if field != "policy" else {}), field) == value


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("device_map", "{cpu"),
        ("max_memory", "8GB"),
        ("wave_rows", "four"),
        ("half_life", "nan"),
        ("poison", "maybe"),
        ("policy", "x"),
        ("dynamic", "2"),
    ],
)
def test_a_bad_variable_is_refused_by_name(monkeypatch, field, text):
    monkeypatch.setenv(f"MOE_OFFLOAD_{field.upper()}", text)
    with pytest.raises(ConfigError, match=f"environment variable MOE_OFFLOAD_{field.upper()}: {field}="):
        resolve_settings()
    # One that is overruled is not even looked at.
    settled = OffloadConfig()
    assert resolve_settings({field: getattr(settled, field)}) == settled


def test_a_variable_set_to_nothing_is_unset(monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_WAVE_ROWS", "")
    assert resolve_settings() == OffloadConfig()


def test_precedence(monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_WAVE_ROWS", "7")
    assert resolve_settings().wave_rows == 7
    assert resolve_settings({"policy": "lru"}).wave_rows == 7, "a dict is explicit in the keys it holds only"
    assert resolve_settings({"wave_rows": 5}).wave_rows == 5
    assert resolve_settings(OffloadConfig(policy="lru")).wave_rows == "auto", "a config is explicit in every field"
    assert resolve_settings(wave_rows=3).wave_rows == 3
    assert resolve_settings({"wave_rows": 5}, wave_rows=3).wave_rows == 3
    assert resolve_settings(OffloadConfig(wave_rows=5), wave_rows=3).wave_rows == 3
    assert OffloadConfig().wave_rows == "auto", "only resolve reads the environment"
