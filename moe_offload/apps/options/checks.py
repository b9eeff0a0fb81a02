"""Checks before torch is imported, which takes seconds: settings, inputs, and files to be written."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...checkpoint.folder import ABSENT, INDEX, LFS_POINTER, SINGLE, is_folder, unknown_model_type, without_weights
from ...config.device_map import AUTO, TIERS, device_name, refuse_absent
from ...config.settings import DEFAULT, OffloadConfig, find_origins, from_text, resolve_settings
from ...config.sizes import parse_share
from ...config.usage import profile_path
from ...errors import CheckpointError, ConfigError, ProfileError
from ...files.untrusted import open_regular, read_bounded
from ...files.whole_file import describe_error

#: The names of what a model is loaded from.
OF_CHECKPOINT = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|gguf|model|py|jinja)|"
    r"(.*config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template)\.json"
)
MAX_JSON_BYTES = 100_000_000  # an index of a thousand shards has a tenth of that
#: A tokenizer is in one of these; tokenizer_config.json alone names only its class.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "spiece.*")


def settings_of_flags(config_file: Path | None, **flags: Any) -> OffloadConfig:
    """The settings in force: flags (None is not given), environment, file. Raises ConfigError, or ProfileError for a
    profile that cannot be used, naming the file or variable that asks for it."""
    given = {name: flag for name, flag in flags.items() if flag is not None}
    found = resolve_settings(config_file, **{n: from_text(n, f) if isinstance(f, str) else f for n, f in given.items()})
    if (path := profile_path(found.profile)) is not None:
        check_profile(path, "" if "profile" in given else f"{find_origins(config_file)['profile']}: ")
    return found


def check_profile(path: str | Path, asked_by: str = "") -> None:
    """Read a profile to see that it can be used. Raises ProfileError, whose message begins with `asked_by`."""
    from ...observe.profile import Profile

    try:
        Profile.load(str(path))
    except ProfileError as error:
        raise ProfileError(f"{asked_by}{error}") from error


def live_or_default(live: bool | None, config_file: Path | None) -> bool | None:
    """The flag `--live` of a command that runs a model. Not given, it is on unless a setting says otherwise."""
    return True if live is None and find_origins(config_file)["live"] == DEFAULT else live


def check_model(model: str, *, weights: bool = True, revision: str | None = None) -> None:
    """What can be told of a local checkpoint without torch: whether its files are whole, not quantised, and of a model
    that transformers has. Without `weights` there need be none; a folder has no `revision`.

    Raises CheckpointError, UnsupportedModelError or ConfigError.
    """
    if not is_folder(model):
        return
    if revision is not None:
        raise ConfigError(
            f"--revision {revision}: {model} is a folder, which has no revisions; leave it out, or name a repository"
        )
    folder = Path(model)
    said = _read_json(folder / "config.json")
    _check_model_type(folder, said)
    shards, listed_in = _shards(folder, said.get("transformers_weights"))
    if weights and not shards:
        if (folder / INDEX).is_file():
            raise CheckpointError(f"{folder / INDEX}: it lists no file that is there; download the weights")
        raise without_weights(folder, f"model.safetensors or {INDEX}")
    for file in shards:
        if file.name == ABSENT:
            continue  # a packed checkpoint: its experts lie in files of their own
        if not file.exists():
            raise CheckpointError(f"{file}: {listed_in} lists this file, and it is not there; download it")
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            if _is_lfs_pointer(file):
                raise CheckpointError(f"{file}: it is a pointer of Git LFS, not the file; run git lfs pull") from error
            raise CheckpointError(f"{file}: it is damaged ({error}); download it again") from error


def _check_model_type(folder: Path, said: dict[str, Any]) -> None:
    """Whether transformers has the model, by its tables of all models, which are files that need no torch."""
    model_type, package = said.get("model_type"), find_spec("transformers")
    if not isinstance(model_type, str) or said.get("auto_map") or package is None or package.origin is None:
        return  # transformers itself says what is wrong, or what it finds in the model's own code
    tables = (Path(package.origin).parent / "models" / "auto").glob("*.py")
    if not any(json.dumps(model_type) in table.read_text(encoding="utf-8") for table in tables):
        raise unknown_model_type(folder, model_type)


def check_devices(wanted: OffloadConfig) -> None:
    """Whether the settings ask to compute where this version does not. Raises UnsupportedModelError, or ConfigError."""
    if wanted.untested:
        return  # what torch has is for torch to say
    asked = wanted.device_map
    places: list[Any] = list(asked.values()) if isinstance(asked, Mapping) else [asked or AUTO]
    if asked in (None, AUTO):
        places += [device for device in wanted.max_memory or {} if str(device) not in TIERS]
    named = {device_name("", place): None for place in places}
    refuse_absent((device for device in named if device != "cpu"), ["cpu"])


def check_cuda() -> None:
    """Raises ConfigError where the bench cannot measure on a GPU for want of a driver: torch says so, seconds later."""
    built = version("torch")
    if "+rocm" in built:
        return
    try:
        ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        raise ConfigError(
            f"--device cuda: torch {built} finds no CUDA device here (there is no driver); leave --device out to "
            "measure on the CPU"
        ) from None


def _is_lfs_pointer(file: Path) -> bool:
    try:
        with open_regular(file) as (opened, _):
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except (OSError, ValueError):
        return False


def _shards(folder: Path, named: Any) -> tuple[list[Path], str]:
    """The files that will be read, in transformers' order of preference, and what lists them; none where only a plan is
    possible. `named` is what config.json says of them."""
    if isinstance(named, str) and named == Path(named).name and named.endswith(".safetensors"):
        return [folder / named], "transformers_weights in config.json"
    if named is None and (folder / SINGLE).is_file():
        return [folder / SINGLE], ""
    index = folder / INDEX
    if named is not None or not index.is_file():
        return sorted(folder.glob("*.safetensors")), ""
    listed = _read_json(index).get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    found = [folder / name for name in names if isinstance(name, str)]
    return found if any(folder.glob("*.safetensors")) else [], "the index"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(file, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: it cannot be read as JSON ({describe_error(error)}); download it again"
        ) from error
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
    if out.exists() and (folder / "config.json").is_file() and OF_CHECKPOINT.fullmatch(out.resolve().name):
        raise ConfigError(f"{flag} {out}: that is a file of a checkpoint, which would be lost; name another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {out}: nothing can be written in its folder ({error.strerror}); choose another"
        ) from error
