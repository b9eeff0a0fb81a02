"""What a disk store does when its medium fails: always a typed error or the right bytes, never anything else."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_offload.checkpoint.headers import read_headers
from moe_offload.checkpoint.pretrained.weight_files import weight_files
from moe_offload.checkpoint.row_index import index_rows
from moe_offload.errors import CheckpointChangedError, CheckpointError, ClosedError, ExpertReadError, OffloadError
from moe_offload.experts import MoELayer, find_experts
from moe_offload.memory.stores.disk import DiskStore
from moe_offload.memory.stores.spill import spill_layers
from tests.fakes.tiny_checkpoints import assert_holds, assert_row, build, index_of, new_row, save, skeleton, view


class Disk:
    """A checkpoint, the store over it, and what the store should read."""

    def __init__(self, folder: Path, kind: str = "per_expert", shard: str = "1GB"):
        self.model = build(kind)
        self.file = save(self.model, folder, shard) / "model.safetensors"
        _, index = index_of(skeleton(kind), folder)
        self.moe_layers = index.pack(find_experts(self.model))
        self.store = DiskStore([moe.layout for moe in self.moe_layers], index)

    def read(self, layer: int = 1, expert: int = 2) -> torch.Tensor:
        row = new_row(self.moe_layers[layer])
        self.store.read(layer, expert, view(row))
        return row


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "checkpoint")
    yield disk
    disk.store.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# The file changes.


def test_truncated_after_open(disk: Disk) -> None:
    os.truncate(disk.file, 1000)
    with pytest.raises(
        ExpertReadError, match=r"model.layers.1.mlp.experts expert 2: .*model.safetensors was truncated"
    ):
        disk.read()


def test_truncated_where_this_expert_is_not(disk: Disk) -> None:
    """Its bytes are still there, but the file is not the one that was checked."""
    os.truncate(disk.file, disk.file.stat().st_size - 1)
    with pytest.raises(CheckpointChangedError, match="modified after it was opened"):
        disk.read(0, 0)


def test_truncated_in_the_middle_of_a_read(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: Any, at: int) -> int:
        count = real(fd, [buffers[0][:7]], at)
        os.truncate(disk.file, at + 3)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ExpertReadError, match="truncated"):
        disk.read()


def test_a_truncated_file_does_not_kill_the_process(tmp_path: Path) -> None:
    """With a mapped file this is SIGBUS."""
    save(build("per_expert"), tmp_path)
    code = """
import os, sys
from pathlib import Path
from moe_offload.errors import ExpertReadError
from tests.fakes.tiny_checkpoints import index_of, new_row, skeleton, view
from moe_offload.memory.stores.disk import DiskStore
folder = Path(sys.argv[1])
moe_layers, index = index_of(skeleton("per_expert"), folder)
store = DiskStore([moe.layout for moe in moe_layers], index)
os.truncate(folder / "model.safetensors", 64)
try:
    store.read(0, 0, view(new_row(moe_layers[0])))
except ExpertReadError:
    sys.exit(42)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, timeout=120)
    assert done.returncode == 42, done.stderr.decode()[-2000:]


def test_modified_in_place(disk: Disk) -> None:
    with disk.file.open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"abcd")
    stat = disk.file.stat()
    os.utime(
        disk.file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1)
    )  # the write may fall into the clock tick of the save
    with pytest.raises(CheckpointChangedError, match=r"model.safetensors was modified .*its bytes are not used"):
        disk.read()


@pytest.mark.parametrize("how", ["write", "map"])
def test_modified_in_place_and_the_time_put_back(disk: Disk, how: str) -> None:
    """As `touch -r` does it, and some who copy in place: the time of the status change cannot be put back."""
    disk.read()
    stat = disk.file.stat()
    time.sleep(0.02)  # beyond the tick of the clock that files are stamped by
    with disk.file.open("r+b") as stream:
        if how == "write":
            stream.seek(-4, 2)
            stream.write(b"abcd")
        else:
            with mmap.mmap(stream.fileno(), 0) as mapped:
                mapped[-4:] = b"abcd"
    os.utime(disk.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(CheckpointChangedError, match=r"model.safetensors was modified .*its bytes are not used"):
            disk.read()


def test_each_of_a_row_s_files_is_looked_at(tmp_path: Path) -> None:
    """A row in several shards: whichever of them has changed, its bytes are not used."""
    disk = Disk(tmp_path, shard="5KB")
    assert len(disk.store._plans[1][2].files) > 1
    for file in sorted(disk.store._plans[1][2].files):
        again = Disk(tmp_path / file.stem, shard="5KB")
        changed = tmp_path / file.stem / file.name
        os.utime(changed, ns=(0, 0))
        with pytest.raises(CheckpointChangedError, match=rf"experts expert 2: .*{file.name} was modified"):
            again.read()
        again.store.close()
    disk.store.close()


def test_what_leaves_the_bytes_alone_is_no_modification(disk: Disk) -> None:
    """Each changes the time of the status change: permissions, names, a rename, and the end of the last name."""
    file, other = disk.file, disk.file.with_name("other")
    for change in (
        lambda: file.chmod(0o640),
        lambda: other.hardlink_to(file),
        lambda: other.unlink(),
        lambda: file.rename(other),
        lambda: other.chmod(0o644),
        lambda: other.unlink(),
    ):
        time.sleep(0.02)
        change()
        assert_holds(disk.store, disk.moe_layers)


def test_what_was_renamed_and_then_rewritten(disk: Disk) -> None:
    """A name that is gone explains one change, not every one after it."""
    stat, other = disk.file.stat(), disk.file.with_name("other")
    disk.file.rename(other)
    disk.read()
    time.sleep(0.02)
    with other.open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"abcd")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CheckpointChangedError, match="was modified"):
        disk.read()


