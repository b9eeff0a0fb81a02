"""A model remembers what it used: when it is closed, collected, at the end of the process, and in between."""

from __future__ import annotations

import gc
import subprocess
import sys
import time

import pytest

import moe_offload
from moe_offload.config.settings import OffloadConfig
from moe_offload.errors import ConfigError
from moe_offload.observe import usage_keeper
from moe_offload.observe.profile import Profile
from tests.fakes.offloaded import IDS, SETTINGS, offloaded, say
from tests.paths import MODEL, ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_offload.plan.prepare.usage_folder", lambda: tmp_path)
    return tmp_path


def saved(folder, workload="default"):
    (path,) = folder.glob(f"*/{workload}.json")
    return Profile.load(path)


def soon(found, within_s=10.0):
    until = time.monotonic() + within_s
    while not found() and time.monotonic() < until:
        time.sleep(0.01)
    return found()


def test_what_was_used_is_what_the_next_start_begins_with(folder):
    model = offloaded(residency=0.5)
    assert model.moe_offload.remembered is None
    want = say(model)
    used = model.moe_offload.profile()
    model.moe_offload.close()
    assert saved(folder).counts == used.counts and saved(folder).tokens == used.tokens

    again = offloaded(residency=0.5)
    handle = again.moe_offload
    assert handle.remembered == saved(folder)
    assert soon(lambda: all(layer.resident == layer.slots for layer in handle.stats().layers)), "read while idle"
    assert say(again).equal(want)
    handle.close()
    assert saved(folder).tokens == 2 * used.tokens, "mixed with what was there"


def test_it_is_written_once_however_often_it_is_asked_for(folder):
    model = offloaded()
    assert model.moe_offload.save_usage() == model.moe_offload.usage_path
    assert not model.moe_offload.usage_path.exists(), "nothing was used"
    say(model, n=2)
    for _ in range(3):
        model.moe_offload.save_usage()
    model.moe_offload.close()
    model.moe_offload.close()
    assert saved(folder).tokens == model.moe_offload.stats().tokens


def test_a_model_that_is_collected_leaves_its_usage(folder):
    model = offloaded()
    say(model, n=2)
    tokens = model.moe_offload.stats().tokens
    del model
    gc.collect()
    assert soon(lambda: list(folder.glob("*/default.json"))) and saved(folder).tokens == tokens


def test_every_few_minutes(folder, monkeypatch):
    monkeypatch.setattr(usage_keeper, "EVERY_S", 0.05)
    monkeypatch.setattr(usage_keeper, "KEEPER", usage_keeper.Keeper())
    monkeypatch.setattr("moe_offload.handle.remembering.KEEPER", usage_keeper.KEEPER)
    model = offloaded()
    say(model, n=2)
    assert soon(lambda: list(folder.glob("*/default.json")))
    model.moe_offload.close()


AT_EXIT = """
import os, sys
import moe_offload.plan.prepare
from pathlib import Path
moe_offload.plan.prepare.usage_folder = lambda: Path(sys.argv[1])
from tests.fakes.offloaded import offloaded, say
model = offloaded()
say(model, n=2)
if os.fork() == 0:
    sys.exit()  # as the parent's end, and it must not count twice
os.wait()
"""


def test_at_the_end_of_the_process_and_not_of_one_forked_from_it(folder):
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert saved(folder).tokens == IDS.numel() + 1
    assert "is kept in" in done.stderr, "one line says where"


@pytest.mark.parametrize("profile", ["off", "path", "object"])
def test_a_profile_that_is_named_is_no_memory(folder, tmp_path, profile):
    model = offloaded(profile="off")
    say(model, n=2)
    found = model.moe_offload.profile()
    given = {"off": "off", "path": found.save(tmp_path / "p.json"), "object": found}[profile]
    with offloaded(profile=given).moe_offload as handle:
        say(handle.model, n=2)
        assert handle.remembered is None and handle.usage_path is None and handle.save_usage() is None
    assert not list(folder.glob("*/*.json"))


def test_workloads_are_counted_apart(folder):
    model = offloaded(config=OffloadConfig(**{**SETTINGS.to_dict(), "profile": "italian"}))
    handle = model.moe_offload
    say(model, n=2)
    first = handle.stats().tokens
    handle.count_for("other")
    say(model, n=5)
    handle.count_for("italian")
    say(model, n=2)
    handle.close()
    assert saved(folder, "italian").tokens == 2 * first and saved(folder, "other").tokens == first + 3
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        handle.count_for("../x")


def test_what_cannot_be_written_is_said_once_and_hurts_nobody(folder, caplog):
    model = offloaded()
    want = say(model, n=2)
    handle = model.moe_offload
    handle.usage_path.parent.write_text("a file where a folder should be")
    handle.save_usage()
    handle.save_usage()
    assert caplog.text.count("usage is not remembered") == 1
    handle.usage_path.parent.unlink()
    assert say(model, n=2).equal(want)
    handle.close()
    assert saved(folder).tokens == handle.stats().tokens, "what could not be written was kept"


def test_a_damaged_memory_is_no_error_at_load(folder, caplog):
    model = offloaded()
    path = model.moe_offload.usage_path
    path.parent.mkdir()
    path.write_text("{")
    with offloaded().moe_offload as handle:
        assert handle.remembered is None
    assert "begins anew" in caplog.text


def test_a_checkpoint_has_one_memory_however_it_is_loaded(folder):
    with moe_offload.from_pretrained(MODEL, "6MB").moe_offload as handle:
        first = handle.usage_path
    from transformers import AutoModelForCausalLM

    model = moe_offload.optimize(AutoModelForCausalLM.from_pretrained(MODEL), "60MB")
    assert model.moe_offload.usage_path == first
    assert first.parent.name.startswith("polyglot-tiny-")
    model.moe_offload.close()
    assert not first.parent.exists(), "nothing was used, nothing is written"
