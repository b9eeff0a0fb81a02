"""The socket that hands out snapshots of one model, served by a daemon thread that sleeps until somebody connects.

Each connection is sent one line of JSON and closed. No error here reaches the model: where a socket cannot be had,
there is one warning and no live view.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...files.whole_file import describe_error
from .folder import SUFFIX, list_folders, make_private

logger = logging.getLogger("moe_offload")

SEND_S = 1.0  # how long a client that does not read is waited for
REST_S = 1.0  # pause after an error that may last, such as having no file descriptors left
Answer = Callable[[], bytes | None]


def open_view(answer: Answer) -> LiveView | None:
    """Hand out what `answer` returns, one line; None closes the connection without one. None where it cannot be done,
    which has been logged."""
    if not hasattr(socket, "AF_UNIX"):
        logger.warning("no live view: this system has no Unix sockets")
        return None
    found = []
    for folder in list_folders():
        try:
            make_private(folder)
            listener, path = _listen(folder)
        except (OSError, ValueError) as error:
            found.append(f"{folder}: {describe_error(error)}")
            continue
        view = LiveView(listener, path, answer)
        try:
            view.start()
        except RuntimeError as error:  # no more threads
            view.close()
            listener.close()
            found.append(str(error))
            break
        return view
    logger.warning("no live view (moe-offload top will not find this model): %s", "; ".join(found))
    return None


class LiveView:
    """The listening socket at `path`. It keeps nothing alive but `answer`."""

    def __init__(self, listener: socket.socket, path: Path, answer: Answer):
        self.path, self._listener, self._answer = path, listener, answer
        self._wake, self._woken = socket.socketpair()
        self._pid, self._warned = os.getpid(), False

    def start(self) -> None:
        threading.Thread(target=self._serve, name="moe_offload-live", daemon=True).start()

    def close(self) -> None:
        """Remove the socket and let the thread end. Idempotent; from any thread, in any process."""
        self._wake.close()  # in a forked child this closes a copy, and the model's own thread goes on
        if os.getpid() == self._pid:
            self._pid = -1
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _serve(self) -> None:
        with self._listener, self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while all(key.fileobj is not self._woken for key, _ in selector.select()):
                try:
                    self._serve_one()
                except Exception as error:  # whoever looks next may fare better; the model must not notice
                    if not self._warned:
                        self._warned = True
                        logger.warning("the live view could not answer: %s: %s", type(error).__name__, error)
                    time.sleep(REST_S)

    def _serve_one(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            line = self._answer()
            if line is not None:
                connection.settimeout(SEND_S)
                with contextlib.suppress(TimeoutError, ConnectionError):  # it has not waited for the answer
                    connection.sendall(line + b"\n")


def _listen(folder: Path) -> tuple[socket.socket, Path]:
    """A socket at the first name of this process that is free in `folder`."""
    for number in itertools.count(1):
        path = folder / f"{os.getpid()}{'' if number == 1 else f'-{number}'}{SUFFIX}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                listener.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if is_heard(path):  # another model of ours, or of a process with our number in another container
                    listener.close()
                    continue
                path.unlink()  # of a dead process that had our number
                listener.bind(str(path))
            listener.listen()
            listener.setblocking(False)
            return listener, path
        except BaseException:
            listener.close()
            raise
    raise AssertionError("there are numbers enough")


def is_heard(path: Path) -> bool:
    """Whether anybody listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(SEND_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True
