"""The live view: what a snapshot holds, who may see it, and that it is gone when the model is."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest

from moe_offload import ClosedError
from moe_offload.apps.live.client import GoneError, Place, SilentError, ask_snapshot, find_running
from moe_offload.errors import LiveError
from moe_offload.observe.live import server
from moe_offload.observe.live.snapshot import Snapshot
from tests.fakes.offloaded import SETTINGS, offloaded, say
from tests.fakes.watched import use_folder


@pytest.fixture
def folder(monkeypatch):
    """Short, as the path of a socket has 100 characters or so."""
    made = Path(tempfile.mkdtemp(prefix="m-"))
    yield use_folder(monkeypatch, made)
    shutil.rmtree(made)


@pytest.fixture
def model():
    made = offloaded(layers=2)
    yield made
    made.moe_offload.close()


def live_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "moe_offload-live"]


def until(holds, seconds=120.0):
    """Other threads and processes end when they get to it."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def test_a_snapshot_says_what_stats_say(model):
    say(model)
    handle = model.moe_offload
    found, stats = handle.snapshot(), handle.stats()
    assert json.loads(json.dumps(found)) == found
    assert stats.values().items() <= found.items() and found["graphs"] == stats.graphs
    assert stats.hits and stats.misses and found["pid"] == os.getpid() and found["uptime_s"] > 0
    assert found["plan"] == handle.plan.parts() and sum(found["plan"].values()) == found["budget_bytes"]
    assert found["rss_bytes"] > 10**7 and (found["queued"], found["reading"]) == (0, 0)
    for row, layer in zip(found["layers"], stats.layers, strict=True):
        assert row == dataclasses.asdict(layer) and row["resident"] == row["slots"]


def test_it_waits_for_no_lock_of_the_model(model, folder):
    """Somebody holds the model's lock and the transfer's for good: the view answers all the same."""
    path = model.moe_offload.serve_live()
    runtime, answers = model.moe_offload._runtime, []
    with runtime.lock, runtime._transfer._changed:
        asking = threading.Thread(target=lambda: answers.append(ask_snapshot(Place(path))), daemon=True)
        asking.start()
        asking.join(120)
    assert answers and answers[0].model == model.moe_offload.name


def test_snapshots_while_the_model_generates(model, folder):
    want = say(model, n=30)
    place, seen, done = Place(model.moe_offload.serve_live()), [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(ask_snapshot(place))

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(3):
        assert say(model, n=30).equal(want)
    done.set()
    looking.join()
    tokens = [snapshot.tokens for snapshot in seen]
    assert tokens == sorted(tokens) and tokens[-1] > tokens[0]


def test_only_its_user_may_look(model, folder):
    path = model.moe_offload.serve_live()
    assert path == folder / f"{os.getpid()}.sock"
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
    assert path == model.moe_offload.serve_live(), "a second call is the same view"


def test_two_models_of_one_process(model, folder):
    other = offloaded(layers=1)
    first, second = model.moe_offload.serve_live(), other.moe_offload.serve_live()
    assert second.stem == f"{first.stem}-2"
    assert [(place.path, len(found.layers)) for place, found in find_running()] == [(first, 2), (second, 1)]
    model.moe_offload.close()
    assert [place.path for place, _ in find_running()] == [second]
    other.moe_offload.close()
    assert find_running() == []


def test_close_ends_it(folder):
    model = offloaded()
    path = model.moe_offload.serve_live()
    assert len(live_threads()) == 1 and path.is_socket()
    model.moe_offload.close()
    assert not path.exists() and until(lambda: not live_threads())
    with pytest.raises(GoneError):
        ask_snapshot(Place(path))
    with pytest.raises(ClosedError):
        model.moe_offload.serve_live()


def test_garbage_collection_ends_it(folder):
    model = offloaded()
    path, gone = model.moe_offload.serve_live(), weakref.ref(model)
    ask_snapshot(Place(path))
    del model
    gc.collect()
    assert gone() is None, "the view keeps the model alive"
    assert not path.exists() and until(lambda: not live_threads())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*")
def test_a_forked_child_leaves_the_socket_alone(model, folder):
    path = model.moe_offload.serve_live()
    child = os.fork()
    if child == 0:
        model.moe_offload._live.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.is_socket() and ask_snapshot(Place(path)).pid == os.getpid()


def broken_folder(folder: Path) -> None:
    folder.write_text("no folder")


def linked_folder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def open_folder(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(broken_folder, "not a folder"), (linked_folder, "not a folder"), (open_folder, "chmod 700")],
)
def test_a_folder_not_to_be_trusted_is_one_warning(model, folder, caplog, spoil, says):
    for place in (folder, folder.parent / f"moe_offload-{os.getuid()}"):
        shutil.rmtree(folder.parent / "elsewhere", ignore_errors=True)
        spoil(place)
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert model.moe_offload.serve_live() is None
    (record,) = caplog.records
    assert says in record.getMessage() and "no live view" in record.getMessage()
    assert not live_threads()
    with pytest.raises(LiveError, match=says):
        find_running()


