"""moe-offload serve, and the session that chat shares with it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config.settings import KEY_VARIABLE, OffloadConfig
from ..options.checks import check_inputs, check_output, live_or_default, settings
from ..options.ending import fail, or_exit
from ..options.flags import Budget, ConfigFile, DeviceMapOption, Live, MaxMemory, Model, PrewarmWith, SaveProfile, whole
from . import ACCESS, LONGEST_QUEUE

if TYPE_CHECKING:
    from .server import Server

LAST_TOKEN_S = 60.0  # for the forward that runs, which may be compiling, before its counts are saved
ATTENTION_S = 0.2  # a signal that another thread has caught is acted on when the main thread runs next


def serve(
    model: Model,
    budget: Budget = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemory = None,
    config_file: ConfigFile = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 is any that is free.", **whole(0, 65535))] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="What clients call the model.", show_default="MODEL as given"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="What clients must send; others are refused (401).", envvar=KEY_VARIABLE),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="Requests that may wait; more are refused (429).", **whole(0, 10000))
    ] = LONGEST_QUEUE,
    profile_in: PrewarmWith = None,
    profile_out: SaveProfile = None,
    live: Live = None,
) -> None:
    """Answer OpenAI-compatible requests (completions and chat completions) with a model inside a budget.

    Clients need the address that is printed: OpenAI(base_url=..., api_key=...). Without --api-key any key will do.

    Ctrl-C stops: running requests have ten seconds, then the profile is saved. A second one does not wait.
    """
    wanted = settings(
        config_file,
        budget=budget,
        device_map=device_map,
        max_memory=max_memory,
        profile=profile_in,
        live=live_or_default(live, config_file),
    )
    check_inputs(model, wanted)
    check_output("--profile-out", profile_out)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        fail("--api-key: a key is printable ASCII, without spaces around it", 2)
    name, stop = served_model_name or model, Stop()
    _log_requests()
    try:
        with (
            on_signals(stop),
            served(
                model,
                wanted,
                host=host,
                port=port,
                name=name,
                profile_out=profile_out,
                api_key=api_key,
                max_waiting=max_waiting,
                warm_up=True,
            ) as server,
        ):
            if not server.is_local and api_key is None:
                typer.echo(
                    f"moe-offload: {host} is open to other machines, and whoever reaches it may use the model: "
                    "give an --api-key",
                    err=True,
                )
            stop.serving = True
            typer.echo(f"Serving {name} on {server.url} (Ctrl-C stops)", err=True)
            while not stop.asked.wait(ATTENTION_S):
                pass
            typer.echo("moe-offload: stopping", err=True)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def _log_requests() -> None:
    """A line per request on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access = logging.getLogger(ACCESS)
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)


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
    model: str,
    wanted: OffloadConfig,
    *,
    host: str,
    port: int,
    name: str,
    profile_out: Path | None,
    api_key: str | None = None,
    max_waiting: int = LONGEST_QUEUE,
    warm_up: bool = False,
) -> Iterator[Server]:
    """A running server for `model`. At the end its requests have been stopped, the summary printed, the profile saved.

    `warm_up` compiles before the first request, and says how long that took. An address that cannot be had is refused
    before the model is loaded.
    """
    from . import require

    or_exit(require)
    from ...api import from_pretrained
    from ..generate.tokenizer import load_tokenizer
    from .app import App
    from .server import Server, listen

    with or_exit(lambda: listen(host, port)) as sock:
        loaded: Any = or_exit(lambda: from_pretrained(model, config=wanted))
        with loaded.moe_offload as handle:
            typer.echo(str(handle.plan), err=True)
            tokenizer = or_exit(lambda: load_tokenizer(model))
            app = or_exit(lambda: App(handle, tokenizer, name, api_key=api_key, longest_queue=max_waiting), code=1)
            if warm_up:
                begun_s = time.perf_counter()
                or_exit(app.warm_up, code=1)
                typer.echo(f"Compiled and warmed up in {time.perf_counter() - begun_s:.1f} s", err=True)
            server = Server(app, sock)
            or_exit(server.start, code=1)
            try:
                yield server
                server.stop()
            finally:  # an interrupt leaves requests unanswered, never the profile unsaved
                app.close()
                with suppress(KeyboardInterrupt):
                    app.queue.join(LAST_TOKEN_S)
                typer.echo(handle.summary(), err=True)
                if profile_out is not None:
                    saved = or_exit(lambda: handle.save_profile(profile_out), code=1)
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
