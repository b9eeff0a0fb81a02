"""An OpenAI-compatible server for one offloaded model, made of transformers' own request handlers.

require()                     the packages of the extra `serve`, or one line that says how to get them
listen(host, port)            a socket, before minutes are spent on loading (server.py)
build_app(handle, tokenizer)  transformers' routes, answered by this model (app.py, one_model.py, failures.py)
Server(app, sock)             start and stop, on a thread of its own (server.py)
"""

from __future__ import annotations

import importlib

from ...errors import ServeError

PACKAGES = ("fastapi", "uvicorn", "openai", "jinja2", "rich")


def require() -> None:
    """Raises ServeError if a package is missing that transformers' serving or chat needs."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ServeError(f'serving needs {name} ({error}): in the clone, pip install -e ".[serve]"') from error
