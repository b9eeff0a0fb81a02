"""What is asked of a device, and what is said where there is none."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from moe_offload.apps.bench.devices import Cpu, Cuda
from moe_offload.apps.bench.roofs.link import link_roof, pinned, registered_memory
from moe_offload.apps.cli import app
from moe_offload.errors import ConfigError, OffloadError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_before_anything_is_written(tmp_path):
    arguments = ["synthetic:tiny", "--device", "cuda", "--residency", "25%", "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    (line,) = done.output.strip().splitlines()
    assert "--device cuda" in line and torch.__version__ in line
    assert not (tmp_path / "cache").exists()


class FakeMemory:
    """torch.cuda's counters of one process."""

    def __init__(self, monkeypatch):
        self.peak = self.reserved = 0
        self.begun = False
        for name, value in (
            ("init", lambda: vars(self).update(begun=True)),
            ("max_memory_allocated", lambda: self.peak),
            ("max_memory_reserved", lambda: self.reserved),
            ("reset_peak_memory_stats", self.reset),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def reset(self):
        assert self.begun  # before it there are no counters, and resetting them is an error
        self.peak = 1


def test_peaks_are_of_a_phase_and_of_the_whole(monkeypatch):
    fake, device = FakeMemory(monkeypatch), Cuda()
    device.reset_peak()
    fake.peak, fake.reserved = 70, 90
    assert device.take_peak() == 70  # a prompt
    fake.peak = 40
    assert device.take_peak() == 40  # decoding
    assert device.memory() == {"peak_bytes": 70, "reserved_bytes": 90}


def test_a_cpu_is_not_asked_for_peaks_while_it_is_measured():
    assert Cpu().take_peak() is None
    assert Cpu().memory()["peak_bytes"] >= 0 and Cpu().room_bytes() > 0


def test_a_gpu_that_is_absent_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="finds no CUDA device here; leave --device out"):
        Cuda().check()


def test_the_link_roof_is_the_faster_way_and_names_both():
    with link_roof(4096, "cpu") as roof:
        assert roof.details() == {"copy_engine_bytes_per_s": 0, "kernel_bytes_per_s": 0}  # where no side has loaded
        roof.rows_EN.fill_(7)
        measured = [roof.measure(seed) for seed in range(3)]
        details = roof.details()
    assert set(details) == {"copy_engine_bytes_per_s", "kernel_bytes_per_s"}
    assert max(measured) == max(rate for rates in roof.found.values() for rate in rates)
    assert all(rate > 0 for rate in details.values())
    assert (roof.bank_SN == 7).all()


def test_pinned_memory_is_used_and_a_refusal_says_why(monkeypatch):
    """`pinned.pin` answers with what went wrong: nothing is good news."""
    undone = []
    monkeypatch.setattr(pinned, "unpin_rows", undone.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinned, "device_view", lambda rows, device: (device, rows))
    monkeypatch.setattr(pinned, "pin_rows", lambda rows: "out of memory")
    refused = r"4096 bytes of host memory cannot be pinned \(out of memory\); raise the memlock limit"
    with pytest.raises(OffloadError, match=refused), registered_memory(4096, "cuda:0"):
        pass
    monkeypatch.setattr(pinned, "pin_rows", lambda rows: "")
    with registered_memory(4096, "cuda:0") as (host, (device, seen)):
        assert (device, seen.data_ptr(), undone) == ("cuda:0", host.data_ptr(), [])
    assert [rows.data_ptr() for rows in undone] == [host.data_ptr()]
