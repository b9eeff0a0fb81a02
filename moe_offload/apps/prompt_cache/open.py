"""What `--prompt-cache` says becomes a `PromptCache`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import typer

from ...config.settings import OffloadConfig
from ...errors import ConfigError
from ...files.whole_file import describe_error
from ...plan.weights import planned_context
from .cache import PromptCache, new_cache
from .folder import PromptFolder
from .model import identify_model

MEMORY = "memory"


def check_folder(said: str | None) -> None:
    """Raise ConfigError where a folder that was given cannot be made or written: before anything is loaded."""
    if said is None or said == MEMORY:
        return
    if not said.strip():  # an empty variable of a script would be the current folder
        raise ConfigError(f"--prompt-cache {said!r}: give the name of a folder, or {MEMORY}")
    try:
        Path(said).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=said):  # as that of a model will be
            pass
    except OSError as error:
        raise ConfigError(
            f"--prompt-cache {said}: it cannot be made or written ({describe_error(error)}); give a folder that may be "
            f"written, or {MEMORY}"
        ) from error


def open_prompt_cache(model: Any, wanted: OffloadConfig, said: str | None) -> PromptCache | None:
    """The prompt cache of `model`, which was loaded as `wanted`; None where each prompt is to be read whole.

    Which it is unless somebody asks: products of another number of rows round otherwise, so what goes on from a cache
    is not to the bit what is read in one piece, whatever is kept (docs/prompt-cache.md has how often tokens differ).
    """
    if said is None:
        return None
    prompts = PromptCache(model, planned_context(model, wanted) or 0)
    if prompts.why_off:
        typer.echo(f"moe-offload: each prompt is read from its beginning: {prompts.why_off}", err=True)
        return None
    if said != MEMORY:
        prompts.folder = PromptFolder(Path(said), identify_model(model, wanted.compute), partial(new_cache, model))
    return prompts
