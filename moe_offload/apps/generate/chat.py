"""moe-offload chat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ...errors import ConfigError, ServeError
from ..options.checks import check_inputs, check_output, live_or_default, settings
from ..options.ending import fail, or_exit
from ..options.flags import Budget, ConfigFile, DeviceMapOption, Live, MaxMemory, Model, PrewarmWith, SaveProfile
from ..serving.cli import on_signals, served


def chat(
    model: Model,
    generate_flags: Annotated[
        list[str] | None,
        typer.Argument(help="How to generate: max_new_tokens=100 do_sample=False ...", show_default=False),
    ] = None,
    budget: Budget = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemory = None,
    config_file: ConfigFile = None,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="What the model is told first.")] = None,
    profile_in: PrewarmWith = None,
    profile_out: SaveProfile = None,
    live: Live = None,
) -> None:
    """Talk to a model inside a budget, with transformers' own chat. !help lists its commands; !exit or Ctrl-D ends it.

    A model that was not trained to chat continues what was said as one plain text.
    """
    from ..serving import require

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
    or_exit(require)
    run_chat = or_exit(_transformers_chat)
    or_exit(lambda: _check_flags(generate_flags or []))
    name = Path(model).resolve().name if Path(model).is_dir() else model  # !save makes a folder of this name
    failure: Exception | None = None
    try:
        with served(model, wanted, host="127.0.0.1", port=0, name=name, profile_out=profile_out) as server:
            _ask_nobody_else()
            try:
                with on_signals(_interrupt):
                    run_chat(name, server.url, generate_flags, user="you", system_prompt=system_prompt)
            except (EOFError, KeyboardInterrupt):
                typer.echo("")  # the prompt's line is not ended yet
            except Exception as error:
                failure = error
    except KeyboardInterrupt:
        fail("interrupted", 130)
    if failure is not None:
        fail(f"the chat ended with {_words(failure)}", 1)


def _words(failure: Exception) -> str:
    """What its client raises holds the server's error as OpenAI writes it."""
    told = failure.args[0] if failure.args else None
    if isinstance(told, dict) and {"type", "message"} <= set(told):
        return f"{told['type']}: {told['message']}"
    return f"{type(failure).__name__}: {failure}"


def _transformers_chat() -> Any:
    try:
        from transformers.cli.chat import Chat
    except ImportError as error:
        raise ServeError(f"transformers' chat needs {error.name}: pip install {error.name}") from error
    return Chat


def _check_flags(flags: list[str]) -> None:
    """Before the model is loaded; and a name that `generate` does not know, which transformers' chat would ignore."""
    from transformers import GenerationConfig
    from transformers.cli.chat import parse_generate_flags

    try:
        unknown = GenerationConfig().update(**parse_generate_flags(flags))
    except (ValueError, typer.BadParameter) as error:
        raise ConfigError(f"{' '.join(flags)}: {str(error).splitlines()[0]}") from error
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: no setting of generate; max_new_tokens, do_sample, temperature are")


def _ask_nobody_else() -> None:
    """From here on this process talks to its own server only: not through a proxy, nor barred by HF_HUB_OFFLINE."""
    from huggingface_hub import set_async_client_factory
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    os.environ.update(NO_PROXY="*", no_proxy="*")
    set_async_client_factory(lambda: httpx.AsyncClient(timeout=None))


def _interrupt(*_: object) -> NoReturn:
    """With Python's own handler asyncio would take Ctrl-C for itself, and act on it when the line that a person is
    typing has ended."""
    raise KeyboardInterrupt
