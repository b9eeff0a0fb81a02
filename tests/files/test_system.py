"""What is done where a system lacks a call, or has another one: tested by taking calls away."""

from __future__ import annotations

import fcntl
import os
import sys
from io import FileIO

import pytest
import torch

import moe_offload
from moe_offload.errors import UnsupportedModelError
from moe_offload.files import system
from moe_offload.files.opened import open_uncached
from moe_offload.memory.stores.direct_io import DataFile
from tests.fakes.offloaded import offloaded, say
from tests.paths import MODEL


@pytest.fixture
def macos(monkeypatch):
    """No O_DIRECT, no fdatasync, no posix_fadvise, no /proc; F_NOCACHE, whose calls are returned."""
    asked, real = [], fcntl.fcntl
    for name in ("O_DIRECT", "fdatasync", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda file, call, *a: asked.append(a) if call == 48 else real(file, call, *a))
    monkeypatch.setattr(sys, "platform", "darwin")
    return asked


def test_linux_reads_by_whole_pages_past_the_cache(tmp_path):
    (tmp_path / "f").write_bytes(bytes(4096))
    file, how = open_uncached(tmp_path / "f")
    with file:
        assert how in (system.DIRECT, system.CACHED)


def test_macos_reads_any_bytes_past_the_cache(tmp_path, macos):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    data, into = DataFile(tmp_path / "f"), bytearray(5)
    data.read(3, [memoryview(into)], "who")
    data.close()
    assert into == bytes([3, 4, 5, 6, 7]) and data.how == "F_NOCACHE" and macos == [(1,)]


def test_a_model_runs_on_macos_and_says_how_it_reads(macos):
    with moe_offload.from_pretrained(MODEL, "6MB").moe_offload as handle:
        handle.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        assert "disk (read F_NOCACHE)" in str(handle) and macos


def test_a_loaded_model_is_spilled_on_macos(macos):
    model = offloaded(device_map="disk")
    say(model, n=2)
    model.moe_offload.close()


def test_what_is_read_through_the_cache_is_said(monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    with moe_offload.from_pretrained(MODEL, "6MB").moe_offload as handle:
        assert "disk (read through the page cache)" in str(handle)


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_a_system_without_the_calls_is_refused_in_one_sentence(monkeypatch, name):
    monkeypatch.delattr(os, name)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UnsupportedModelError, match=rf"this system \(win32\) has no os.{name}, .* in WSL 2"):
        moe_offload.from_pretrained(MODEL, "6MB")


def test_a_file_system_that_refuses_leaves_the_cache(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    (tmp_path / "f").touch()
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    file, how = open_uncached(tmp_path / "f")
    with file:
        assert how == system.CACHED and isinstance(file, FileIO)
