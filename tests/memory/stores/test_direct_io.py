"""Reading past the page cache: refused at once, refused later and by many, cut short, at any offset and address."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_offload.errors import ExpertReadError
from moe_offload.memory.buffers import page_aligned
from moe_offload.memory.stores.direct_io import DataFile
from moe_offload.memory.stores.row_reads import PAGE

SIZE = 40 * PAGE + 123
REAL = os.preadv


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.fixture
def data(file: Path) -> Iterator[DataFile]:
    data = DataFile(file)
    yield data
    data.close()


def has_direct(data: DataFile) -> bool:
    return data._direct is not None


def read(data: DataFile, offset: int, sizes: list[int], shift: int = 0) -> bytes:
    """`sizes` bytes each, one after another, into buffers `shift` bytes past a page."""
    whole = page_aligned(sum(sizes) + shift)
    buffers, at = [], shift
    for size in sizes:
        buffers.append(memoryview(whole.numpy())[at : at + size])
        at += size
    data.read(offset, buffers, "expert 0")
    return b"".join(bytes(buffer) for buffer in buffers)


CASES = {
    "in place": (2 * PAGE, [3 * PAGE], 0),
    "file not aligned": (2 * PAGE + 8, [3 * PAGE], 0),
    "memory not aligned": (2 * PAGE, [3 * PAGE], 8),
    "length not aligned": (2 * PAGE, [3 * PAGE + 1], 0),
    "several buffers": (77, [5, 2 * PAGE, 1, 4000], 3),
    "up to the end": (30 * PAGE, [SIZE - 30 * PAGE], 0),
    "one byte": (SIZE - 1, [1], 0),
}
every_case = pytest.mark.parametrize(("offset", "sizes", "shift"), CASES.values(), ids=CASES)


@every_case
def test_every_alignment(data, file, offset, sizes, shift):
    assert read(data, offset, sizes, shift) == file.read_bytes()[offset : offset + sum(sizes)]


@every_case
@pytest.mark.parametrize("most", [1, 7, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 9])
def test_reads_cut_short_are_completed(data, file, offset, sizes, shift, most, monkeypatch):
    """The kernel may return fewer bytes than asked for, at any count; a direct read goes on from a whole page."""
    stuck = [0]

    def short(fd, buffers, at):
        count = REAL(fd, buffers, at)
        if (
            has_direct(data) and fd == data._direct.fileno() and most < PAGE
        ):  # what is not a page cannot be gone on from: once in a while only
            stuck[0] += 1
            return count if stuck[0] % 2 else min(count, most)
        return min(count, most)

    monkeypatch.setattr(os, "preadv", short)
    assert read(data, offset, sizes, shift) == file.read_bytes()[offset : offset + sum(sizes)]


@every_case
def test_refused_when_opened(file, offset, sizes, shift, monkeypatch):
    real = fcntl.fcntl

    def refuse(file, command, *flags):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, command, *flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    data = DataFile(file)
    assert not has_direct(data)
    assert read(data, offset, sizes, shift) == file.read_bytes()[offset : offset + sum(sizes)]
    data.close()


def test_refused_when_read_by_many_threads_at_once(data, file, monkeypatch):
    """Every thread falls back by itself; the refused descriptor stays ours, whoever is still about to use it."""
    if not has_direct(data):
        pytest.skip("this file system has no O_DIRECT")
    barrier, refused, others = threading.Barrier(8), [], []

    def refuse(fd, buffers, at):
        if fd == data._direct.fileno():
            refused.append(at)
            barrier.wait(120)  # all of them hold the number before any falls back
            others.append(os.open("/dev/zero", os.O_RDONLY))  # would take the number if it were free
            raise OSError(errno.EINVAL, "Invalid argument")
        return REAL(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", refuse)
    got: dict[int, bytes] = {}

    def one(i: int) -> None:
        got[i] = read(data, i * PAGE, [PAGE])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    whole = file.read_bytes()
    assert got == {i: whole[i * PAGE : (i + 1) * PAGE] for i in range(8)}
    assert len(refused) == 8 and data._direct.fileno() not in others
    read(data, 0, [PAGE])
    assert len(refused) == 8, "once refused, it is not tried again"
    for fd in others:
        os.close(fd)


def test_close_gives_both_descriptors_back(file):
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}
    data = DataFile(file)
    data._refused = True
    data.close()
    data.close()
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before


def test_bytes_past_the_end_are_a_typed_error(data):
    with pytest.raises(ExpertReadError, match=r"truncated: \d+ bytes are missing"):
        read(data, SIZE - 10, [PAGE])


# Mutations that survived once.


@pytest.mark.parametrize("offset", [8, 2 * PAGE + 4000])
def test_a_direct_read_cut_short_right_before_the_last_bytes_is_gone_on_from(data, file, offset, monkeypatch):
    """What is needed begins at the page before the offset: counted from the offset, the row's end would stay old."""
    if not has_direct(data):
        pytest.skip("this file system has no O_DIRECT")
    skip, nbytes = offset % PAGE, 3 * PAGE

    def short(fd, buffers, at):  # the rest of the buffer is not touched: it holds what was read before
        return REAL(fd, [buffers[0][:nbytes]] if at == offset - skip else buffers, at)

    monkeypatch.setattr(os, "preadv", short)
    read(data, 20 * PAGE + 8, [4 * PAGE])  # what this thread's buffer has from before
    assert read(data, offset, [nbytes]) == file.read_bytes()[offset : offset + nbytes]


def test_a_direct_read_cut_short_goes_on_directly(data, file, monkeypatch):
    """From a whole page: from anywhere else it would be refused, and O_DIRECT given up for good."""
    if not has_direct(data):
        pytest.skip("this file system has no O_DIRECT")
    asked = []

    def short(fd, buffers, at):
        asked.append((fd, at))
        count = REAL(fd, buffers, at)
        return min(count, 2 * PAGE + 100) if len(asked) == 1 else count

    monkeypatch.setattr(os, "preadv", short)
    assert read(data, 0, [6 * PAGE]) == file.read_bytes()[: 6 * PAGE]
    assert asked == [(data._direct.fileno(), 0), (data._direct.fileno(), 2 * PAGE)] and not data._refused


def test_a_direct_read_cut_short_within_its_first_page_is_tried_again(data, file, monkeypatch):
    """It cannot be gone on from where it stopped, and is no sign that the file has become shorter."""
    if not has_direct(data):
        pytest.skip("this file system has no O_DIRECT")
    asked = []

    def short(fd, buffers, at):
        asked.append(at)
        count = REAL(fd, buffers, at)
        return 100 if len(asked) == 1 else count

    monkeypatch.setattr(os, "preadv", short)
    assert read(data, 0, [2 * PAGE]) == file.read_bytes()[: 2 * PAGE] and asked == [0, 0]
