"""What is looked at before torch is imported, which takes seconds: settings, inputs, and the files to be written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...checkpoint.folder import is_folder
from ...config.settings import DEFAULT, OffloadConfig, from_text, origins, resolve
from ...config.sizes import parse_share
from ...errors import ConfigError
from .ending import fail, or_exit


def settings(config_file: Path | None, **flags: Any) -> OffloadConfig:
    """The settings in force: flags (None is not given), environment, file; one line and exit code 2 if they fail."""
    given = {name: flag for name, flag in flags.items() if flag is not None}
    read = {name: from_text(name, flag) if isinstance(flag, str) else flag for name, flag in given.items()}
    return or_exit(lambda: resolve(config_file, **read))


def live_or_default(live: bool | None, config_file: Path | None) -> bool | None:
    """The flag `--live` of a command that runs a model. Not given, it is on unless a setting says otherwise."""
    unsaid = live is None and or_exit(lambda: origins(config_file))["live"] == DEFAULT
    return True if unsaid else live


def check_inputs(model: str, wanted: OffloadConfig) -> None:
    """A model or a profile that is not there is refused before torch and transformers are imported, which takes
    seconds."""
    or_exit(lambda: is_folder(model))
    if wanted.profile is not None:
        from ...observe.profile import Profile

        or_exit(lambda: Profile.load(str(wanted.profile)))


def residency_share(text: str) -> float:
    """`--residency`, the share of experts that is kept: 25% or 0.25."""
    try:
        return parse_share(text)
    except ConfigError as error:
        fail(f"--residency {error}", 2)


def check_output(flag: str, out: Path | None) -> None:
    """Whether the file `out` can be written is asked before minutes of work, not after."""
    if out is None:
        return
    folder = out.resolve().parent
    if not folder.is_dir():
        fail(f"{flag} {out}: its folder does not exist", 2)
    if out.exists() and not out.is_file():
        fail(f"{flag} {out}: that is {'a folder' if out.is_dir() else 'no ordinary file'}; name a file", 2)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"{flag} {out}: nothing can be written in its folder ({error.strerror}); choose another", 2)
