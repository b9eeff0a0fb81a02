"""Ask running models for a snapshot: one line from each socket. Sockets that dead processes left are removed."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...errors import LiveError
from ...observe.live.folder import SUFFIX, check_private, list_folders
from ...observe.live.snapshot import MAX_BYTES, Snapshot

ANSWER_S = 3.0  # a process that compiles or computes may need a moment to come to its live view


class GoneError(LiveError):
    """Nobody listens there any more."""


class SilentError(LiveError):
    """Somebody listens, and does not answer."""


@dataclass(frozen=True)
class Place:
    """The socket of one model. `name` is the number of its process, with -2, -3, ... for further models of it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    @property
    def pid(self) -> int:
        return int(self.name.partition("-")[0])

    @property
    def process_is_there(self) -> bool:
        return bool(psutil.pid_exists(self.pid))

    def ended(self, within_s: float) -> bool:
        """Whether the process ends within so many seconds."""
        try:
            psutil.Process(self.pid).wait(within_s)
        except psutil.NoSuchProcess:
            return True
        except psutil.TimeoutExpired:
            return False
        return True


def ask_snapshot(place: Place) -> Snapshot:
    """What the model says. Raises GoneError, SilentError, or LiveError for what is no snapshot."""
    data, until = bytearray(), time.monotonic() + ANSWER_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(str(place.path))
            while not data.endswith(b"\n") and len(data) <= MAX_BYTES:
                connection.settimeout(max(until - time.monotonic(), 0.001))
                part = connection.recv(2**16)
                if not part:
                    break
                data += part
        except (ConnectionRefusedError, FileNotFoundError):
            raise GoneError(f"no model answers at {place.path}") from None
        except OSError as error:
            raise SilentError(f"{place.path} does not answer: {error}") from error
    if not data:
        raise SilentError(f"{place.path} has closed the connection without an answer")
    return Snapshot.of(bytes(data))


def find_running() -> list[tuple[Place, Snapshot]]:
    """Every model of this user that answers, by process. Raises LiveError where a folder of sockets is not to be
    trusted."""
    found = []
    for place in find_places():
        try:
            found.append((place, ask_snapshot(place)))
        except GoneError:
            if not place.process_is_there:
                with contextlib.suppress(OSError):
                    place.path.unlink()
        except LiveError:
            continue
    return found


def find_places() -> list[Place]:
    """Every socket of this user, by process, whether or not anybody answers there."""
    found = []
    for folder in list_folders():
        try:
            check_private(folder)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise LiveError(f"not looked for models there: {error}") from error
        found += [Place(path) for path in folder.glob(f"*{SUFFIX}") if re.fullmatch(r"\d{1,9}(-\d{1,4})?", path.stem)]
    return sorted(found, key=lambda place: (place.pid, place.name))
