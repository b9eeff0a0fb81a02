"""What `profile` says: a workload that is remembered, a file, or nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_offload.config import usage
from moe_offload.config.settings import OffloadConfig, resolve_settings
from moe_offload.config.usage import measured_with, profile_path, usage_folder, workload_of
from moe_offload.errors import ConfigError


@pytest.mark.parametrize(
    ("profile", "workload", "path"),
    [
        ("auto", "default", None),
        ("auto:italian", "italian", None),
        ("italian", "italian", None),
        ("it-2_b", "it-2_b", None),
        ("off", None, None),
        ("italian.json", None, "italian.json"),
        ("./italian", None, "./italian"),
        (Path("italian"), None, "./italian"),
        (Path("a/italian.json"), None, "a/italian.json"),
    ],
)
def test_what_a_profile_names(profile, workload, path):
    said = OffloadConfig(profile=profile).profile
    assert (workload_of(said), profile_path(said)) == (workload, path)
    assert measured_with(said) == (path or "off"), "what measures leaves no usage behind"


def test_usage_is_remembered_unless_somebody_says_otherwise(monkeypatch):
    assert workload_of(resolve_settings().profile) == "default"
    monkeypatch.setenv("MOE_OFFLOAD_PROFILE", "off")
    assert workload_of(resolve_settings().profile) is None


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("auto:", "1 to 64 letters"),
        ("auto:../x", "1 to 64 letters"),
        ("auto:off", "neither 'auto' nor 'off'"),
        ("auto:" + "x" * 65, "1 to 64 letters"),
        ("", "it is empty"),
        (None, "it is no text"),
        (False, "YAML reads an off without quotes"),
    ],
)
def test_what_names_nothing_is_refused(profile, says):
    with pytest.raises(ConfigError, match=says):
        OffloadConfig(profile=profile)


def test_the_folder_is_made_and_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "default_path", lambda: tmp_path / "moe_offload" / "default_config.yaml")
    assert usage_folder() == tmp_path / "moe_offload" / "profiles"
    assert (tmp_path / "moe_offload" / "profiles").stat().st_mode & 0o077 == 0


def test_where_nothing_may_be_written_there_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(usage, "default_path", lambda: tmp_path / "file" / "default_config.yaml")
    assert usage_folder() is None
