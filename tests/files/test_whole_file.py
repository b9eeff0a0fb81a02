"""A file that is written over another: whatever happens at any step, the old or the new one is there, whole."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import pytest

from moe_offload.errors import ProfileError
from moe_offload.files.opened import create_nameless
from moe_offload.files.untrusted import read_bounded, refusing_file
from moe_offload.files.whole_file import save_whole
from tests.fakes.file_faults import Fault, full, interrupt

OLD, NEW = b"old" * 100, b"new" * 200


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    yield tmp_path / "file"
    sys.setprofile(None)


def save(path, fault):
    with fault:
        save_whole(path, NEW, "thing", ProfileError)


def steps(path):
    counting = Fault()
    save(path, counting)
    assert path.read_bytes() == NEW and counting.seen >= 2
    return counting.seen


@pytest.mark.parametrize("what", [full, interrupt])
def test_an_error_or_ctrl_c_leaves_one_of_the_two_and_nothing_else(path, what):
    for at in range(1, steps(path) + 1):
        path.write_bytes(OLD)
        with contextlib.suppress(ProfileError, KeyboardInterrupt):
            save(path, Fault(at, what))
            assert path.read_bytes() == NEW, "it may go on without the folder's names on the disk, with nothing else"
        assert path.read_bytes() in (OLD, NEW) and list(path.parent.iterdir()) == [path]


def test_a_kill_leaves_one_of_the_two(path):
    for at in range(1, steps(path) + 1):
        path.write_bytes(OLD)
        child = os.fork()
        if child == 0:
            save(path, Fault(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            os._exit(0)
        os.waitpid(child, 0)
        assert path.read_bytes() in (OLD, NEW)


def test_a_kill_before_all_is_on_the_disk_leaves_nothing(path, monkeypatch):
    if create_nameless(path.parent) is None:
        pytest.skip("a file must have a name here")
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        save_whole(path, NEW, "thing", ProfileError)
        os._exit(0)
    os.waitpid(child, 0)
    assert path.read_bytes() == OLD and list(path.parent.iterdir()) == [path]


def test_where_a_file_must_have_a_name_it_is_written_under_another(path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    save(path, Fault())
    assert path.read_bytes() == NEW and list(path.parent.iterdir()) == [path] and path.stat().st_mode & 0o777 == 0o600


def test_what_is_too_large_or_no_file_is_one_error_that_names_it(path):
    for limit, place in ((10, path), (10**6, path.parent), (10**6, path.parent / "absent")):
        with pytest.raises(ProfileError, match=rf"thing '{place}' cannot be used: .*Do this"):
            with refusing_file(place, "thing", "Do this", ProfileError):
                read_bounded(place, limit)
    assert read_bounded(path, len(OLD)) == OLD
