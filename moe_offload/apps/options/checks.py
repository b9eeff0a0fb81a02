"""What is looked at before torch is imported, which takes seconds: settings, inputs, and the files to be written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...checkpoint.folder import ABSENT, LFS_POINTER, is_folder
from ...config.settings import DEFAULT, OffloadConfig, from_text, origins, resolve
from ...config.sizes import parse_share
from ...errors import CheckpointError, ConfigError, ProfileError
from ...files.untrusted import open_regular, read_bounded
from ...files.whole_file import reason

MAX_JSON_BYTES = 100_000_000  # an index of a thousand shards has a tenth of that
#: A tokenizer is in one of these; tokenizer_config.json alone names only its class.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "spiece.*")


def settings(config_file: Path | None, **flags: Any) -> OffloadConfig:
    """The settings in force: flags (None is not given), environment, file. Raises ConfigError, or ProfileError for a
    profile that cannot be used, naming the file or variable that asks for it."""
    given = {name: flag for name, flag in flags.items() if flag is not None}
    found = resolve(config_file, **{n: from_text(n, f) if isinstance(f, str) else f for n, f in given.items()})
    if found.profile is not None:
        check_profile(found.profile, "" if "profile" in given else f"{origins(config_file)['profile']}: ")
    return found


def check_profile(path: str | Path, asked_by: str = "") -> None:
    """Raises ProfileError, which begins with `asked_by`."""
    from ...observe.profile import Profile

    try:
        Profile.load(str(path))
    except ProfileError as error:
        raise ProfileError(f"{asked_by}{error}") from error


def live_or_default(live: bool | None, config_file: Path | None) -> bool | None:
    """The flag `--live` of a command that runs a model. Not given, it is on unless a setting says otherwise."""
    return True if live is None and origins(config_file)["live"] == DEFAULT else live


def check_model(model: str) -> None:
    """What can be told of a local checkpoint without torch: whether its files are whole, and not quantised.

    Raises CheckpointError or UnsupportedModelError.
    """
    if not is_folder(model):
        return
    folder = Path(model)
    _read_json(folder / "config.json")
    for file in _shards(folder):
        if file.name == ABSENT:
            continue  # a packed checkpoint: its experts lie in files of their own
        if not file.exists():
            raise CheckpointError(f"{file}: the index lists this file, and it is not there; download it")
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            if _is_lfs_pointer(file):
                raise CheckpointError(f"{file}: it is a pointer of Git LFS, not the file; run git lfs pull") from error
            raise CheckpointError(f"{file}: it is damaged ({error}); download it again") from error


def _is_lfs_pointer(file: Path) -> bool:
    try:
        with open_regular(file) as (opened, _):
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except (OSError, ValueError):
        return False


def _shards(folder: Path) -> list[Path]:
    """The shards that the index lists, else all there are; none where only a plan is possible."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    listed = _read_json(index).get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    return [folder / name for name in names if isinstance(name, str)] if any(folder.glob("*.safetensors")) else []


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(file, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: it cannot be read as JSON ({reason(error)}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: it holds no JSON object; download it again")
    return found


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
