"""What of slots and scratch is locked in memory: as much as was asked for and the system allows, and never a lie."""

from __future__ import annotations

import errno
import resource
import sys
from types import SimpleNamespace

import pytest

from moe_offload.config.settings import OffloadConfig
from moe_offload.errors import ConfigError
from moe_offload.memory import locking
from moe_offload.memory.buffers import page_aligned
from moe_offload.memory.locking import MemoryLock, allowed_bytes, bytes_to_lock
from tests.fakes.offloaded import SETTINGS, offloaded, say

GB = 10**9


@pytest.fixture
def pages(monkeypatch):
    """What is locked, {address: size}, of a system that refuses whatever is beyond `pages.most`."""
    held: dict[int, int] = {}
    found = SimpleNamespace(held=held, most=sys.maxsize)

    def lock(address, size):
        if sum(held.values()) + size > found.most:
            return errno.ENOMEM
        held[address] = size
        return 0

    monkeypatch.setattr(locking, "_lock_pages", lock)
    monkeypatch.setattr(locking, "_unlock_pages", lambda address, size: held.pop(address))
    monkeypatch.setattr(locking, "allowed_bytes", lambda: sys.maxsize)
    return found


def limit(monkeypatch, soft, hard, status=""):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: raised.append(both))
    monkeypatch.setattr(locking, "STATUS", SimpleNamespace(read_text=lambda: status))
    return raised


def test_a_process_may_lock_up_to_the_hard_limit_less_what_it_has_locked(monkeypatch):
    raised = limit(monkeypatch, 64, 8192, "VmLck:\t       4 kB\nCapEff:\t0000000000000000\n")
    assert allowed_bytes() == 8192 - 4096 and raised == [(8192, 8192)]


def test_a_right_or_no_limit_allows_all(monkeypatch):
    limit(monkeypatch, 64, 64, f"CapEff:\t{1 << locking.CAP_IPC_LOCK:016x}\n")
    assert allowed_bytes() == sys.maxsize
    limit(monkeypatch, 64, resource.RLIM_INFINITY)
    assert allowed_bytes() == sys.maxsize


def test_a_system_without_locks_allows_nothing(monkeypatch):
    monkeypatch.setattr(locking.ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    assert allowed_bytes() == 0


@pytest.mark.parametrize(
    ("asked", "budget", "allowed", "locked"),
    [
        ("auto", 4 * GB, 8 * GB, 0),  # half of the machine is not most of it
        ("auto", 5 * GB, 8 * GB, 3 * GB),
        ("auto", 5 * GB, 1 * GB, 1 * GB),
        (True, 1 * GB, 8 * GB, 3 * GB),
        (False, 8 * GB, 8 * GB, 0),
    ],
)
def test_how_much_is_to_be_locked(monkeypatch, asked, budget, allowed, locked):
    monkeypatch.setattr(locking, "allowed_bytes", lambda: allowed)
    assert bytes_to_lock(asked, needed=3 * GB, budget=budget, machine=8 * GB) == locked


def test_what_may_not_be_locked_and_was_asked_to_be_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(locking, "allowed_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"lock_memory=True asks for .* may lock 1.00 KB: raise the limit"):
        offloaded(config=OffloadConfig(**{**SETTINGS.to_dict(), "lock_memory": True}))


def test_slots_and_scratch_are_locked_and_the_summary_says_so(pages):
    model = offloaded(layers=2, residency=0.5, config=OffloadConfig(**{**SETTINGS.to_dict(), "lock_memory": True}))
    handle, plan = model.moe_offload, model.moe_offload.plan
    assert handle.locked_bytes == sum(pages.held.values()) == plan.bank_bytes + plan.costs.scratch_bytes
    assert "locked in memory:" in str(handle)
    say(model, n=3)
    handle.close()
    assert pages.held == {} and handle.locked_bytes == 0 and "locked in memory" not in str(handle)


def test_a_system_that_refuses_what_its_limit_allows(pages):
    pages.most = 0
    with pytest.raises(ConfigError, match="the system has locked 0 B of"):
        offloaded(config=OffloadConfig(**{**SETTINGS.to_dict(), "lock_memory": True}))


def test_after_a_refusal_nothing_more_is_tried(pages, caplog):
    lock, pages.most = MemoryLock(10 * 4096), 2 * 4096
    buffers = [page_aligned(4096 * n) for n in (2, 3, 1)]
    for buffer in buffers:
        lock.lock(buffer)
    assert lock.nbytes == 2 * 4096 and len(pages.held) == 1 and caplog.text.count("and no more") == 1
    lock.unlock(buffers[0])
    assert lock.nbytes == 0 and pages.held == {}


@pytest.mark.skipif(allowed_bytes() < 2**16, reason="this process may lock nothing")
def test_the_system_counts_what_is_locked():
    lock, buffer, before = MemoryLock(2**16), page_aligned(2**14), locking._status("VmLck")
    lock.lock(buffer)
    buffer.fill_(1)
    assert lock.nbytes == 2**14 and locking._status("VmLck") == before + 16
    lock.unlock(buffer)
    assert locking._status("VmLck") == before
