"""moe-offload config."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...config import file as files
from ...config.settings import OffloadConfig, active_file, find_origins, from_text, resolve_settings
from ...config.usage import profile_path
from ...errors import ConfigError, ProfileError
from ..options.checks import check_profile
from ..options.flags import ConfigFile, Json
from ..options.groups import flatten_groups
from .setting_flags import SettingFlags

#: What is asked, in this order: what most people want to say once for a machine. The rest have flags.
QUESTIONS = {
    "budget": "How much memory may a model hold on the device it computes on (8GB, 8GiB, 50%, auto)?",
    "max_memory": "Limits per device, as {cpu: 60GiB}?",
    "device_map": "Where do experts rest (auto, disk, cpu, or a mapping)?",
    "profile": "Which experts to expect (auto: those used before; off; a workload's name; the path of a profile)?",
    "kv_tokens": "Tokens of KV cache to make room for?",
    "compile": "What runs the rewritten graph (auto, graph, inductor)?",
    "offload_folder": "A folder for the experts of models that are already loaded?",
}
NOTHING = "none"


@flatten_groups
def config(
    flags: SettingFlags,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: flags, else what is there already.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Write nothing; print what is in force, and why.")] = False,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Write the file of settings that every command and optimize() read (asks, like accelerate config), or show it."""
    if show:
        _show(config_file, as_json)
        return
    path = config_file or files.default_path()
    old = OffloadConfig.from_dict(files.read_settings(path)) if path.exists() else OffloadConfig()
    typed = {name: _value(name, text) for name, text in dataclasses.asdict(flags).items() if text is not None}
    values = OffloadConfig.from_dict({**old.to_dict(), **typed})
    if "profile" in typed:
        _check_profile(values)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                "standard input is no terminal to ask questions on: give --yes, with flags for what to write"
            )
        values = _ask(values, skip=set(typed), prompt=typer.prompt)
    files.write_settings(path, values.changed())
    typer.echo(f"settings written to {path}", err=True)
    typer.echo(path.read_text(), nl=False)
    if active_file() != path:
        typer.echo(f"to use them: --config-file {path}, or export MOE_OFFLOAD_CONFIG_FILE={path}", err=True)


def _ask(values: OffloadConfig, skip: set[str], prompt: Callable[..., str]) -> OffloadConfig:
    """Each question until its answer is accepted; Enter keeps what is shown."""
    for name, question in QUESTIONS.items():
        while name not in skip:
            now = getattr(values, name)
            shown = NOTHING if now is None else now if isinstance(now, str | int) else json.dumps(now)
            try:
                answer = _value(name, str(prompt(question, default=str(shown))))
                asked = OffloadConfig.from_dict({**values.to_dict(), name: answer})
                if name == "profile" and asked.profile != values.profile:
                    _check_profile(asked)
                values = asked
                break
            except (ConfigError, ProfileError) as error:
                typer.echo(f"  {error}", err=True)
    return values


def _check_profile(values: OffloadConfig) -> None:
    if (path := profile_path(values.profile)) is not None:
        check_profile(path)


def _value(name: str, text: str) -> Any:
    return None if text.strip().lower() == NOTHING else from_text(name, text.strip())


def _show(config_file: Path | None, as_json: bool) -> None:
    settings, where = resolve_settings(config_file), find_origins(config_file)
    file = active_file(config_file)
    typer.echo(f"file: {file or f'none; {files.default_path()} is not there'}", err=True)
    if as_json:
        typer.echo(json.dumps({name: {"value": v, "from": where[name]} for name, v in settings.to_dict().items()}))
        return
    for name, value in settings.to_dict().items():
        typer.echo(f"{name:<24}{value!s:<24}  {where[name]}")