def test_somebody_elses_folder_is_not_used(model, folder, monkeypatch, caplog):
    mine = os.getuid()
    folder.mkdir(mode=0o700)
    (folder.parent / f"moe_offload-{mine + 1}").mkdir(mode=0o700)
    monkeypatch.setattr("os.getuid", lambda: mine + 1)
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert model.moe_offload.serve_live() is None
    assert f"belongs to user {mine}" in caplog.text and not list(folder.iterdir())
    with pytest.raises(LiveError, match="belongs to user"):
        find_running()


def test_a_path_too_long_is_one_warning(model, folder, monkeypatch, caplog):
    deep = folder.parent / ("x" * 100)
    deep.mkdir()
    use_folder(monkeypatch, deep)
    with caplog.at_level(logging.WARNING, "moe_offload"):
        assert model.moe_offload.serve_live() is None
    assert len(caplog.records) == 1 and "too long" in caplog.text


def test_where_the_first_folder_will_not_do_the_second_does(model, folder):
    broken_folder(folder)
    path = model.moe_offload.serve_live()
    assert path.parent.name == f"moe_offload-{os.getuid()}"


def test_a_stale_socket_of_our_number_is_replaced(model, folder):
    folder.mkdir(mode=0o700)
    stale = folder / f"{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    assert model.moe_offload.serve_live() == stale and ask_snapshot(Place(stale)).layers


def dead_pid() -> int:
    return next(pid for pid in range(2**22 - 1, 2, -1) if not psutil.pid_exists(pid))


def test_stale_sockets_of_dead_processes_are_removed(folder):
    folder.mkdir(mode=0o700)
    stale, ours, foreign = folder / f"{dead_pid()}.sock", folder / f"{os.getpid()}.sock", folder / "notes.txt"
    for path in (stale, ours):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    foreign.write_text("not ours")
    assert find_running() == []
    assert not stale.exists() and ours.exists() and foreign.exists()


@contextlib.contextmanager
def answering(path: Path, answer: bytes):
    view = server.LiveView(*_bound(path), lambda: answer)
    view.start()
    yield Place(path)
    view.close()


def _bound(path: Path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener, path


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'{"format": "moe_offload.live", "version": 2}', "version"),
        (b'{"format": "moe_offload.live", "version": 1, "model": 7}', "model"),
        (b'{"format": "moe_offload.live", "version": 1, "hits": -1}', "hits"),
        (b'{"model": "m"}', "does not say that it is"),
    ],
)
def test_what_is_no_snapshot_is_an_error(folder, answer, says):
    folder.mkdir(mode=0o700)
    with answering(folder / f"{os.getpid()}.sock", answer) as place:
        with pytest.raises(LiveError, match=says):
            ask_snapshot(place)
        assert find_running() == []


def test_who_does_not_answer_is_given_up(folder, monkeypatch):
    monkeypatch.setattr("moe_offload.apps.live.client.ANSWER_S", 0.05)
    folder.mkdir(mode=0o700)
    listener, path = _bound(folder / "1.sock")
    with listener, pytest.raises(SilentError):
        ask_snapshot(Place(path))


def test_a_failing_answer_is_one_warning_and_the_next_look_is_tried(model, folder, monkeypatch, caplog):
    monkeypatch.setattr(server, "REST_S", 0.0)
    place = Place(model.moe_offload.serve_live())
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "moe_offload"):
        broken.setattr(model.moe_offload, "stats", lambda: 1 / 0)
        for _ in range(3):
            with pytest.raises(SilentError):
                ask_snapshot(place)
        assert say(model).numel()
    assert len(caplog.records) == 1 and "ZeroDivisionError" in caplog.text
    assert ask_snapshot(place).hits


def test_who_does_not_read_is_not_waited_for(model, folder, monkeypatch):
    monkeypatch.setattr(server, "SEND_S", 0.05)
    path = model.moe_offload.serve_live()
    monkeypatch.setattr("moe_offload.handle.watching._live_line", lambda handle: b"x" * 2**24)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(path))
        monkeypatch.undo()
        use_folder(monkeypatch, folder.parent)
        assert until(lambda: ask_snapshot(Place(path)).layers)


def test_the_snapshot_may_say_more_than_we_know(model):
    said = json.loads(model.moe_offload._snapshot().to_json())
    said["layers"][0]["mood"] = said["temperature"] = 21
    assert Snapshot.of(json.dumps(said).encode()).layers == model.moe_offload.stats().layers


def test_the_setting_switches_it_on(folder, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_LIVE", "1")
    model = offloaded(config=SETTINGS.changed())
    assert [found.pid for _, found in find_running()] == [os.getpid()]
    model.moe_offload.close()
