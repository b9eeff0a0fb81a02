"""moe-offload chat: a line is read, the answer written as it comes, then a line about its speed; and so on."""

from __future__ import annotations

import sys
from typing import Any

import typer

from ..options.checks import check_model, check_output, check_tokenizer
from ..options.flags import Model, PromptCacheOption, SaveProfile, System
from ..options.groups import ModelFlags, SamplingFlags, flatten_groups


@flatten_groups
def chat(
    model: Model,
    flags: ModelFlags,
    sampling: SamplingFlags,
    system: System = None,
    prompt_cache: PromptCacheOption = None,
    save_profile: SaveProfile = None,
) -> None:
    """Talk to a model inside a budget. Ctrl-C ends an answer; !help lists what else there is; !exit or Ctrl-D ends.

    Without a sampling flag the model's own settings count. A model that was not trained to chat continues what was said
    as one plain text.
    """
    wanted = flags.settings()
    check_model(model, revision=flags.revision)
    check_tokenizer(model)
    check_output("--save-profile", save_profile)
    from ...api import from_pretrained
    from ...plan.weights import planned_context
    from ..prompt_cache.open import check_folder, open_prompt_cache
    from .conversation import HELP, Conversation
    from .tokenizer import load_tokenizer

    check_folder(prompt_cache)
    flags.set_threads()
    tokenizer = load_tokenizer(model, **flags.hub())
    loaded: Any = from_pretrained(model, config=wanted, **flags.loading(model))
    with loaded.moe_offload as handle:
        typer.echo(str(handle.plan), err=True)
        prompts = open_prompt_cache(loaded, wanted, prompt_cache)
        talk = Conversation(loaded, tokenizer, sampling, system, planned_context(loaded, wanted), prompts)
        if tokenizer.chat_template is None:
            typer.echo("The model has no chat template: it continues what was said as one plain text.", err=True)
        typer.echo(HELP, err=True)
        try:
            _take_turns(talk)
        finally:
            if prompts is not None:
                prompts.save()
            typer.echo(handle.summary(), err=True)
            if save_profile is not None:
                typer.echo(f"profile saved to {handle.save_profile(save_profile)}", err=True)


def _take_turns(talk: Any) -> None:
    """Read and answer lines until the end of input, or !exit. Ctrl-C while a line is typed drops the line."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  which lets input() edit and remember lines
    while True:
        try:
            line = _read_line()
            if line is None or not talk.take(line):
                return
        except KeyboardInterrupt:
            typer.echo("\n!exit or Ctrl-D ends the chat", err=True)


def _read_line() -> str | None:
    """What is typed next; None at the end of input. A byte that is no UTF-8 becomes a replacement character."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        typer.echo("", err=True)
        return None
    return line.encode("utf-8", "replace").decode("utf-8")
