"""The configuration file: who wins, where it lies, and what a hostile one can do (nothing)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_offload.config import file as config_file
from moe_offload.config.settings import OffloadConfig, active_file, find_origins, resolve_settings
from moe_offload.errors import ConfigError, ProfileError


@pytest.fixture
def file(tmp_path):
    def write(text, name="settings.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_precedence(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it.json").touch()
    path = file("budget: 8GB\npolicy: lru\nwave_rows: 3\nprofile: it.json\n")
    monkeypatch.setenv("MOE_OFFLOAD_WAVE_ROWS", "7")
    assert resolve_settings(path) == OffloadConfig(budget="8GB", policy="lru", wave_rows=7, profile="it.json")
    assert resolve_settings(path, budget="4GB").budget == "4GB"
    assert resolve_settings(file("overlap: true\n", "o.yaml"), overlap=None).overlap is None, (
        "what is nothing is nothing"
    )
    assert resolve_settings(str(path)) == resolve_settings(path)
    where = find_origins(path, budget="4GB")
    assert where["budget"] == "argument" and where["wave_rows"] == "environment variable MOE_OFFLOAD_WAVE_ROWS"
    assert where["policy"] == f"configuration file {path}" and where["kv_tokens"] == "default"


def test_a_profile_that_is_not_there_is_refused_by_who_named_it(file, monkeypatch):
    path = file("profile: nowhere.json\n")
    with pytest.raises(
        ProfileError, match=rf"configuration file {path}: profile='nowhere.json': there is no such file"
    ):
        resolve_settings(path)
    assert resolve_settings(path, profile="other.json").profile == "other.json", "what does not count is not looked at"
    monkeypatch.setenv("MOE_OFFLOAD_PROFILE", "nowhere.json")
    with pytest.raises(ProfileError, match=r"environment variable MOE_OFFLOAD_PROFILE: profile='nowhere\.json'"):
        resolve_settings()


def test_which_file_counts(file, monkeypatch):
    default, of_environment, named = (file(f"wave_rows: {n}", f"{n}.yaml") for n in (1, 2, 3))
    assert active_file() is None and resolve_settings() == OffloadConfig()
    monkeypatch.setattr(config_file, "default_path", lambda: default)
    assert resolve_settings().wave_rows == 1
    assert resolve_settings({"policy": "lru"}) == OffloadConfig(policy="lru", wave_rows=1)
    assert resolve_settings(OffloadConfig()).wave_rows == "auto", "a config is explicit in every field"
    monkeypatch.setenv("MOE_OFFLOAD_CONFIG_FILE", str(of_environment))
    assert resolve_settings().wave_rows == 2
    assert resolve_settings(named).wave_rows == 3


def test_a_file_that_was_named_must_be_there(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml. cannot be used.*moe-offload config"):
        resolve_settings("nowhere.yaml")
    monkeypatch.setenv("MOE_OFFLOAD_CONFIG_FILE", str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        resolve_settings()


def test_a_misspelt_variable_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_BUGDET", "6MB")
    with pytest.raises(ConfigError, match="MOE_OFFLOAD_BUGDET: did you mean MOE_OFFLOAD_BUDGET"):
        resolve_settings()


def test_the_default_place_is_beside_accelerates(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert config_file.default_path() == tmp_path / "moe_offload" / "default_config.yaml"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("halflife: 3", "did you mean 'half_life'"),
        ("half_life: -3", "half_life=-3 is not accepted"),
        ("budget: 8 gigs", "budget='8 gigs'"),
        ("policy: lru\npolicy: lru", "'policy' is there twice"),
        ('device_map: {"": cpu, "": disk}', "'' is there twice"),
        ("a: &a [x]\nb: *a", "line 1 has an anchor or alias"),
        ("- lru", "found \"\\['lru'\\]\""),
        ("lru", "found 'lru'"),
        ("1: 2", "expected settings"),
        ("policy: [", "not plain YAML"),
        ("policy: !!python/object/apply:os.system [ls]", "not plain YAML"),
        ("policy: !!python/name:os.system", "not plain YAML"),
        ("{? [a] : b}", "not plain YAML"),
        ("policy: " + "[" * 30000, "not plain YAML"),
        ("kv_tokens: " + "9" * 5000, "not plain YAML"),
        ("#" * 70000, "70000 bytes, the limit is 65536"),
        ("policy: lru\n---\npolicy: lru", "not plain YAML"),
        ("policy: \x07", "not plain YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(file, text, says):
    path = file(text)
    with pytest.raises(ConfigError, match=says) as error:
        resolve_settings(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 600


def test_a_bomb_of_aliases_is_refused_at_its_first_line(file):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"] + [
        f"{b}: &{b} [{f'*{a}, ' * 8}*{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(ConfigError, match="line 1 has an anchor"):
        resolve_settings(file("\n".join(lines)))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_neither_blocks_nor_feeds_us(make, tmp_path):
    path = tmp_path / "settings.yaml"
    make(path)
    with pytest.raises(ConfigError, match="cannot be used"):
        resolve_settings(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"policy: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be used"):
        resolve_settings(path)


def test_an_empty_file_says_nothing(file):
    assert resolve_settings(file("")) == OffloadConfig() == resolve_settings(file("# nothing yet\n"))


def test_json(file):
    path = file(json.dumps({"budget": "8GB", "max_memory": {"0": "8GB"}}), "settings.json")
    assert resolve_settings(path) == OffloadConfig(budget="8GB", max_memory={0: "8GB"})
    for text in ('{"budget": 1, "budget": 2}', "{", "[1]", "[" * 30000):
        with pytest.raises(ConfigError, match=r"settings.json. cannot be used"):
            resolve_settings(file(text, "settings.json"))


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "default_config.yaml"
    said = {"budget": "8GB", "device_map": {"": 0, "model.layers.*.mlp.experts": "disk"}}
    config_file.write_settings(path, said)
    assert config_file.read_settings(path) == said and path.read_text().startswith("# Settings of moe_offload")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match=r"was not saved: No space left.*unchanged"):
        config_file.write_settings(path, {"budget": "4GB"})
    assert config_file.read_settings(path) == said and [p.name for p in path.parent.iterdir()] == [path.name]
