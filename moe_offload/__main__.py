"""The console script, and python -m moe_offload: the command line in a process that is its own."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress

from .apps.cli import main as command_line


def main() -> None:
    """Run it, and end the process: threads that are left (a request that was cancelled, a read that hangs) stay where
    they are.

    Python's own end would unwind a thread that comes back from torch later through C++, which is SIGABRT.
    """
    try:
        command_line()
    except SystemExit as end:
        if threading.active_count() == 1 or not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(BrokenPipeError):
                stream.flush()
        os._exit(end.code)


if __name__ == "__main__":
    main()