def test_close_during_a_read_closes_the_files_when_it_is_done(tmp_path: Path) -> None:
    before = descriptors()
    disk = Disk(tmp_path / "checkpoint")
    reads = disk.store.begin(1, 2, view(new_row(disk.moe_layers[1])))
    with disk.store._open_for_reading():
        disk.store.close()
        assert descriptors() > before, "somebody reads"
    assert descriptors() == before
    with pytest.raises(ClosedError):
        reads.run()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("held", ["_lock", "_open_for_reading"])
def test_a_forked_process_closes_its_files_whoever_was_reading(disk: Disk, held: str) -> None:
    """The thread that read, or held the lock, is not in the child: to wait for it is to wait for ever."""
    before = descriptors()
    with disk.store._lock if held == "_lock" else disk.store._open_for_reading():
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            disk.store.close()
            os._exit(0 if descriptors() < before and not disk.store.files else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_holds(disk.store, disk.moe_layers)


class Interrupt:
    """KeyboardInterrupt when the `at`th function written in C, from 1, has returned."""

    def __init__(self, at: int):
        self.at, self.seen = at, 0

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_return":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt


def test_ctrl_c_while_a_store_opens_loses_no_descriptor(tmp_path: Path) -> None:
    """Wherever Python may raise it: a number that nobody owns yet would stay open for ever."""
    moe_layers, index = index_of(skeleton("per_expert"), save(build("per_expert"), tmp_path))
    layouts, before, places = [moe.layout for moe in moe_layers], descriptors(), 0
    while True:
        interrupt = Interrupt(places + 1)
        sys.setprofile(interrupt)
        try:
            DiskStore(layouts, index).close()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        gc.collect(0)
        assert descriptors() == before, places
        if interrupt.seen <= places:
            break
        places += 1
    assert places > 20


def test_unlinked(disk: Disk) -> None:
    shutil.rmtree(disk.file.parent)
    assert_holds(disk.store, disk.moe_layers)


def test_replaced_by_rename(disk: Disk) -> None:
    other = disk.file.with_name("new")
    other.write_bytes(bytes(disk.file.stat().st_size))
    other.rename(disk.file)
    assert_holds(disk.store, disk.moe_layers)


def test_replaced_between_indexing_and_opening(tmp_path: Path) -> None:
    meta, model = skeleton("per_expert"), build("per_expert")
    [file] = weight_files(save(model, tmp_path)).files
    headers, moe_layers = read_headers([file]), find_experts(meta)
    shutil.copy(file, tmp_path / "copy")
    (tmp_path / "copy").rename(file)
    before = descriptors()
    with pytest.raises(CheckpointChangedError, match="replaced or modified since its header was read"):
        DiskStore([moe.layout for moe in moe_layers], index_rows(meta, moe_layers, headers))
    assert descriptors() == before


def test_gone_between_indexing_and_opening(tmp_path: Path) -> None:
    meta = skeleton("per_expert")
    moe_layers, index = index_of(meta, save(build("per_expert"), tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be opened"):
        DiskStore([moe.layout for moe in moe_layers], index)


def test_too_few_descriptors(tmp_path: Path) -> None:
    moe_layers, index = index_of(skeleton("per_expert"), save(build("per_expert"), tmp_path, "5KB"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    next_free = os.dup(0)
    os.close(next_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free + 3, hard))
    try:
        with pytest.raises(CheckpointError, match="ulimit -n"):
            DiskStore([moe.layout for moe in moe_layers], index)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before


# The reads fail.


class Faulty:
    """`os.preadv` with an error on chosen calls, and never more than `most` bytes at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, errors: dict[int, int] | int = 0, most: int = 1 << 40):
        self.calls, self.errors, self.most, self.real = 0, errors, most, os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, buffers: list[memoryview], at: int) -> int:
        self.calls += 1
        error = self.errors if isinstance(self.errors, int) else self.errors.get(self.calls, 0)
        if error:
            raise OSError(error, os.strerror(error))
        if sum(buffer.nbytes for buffer in buffers) <= self.most:
            return self.real(fd, buffers, at)
        return self.real(fd, [next(buffer for buffer in buffers if buffer.nbytes)[: self.most]], at)


@pytest.mark.parametrize("most", [1, 7, 1000, 5000])
@pytest.mark.parametrize("kind", ["per_expert", "stacked"])
def test_short_reads_are_completed(kind: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, kind)
    Faulty(monkeypatch, most=most)
    assert_row(disk.read(0, 3), disk.moe_layers[0], 3)
    assert_row(disk.read(1, 0), disk.moe_layers[1], 0)


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.EINTR])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_passing_error_is_retried(disk: Disk, code: int, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty(monkeypatch, {call: code}, most=1000)
    assert_row(disk.read(), disk.moe_layers[1], 2)
    assert faulty.calls > call


def test_a_lasting_error_is_raised_each_time_and_leaves_no_trace(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    with monkeypatch.context() as patch:
        faulty = Faulty(patch, errno.EIO)
        for attempt in range(1, 101):
            with pytest.raises(
                ExpertReadError,
                match=r"model.layers.1.mlp.experts expert 2: reading \d+ bytes at offset \d+ .*failed twice with EIO",
            ):
                disk.read()
            assert faulty.calls == 2 * attempt
    assert descriptors() == before
    assert_holds(disk.store, disk.moe_layers)


def test_another_error_is_not_retried(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty(monkeypatch, errno.ESTALE)
    with pytest.raises(ExpertReadError, match="failed with ESTALE"):
        disk.read()
    assert faulty.calls == 1


def test_one_expert_s_neighbours_are_one_read(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """down, gate and up lie side by side in the file, in another order than in the row."""
    faulty = Faulty(monkeypatch)
    assert_row(disk.read(), disk.moe_layers[1], 2)
    assert faulty.calls == 1


# Spilling.


def rows_of(moe_layers: list[MoELayer]) -> list[torch.Tensor]:
    return [param.detach().clone() for moe in moe_layers for param in moe.params.values()]


def test_spill_leaves_nothing_behind(tmp_path: Path) -> None:
    moe_layers, seen, before = find_experts(build("stacked")), list[int](), descriptors()
    store = spill_layers(moe_layers, moe_layers, tmp_path, progress=seen.append)
    assert list(tmp_path.iterdir()) == []
    assert seen == [moe.layout.row_bytes for moe in moe_layers for _ in range(moe.num_experts)] and len(seen) == 8
    assert sum(seen) == sum(moe.nbytes for moe in moe_layers)
    store.close()
    assert descriptors() == before


def test_spill_of_some_layers(tmp_path: Path) -> None:
    moe_layers = find_experts(build("per_expert"))
    store = spill_layers(moe_layers, moe_layers[1:], tmp_path)
    assert_holds(store, moe_layers[1:])
    with pytest.raises(IndexError, match="layer 0, expert 0"):
        store.read(0, 0, view(new_row(moe_layers[0])))
    store.close()


def test_spill_to_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe_layers = find_experts(build("per_expert"))
    need = sum(moe.nbytes for moe in moe_layers)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(OffloadError, match=rf"cannot take .*\({need} bytes\).*No space left.* free\)"):
        spill_layers(moe_layers, moe_layers, tmp_path)


def test_spill_that_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the write half-way, as a quota would."""
    moe_layers = find_experts(build("per_expert"))
    kept, before, limits = rows_of(moe_layers), descriptors(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (moe_layers[0].layout.row_bytes * 3 + 100, limits[1]))
    try:
        with pytest.raises(OffloadError, match=rf"{tmp_path}: cannot take the .*File too large.*offload_folder"):
            spill_layers(moe_layers, moe_layers, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert descriptors() == before and list(tmp_path.iterdir()) == []
    assert all(torch.equal(a, b) for a, b in zip(kept, rows_of(moe_layers), strict=True))


def test_spill_to_no_folder(tmp_path: Path) -> None:
    moe_layers = find_experts(build("per_expert"))
    with pytest.raises(OffloadError, match="No such file or directory"):
        spill_layers(moe_layers, moe_layers, tmp_path / "nowhere")


def test_spill_interrupted_gives_everything_back(tmp_path: Path) -> None:
    moe_layers, written, before = find_experts(build("per_expert")), list[int](), descriptors()

    def interrupt(nbytes: int) -> None:
        written.append(nbytes)
        if sum(written) > sum(moe.nbytes for moe in moe_layers) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spill_layers(moe_layers, moe_layers, tmp_path, interrupt)
    assert descriptors() == before and list(tmp_path.iterdir()) == []
