"""Every long stage has a bar, under one name, on stderr; transformers' switches turn all of them off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from transformers.utils import logging as hf_logging

import moe_offload
from moe_offload.apps.families.tiny import build
from moe_offload.errors import ExpertReadError
from moe_offload.observe import progress
from tests.fakes.offloaded import IDS, SETTINGS, offloaded
from tests.paths import MODEL, ROOT


@pytest.fixture(params=[True, False], ids=["on", "off"])
def bars(request, monkeypatch):
    """Whether bars are shown, as transformers' own switch says."""
    before = hf_logging.is_progress_bar_enabled()
    (hf_logging.enable_progress_bar if request.param else hf_logging.disable_progress_bar)()
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    if not request.param:
        monkeypatch.setattr(progress, "_Compiling", None)  # its thread is not even started
    yield request.param
    (hf_logging.enable_progress_bar if before else hf_logging.disable_progress_bar)()


def stages(capsys):
    """The last state of every bar that was shown; nothing else was printed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line.strip() for line in re.split(r"[\r\n]", printed.err) if line.strip()]
    names = ("Loading", "Spilling", "Pre-warming", "Compiling", "Packing")
    assert all(line.startswith(names) for line in lines), lines
    return {re.split(r":? +[\d\[]|: ", line)[0]: line for line in lines}


def test_spilling_then_compiling(bars, capsys):
    model = offloaded()
    shown = stages(capsys)
    assert list(shown) == (["Spilling"] if bars else [])
    if bars:
        assert "100%" in shown["Spilling"]
    with torch.no_grad():
        model(IDS)
        shown = stages(capsys)
        assert list(shown) == (["Compiling"] if bars else [])
        if bars:
            assert re.fullmatch(r"Compiling \[\d\d:\d\d\]", shown["Compiling"])
        model(IDS)
    assert stages(capsys) == {}, "nothing is compiled any more"
    assert not [t for t in threading.enumerate() if t.name == "moe_offload-compiling"]


def test_loading_experts_into_ram_and_pre_warming(bars, capsys, tmp_path):
    profile = tmp_path / "profile.json"
    common = {"budget": "9MB", "config": SETTINGS}
    with moe_offload.from_pretrained(MODEL, **common).moe_offload as handle:
        handle.model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
        handle.save_profile(profile)
    capsys.readouterr()
    model = moe_offload.from_pretrained(MODEL, **common, profile=profile, device_map="cpu")
    shown = stages(capsys)
    assert list(shown) == (["Loading weights", "Loading experts", "Pre-warming"] if bars else [])
    assert all("100%" in line for line in shown.values())
    model.moe_offload.close()


def test_packing(bars, capsys, tmp_path):
    moe_offload.pack_checkpoint(MODEL, tmp_path / "packed")
    shown = stages(capsys)
    assert list(shown) == (["Packing"] if bars else []) and all("100%" in line for line in shown.values())


def test_what_compiles_fast_has_no_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 1000.0)
    model = offloaded()
    capsys.readouterr()
    with torch.no_grad():
        model(IDS)
    assert stages(capsys) == {} and model.moe_offload.stats().graphs > 0


def test_the_compiling_bar_ends_with_a_compilation_that_fails(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    model = offloaded()

    def fail(*_):
        raise ExpertReadError("on purpose")

    monkeypatch.setattr("moe_offload.forward.graphs.compiling.rewrite_graph", fail)
    with torch.no_grad(), pytest.raises(ExpertReadError, match="on purpose"):
        model(IDS)
    assert progress._shown is None
    assert not [t for t in threading.enumerate() if t.name == "moe_offload-compiling"]


def test_compilations_of_others_have_no_bar_of_ours(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    model = offloaded()
    with torch.no_grad():
        model(IDS)
    capsys.readouterr()
    other = build("qwen3_moe", num_hidden_layers=1)
    other.compile(backend="eager")
    with torch.no_grad():
        other(IDS)
    assert stages(capsys) == {}


def test_a_reset_of_dynamo_does_not_end_the_bars(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    model = offloaded()
    with torch.no_grad():
        model(IDS)
        capsys.readouterr()
        torch._dynamo.reset()
        model(IDS)
    assert list(stages(capsys)) == ["Compiling"]


def test_the_switch_in_the_environment():
    """HF_HUB_DISABLE_PROGRESS_BARS is read where transformers is imported."""
    script = f"""
        import torch, moe_offload
        from moe_offload.observe import progress
        progress.DELAY_S = 0.01
        model = moe_offload.from_pretrained({str(MODEL)!r}, "9MB", device_map="cpu")
        model(torch.tensor([[3, 4, 5]]))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    told = {
        switch: subprocess.run(
            [sys.executable, "-c", "\n".join(map(str.strip, script.splitlines()))],
            env=environment | {"HF_HUB_DISABLE_PROGRESS_BARS": switch},
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        for switch in ("0", "1")
    }
    assert told["0"].stdout == told["1"].stdout == ""
    assert "Loading experts" in told["0"].stderr and "Compiling" in told["0"].stderr
    assert "Loading" not in told["1"].stderr and "Compiling" not in told["1"].stderr
