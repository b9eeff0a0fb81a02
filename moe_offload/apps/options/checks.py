"""What is looked at before torch is imported, which takes seconds: settings, inputs, and the files to be written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...checkpoint.folder import is_folder
from ...config.settings import DEFAULT, OffloadConfig, from_text, origins, resolve
from ...config.sizes import parse_share
from ...errors import CheckpointError, ConfigError

#: A tokenizer is in one of these; tokenizer_config.json alone names only its class.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "spiece.*")


def settings(config_file: Path | None, **flags: Any) -> OffloadConfig:
    """The settings in force: flags (None is not given), environment, file. Raises ConfigError."""
    given = {name: flag for name, flag in flags.items() if flag is not None}
    return resolve(config_file, **{n: from_text(n, f) if isinstance(f, str) else f for n, f in given.items()})


def live_or_default(live: bool | None, config_file: Path | None) -> bool | None:
    """The flag `--live` of a command that runs a model. Not given, it is on unless a setting says otherwise."""
    return True if live is None and origins(config_file)["live"] == DEFAULT else live


def check_inputs(model: str, wanted: OffloadConfig) -> None:
    """Whether the model and the profile are there. Raises CheckpointError or ProfileError."""
    is_folder(model)
    if wanted.profile is not None:
        from ...observe.profile import Profile

        Profile.load(str(wanted.profile))


def check_tokenizer(model: str) -> None:
    """Whether a local checkpoint brings a tokenizer (of a Hub repository nothing is known). Raises CheckpointError."""
    folder = Path(model)
    if is_folder(model) and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise CheckpointError(
            f"{model}: there is no tokenizer in it, and text needs one: copy tokenizer.json and tokenizer_config.json "
            "from the repository that the checkpoint comes from"
        )


def residency_share(text: str) -> float:
    """One share of `--residency`: 25% or 0.25. Raises ConfigError."""
    try:
        return parse_share(text)
    except ConfigError as error:
        raise ConfigError(f"--residency {error}") from None


def check_output(flag: str, out: Path | None) -> None:
    """Whether the file `out` can be written is asked before minutes of work, not after. Raises ConfigError."""
    if out is None:
        return
    folder = out.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} {out}: its folder does not exist")
    if out.exists() and not out.is_file():
        raise ConfigError(f"{flag} {out}: that is {'a folder' if out.is_dir() else 'no ordinary file'}; name a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {out}: nothing can be written in its folder ({error.strerror}); choose another"
        ) from error
