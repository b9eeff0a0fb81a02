"""An OpenAI-compatible server for one offloaded model: `moe-offload serve`.

cli.py                     the command
server.py, connections.py  a socket, before minutes are spent on loading; start and stop, on a thread of its own
app.py, guards.py          routes, and what stands before them: the key, bounds on bodies, the log
answering.py, queue.py     a request from its body to its answer; who is answered when
generation.py, text.py     one answer of the model, token by token; its text up to a stop string
in_step.py                 the same answer on several ranks
protocol/                  OpenAI's fields, answers, events and errors
request_metrics.py         counts and latencies, for Prometheus and the log
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from ...errors import ServeError

PACKAGES = ("starlette", "uvicorn", "jinja2")
TOGETHER_PACKAGES = ("greenlet",)  # for several requests at once
LONGEST_QUEUE = 64  # requests that wait
ACCESS = "moe_offload.access"  # the logger of a line per request


def require_packages(packages: Iterable[str] = PACKAGES) -> None:
    """Raises ServeError if a package is missing that serving needs."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ServeError(f'serving needs {name} ({error}): in the clone, pip install -e ".[serve]"') from error
