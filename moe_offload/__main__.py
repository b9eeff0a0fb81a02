"""The console script, and python -m moe_offload: the command line in a process that is its own."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress

from .apps.cli import main as command_line


def main() -> None:
    """Run the command line, then end the process without waiting for threads that still run (a cancelled request, a
    read that hangs).

    Python's own shutdown would unwind a thread that returns from torch later through C++, which aborts (SIGABRT).
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
