"""moe-offload serve."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config.launched import is_first, read_launched
from ...config.settings import KEY_VARIABLE, OffloadConfig, given_key
from ..options.checks import check_model, check_output, check_tokenizer
from ..options.ending import INTERRUPTED, USAGE, fail_with
from ..options.flags import Model, PromptCacheOption, SaveProfile
from ..options.groups import ModelFlags, flatten_groups
from ..options.numbers import whole
from ..options.signals import Stop, on_signals
from . import ACCESS, LONGEST_QUEUE

if TYPE_CHECKING:
    from .server import Server

ATTENTION_S = 0.2  # a signal that another thread has caught is acted on when the main thread runs next
FAREWELL_S = 20.0  # for rank 0 to end running requests; a rank that was told alone to stop does so then
LAST_TOKEN_S = 60.0  # for the forward that runs, which may be compiling, before its counts are saved


@flatten_groups
def serve(
    model: Model,
    flags: ModelFlags,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 is any that is free.", **whole(0, 65535))] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="What clients call the model; without it as it was given here."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="What clients must send; others are refused (401).", envvar=KEY_VARIABLE),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="Requests that may wait; more are refused (429).", **whole(0, 10000))
    ] = LONGEST_QUEUE,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            help="Requests to compute together, each as if alone; the budget keeps a KV cache of --context for each.",
            **whole(1, 64),
        ),
    ] = 1,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk-size",
            help="Tokens of the prompt to read at a time; without it as many as the budget has room for.",
            **whole(1),
        ),
    ] = None,
    prompt_cache: PromptCacheOption = None,
    save_profile: SaveProfile = None,
) -> None:
    """Answer OpenAI-compatible requests (completions and chat completions) with a model inside a budget.

    Clients need the address that is printed: OpenAI(base_url=..., api_key=...). Without --api-key any key will do.

    Ctrl-C stops: running requests have ten seconds, then the profile is saved. A second one does not wait.
    """
    wanted = flags.settings()
    check_model(model, revision=flags.revision)
    check_tokenizer(model)
    check_output("--save-profile", save_profile)
    api_key = given_key() if api_key is None else api_key  # typer takes an empty variable for an absent one
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        fail_with(f"--api-key, {KEY_VARIABLE}: a key is printable ASCII, not empty, without spaces around it", USAGE)
    if parallel > 1:
        if prompt_cache is not None:
            fail_with("--prompt-cache: it serves one request at a time; leave it out, or use --parallel 1", USAGE)
        if read_launched() is not None:
            fail_with("--parallel: several processes compute one request at a time; use --parallel 1", USAGE)
        wanted = dataclasses.replace(wanted, kv_sequences=parallel)
    stop = Stop()
    if not is_first():
        with on_signals(stop):
            follow_server(model, wanted, flags, stop)
        return
    _log_requests()
    try:
        with (
            on_signals(stop),
            running_server(
                model,
                wanted,
                flags,
                host=host,
                port=port,
                name=served_model_name or model,
                api_key=api_key,
                max_waiting=max_waiting,
                parallel=parallel,
                prefill_chunk_size=prefill_chunk_size,
                prompt_cache=prompt_cache,
                save_profile=save_profile,
            ) as server,
        ):
            if not server.is_local and api_key is None:
                typer.echo(
                    f"moe-offload: {host} is open to other machines, and whoever reaches it may use the model: "
                    "give an --api-key",
                    err=True,
                )
            stop.serving = True
            typer.echo(f"Serving {server.app.name} on {server.url} (Ctrl-C stops)", err=True)
            while not stop.asked.wait(ATTENTION_S):
                server.app.check_ranks()
            typer.echo("moe-offload: stopping", err=True)
    except KeyboardInterrupt:
        fail_with("interrupted", INTERRUPTED)


def _log_requests() -> None:
    """A line per request on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access = logging.getLogger(ACCESS)
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)


@contextmanager
def running_server(
    model: str,
    wanted: OffloadConfig,
    flags: ModelFlags,
    *,
    host: str,
    port: int,
    name: str,
    api_key: str | None,
    max_waiting: int,
    parallel: int,
    prefill_chunk_size: int | None,
    prompt_cache: str | None,
    save_profile: Path | None,
) -> Iterator[Server]:
    """A running server for `model`, compiled and warm. An address that cannot be had is refused before torch
    is imported.

    At the end its requests have been stopped, the summary printed, the profile saved.
    """
    from . import PACKAGES, TOGETHER_PACKAGES, require_packages

    require_packages((*PACKAGES, *(TOGETHER_PACKAGES if parallel > 1 else ())))
    from .server import Server, open_listener

    with open_listener(host, port) as sock:
        from ...api import from_pretrained
        from ...plan.weights import planned_context
        from ..generate.tokenizer import load_tokenizer
        from ..prompt_cache.open import check_folder, open_prompt_cache
        from .app import App
        from .generation import Generate, generate_answer
        from .in_step import Leader

        check_folder(prompt_cache)
        flags.set_threads()
        loaded: Any = from_pretrained(model, config=wanted, **flags.loading(model))
        with loaded.moe_offload as handle:
            typer.echo(str(handle.plan), err=True)
            tokenizer = load_tokenizer(model, **flags.hub())
            if prefill_chunk_size is not None:
                loaded.generation_config.prefill_chunk_size = prefill_chunk_size
            leader = None if handle.ranks is None else Leader(handle.ranks)
            known = open_prompt_cache(loaded, wanted, prompt_cache)
            generate: Generate = generate_answer if leader is None else leader.generate
            if known is not None:
                generate = partial(generate_answer, generate=known.generate)
            app = App(
                handle,
                tokenizer,
                name,
                context=planned_context(loaded, wanted),
                api_key=api_key,
                longest_queue=max_waiting,
                parallel=parallel,
                generate=generate,
                known=known,
            )
            begun_s = time.perf_counter()
            app.warm_up()
            typer.echo(f"Compiled and warmed up in {time.perf_counter() - begun_s:.1f} s", err=True)
            server = Server(app, sock)
            server.start()
            try:
                yield server
                server.stop()
            finally:  # an interrupt leaves requests unanswered, never the profile unsaved
                app.close()
                with suppress(KeyboardInterrupt):
                    if app.queue.join(LAST_TOKEN_S) and known is not None:
                        known.save()
                if leader is not None:
                    leader.end(None if save_profile is None else str(save_profile))
                typer.echo(handle.summary(), err=True)
                if save_profile is not None:
                    saved = handle.save_profile(save_profile)
                    typer.echo(f"profile saved to {saved}", err=True)


def follow_server(model: str, wanted: OffloadConfig, flags: ModelFlags, stop: Stop) -> None:
    """The server's model on a rank that answers nobody: it generates what rank 0 does, until rank 0 has ended."""
    from ...api import from_pretrained
    from ..generate.tokenizer import load_tokenizer
    from .in_step import follow

    flags.set_threads()
    loaded: Any = from_pretrained(model, config=wanted, **flags.loading(model))
    with loaded.moe_offload:
        tokenizer = load_tokenizer(model, **flags.hub())
        stop.serving = True

        def check() -> None:
            if stop.asked.is_set() and time.monotonic() - stop.asked_s > FAREWELL_S:
                raise KeyboardInterrupt

        follow(loaded, tokenizer, check)
