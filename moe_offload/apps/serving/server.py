"""uvicorn on a socket of ours and a thread of its own: signals stay with the main thread, which says when to stop."""

from __future__ import annotations

import errno
import ipaddress
import math
import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from ...errors import ServeError
from .connections import BoundedProtocol

if TYPE_CHECKING:
    from .app import App  # which imports torch: an address is refused before that

GRACE_S = 10.0  # for running requests to finish, once the server stops
CANCEL_S = 5.0  # for what was cancelled then to tell its clients; one forward of a large model takes longer

REASONS = {
    errno.EADDRINUSE: "the port is in use; give another, or 0 for any that is free",
    errno.EACCES: "this port is for the system's administrator; give one from 1024 on",
    errno.EADDRNOTAVAIL: "this is not an address of this machine; 127.0.0.1 always is",
}


def open_listener(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises ServeError if the address cannot be had.

    It listens at once, since two sockets that do not may be bound to one port: clients that connect early wait.
    """
    if not 0 <= port <= 65535:
        raise ServeError(f"port {port}: there are those from 1 to 65535, and 0 for any that is free")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"host {host!r}: not an address, nor a name that has one ({error})") from error
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        reason = REASONS.get(error.errno or 0, str(error.strerror))
        raise ServeError(f"cannot listen on {host} port {port}: {reason}") from error


class Server:
    """`app`  on `sock`, from `start()` to `stop()`."""

    def __init__(self, app: App, sock: socket.socket):
        self.app, self.address = app, sock.getsockname()
        settings = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(GRACE_S + CANCEL_S / 2),  # then bodies that are still being sent end
        )
        self._uvicorn = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([sock],), name="moe_offload_server", daemon=True
        )

    @property
    def url(self) -> str:
        host, port, *_ = self.address
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.address[0]).is_loopback

    def start(self) -> None:
        """Returns when requests are answered; raises ServeError if it ends before that."""
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise ServeError(f"the server on {self.url} did not start; its log says why")
            time.sleep(0.02)

    def stop(self) -> None:
        """Take no more requests, wait for the running ones for GRACE_S seconds, then cancel them.

        An interrupt while it waits cancels them at once.
        """
        self._uvicorn.should_exit = True
        try:
            until = time.monotonic() + GRACE_S
            while self._thread.is_alive() and time.monotonic() < until:
                self._thread.join(0.1)  # in pieces: an interrupt may have been caught by another thread
        finally:
            self.app.close()
        self._thread.join(CANCEL_S)
