"""The process of a side ends when the bench that started it ends, also if that is killed in the middle of a load.

The bench holds one end of a socket pair, the side the other. Nothing is ever sent; when the bench is gone the kernel
closes its end, and a thread of the side hears of it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading


def end_with(descriptor: int) -> None:
    """End this process, and its group, when the other end of the socket `descriptor` is closed."""
    line = socket.socket(fileno=descriptor)

    def wait() -> None:
        line.recv(1)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, name="moe_offload-lifeline", daemon=True).start()
