"""moe-offload serve, and the session that chat shares with it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config.settings import OffloadConfig
from ..options.checks import check_model, check_output
from ..options.ending import INTERRUPTED, fail
from ..options.flags import Model, SaveProfile
from ..options.groups import ModelFlags, flatten
from ..options.numbers import whole

if TYPE_CHECKING:
    from .server import Server

ATTENTION_S = 0.2  # a signal that another thread has caught is acted on when the main thread runs next


@flatten
def serve(
    model: Model,
    flags: ModelFlags,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 is any that is free.", **whole(0, 65535))] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; without it as it was given here.")
    ] = None,
    save_profile: SaveProfile = None,
) -> None:
    """Answer OpenAI-compatible requests (chat completions, completions, responses) with a model inside a budget.

    Clients need the address that is printed and no key: OpenAI(base_url=..., api_key="none").

    Ctrl-C stops: running requests have ten seconds, then the profile is saved. A second one does not wait.
    """
    wanted = flags.settings()
    check_model(model)
    check_output("--save-profile", save_profile)
    name, stop = name or model, Stop()
    try:
        with (
            on_signals(stop),
            served(model, wanted, flags, host=host, port=port, name=name, save_profile=save_profile) as server,
        ):
            if not server.is_local:
                typer.echo(
                    f"moe-offload: {host} is open to other machines, and whoever reaches it may use the model: "
                    "there is no authentication",
                    err=True,
                )
            stop.serving = True
            typer.echo(f"Serving {name} on {server.url} (Ctrl-C stops)", err=True)
            while not stop.asked.wait(ATTENTION_S):
                pass
            typer.echo("moe-offload: stopping", err=True)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


class Stop:
    """What Ctrl-C and SIGTERM mean: while the model loads an interrupt; while it serves a wish, which a second Ctrl-C
    makes an interrupt."""

    def __init__(self) -> None:
        self.serving, self.asked = False, threading.Event()

    def __call__(self, number: int, _: object) -> None:
        if not self.serving or (self.asked.is_set() and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.asked.set()


@contextmanager
def served(
    model: str, wanted: OffloadConfig, flags: ModelFlags, *, host: str, port: int, name: str, save_profile: Path | None
) -> Iterator[Server]:
    """A running server for `model`. At the end its requests have been stopped, the summary printed, the profile saved.

    An address that cannot be had is refused before the model is loaded.
    """
    from . import require

    require()
    from ...api import from_pretrained
    from ..generate.tokenizer import load_tokenizer
    from .app import build_app
    from .server import Server, listen

    flags.set_threads()
    with listen(host, port) as sock:
        loaded: Any = from_pretrained(model, config=wanted, **flags.loading())
        with loaded.moe_offload as handle:
            typer.echo(str(handle.plan), err=True)
            tokenizer = load_tokenizer(model, **flags.hub())
            server = Server(build_app(handle, tokenizer, name), sock)
            server.start()
            try:
                yield server
                server.stop()
            finally:  # an interrupt leaves requests unanswered, never the profile unsaved
                server.app.state.model.cancel()
                typer.echo(handle.summary(), err=True)
                if save_profile is not None:
                    saved = handle.save_profile(save_profile)
                    typer.echo(f"profile saved to {saved}", err=True)


@contextmanager
def on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` is called on Ctrl-C and SIGTERM, in the main thread."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
