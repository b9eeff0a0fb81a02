"""Where a checkpoint is: a local folder, or a repository on the Hub. Without torch, so that a refusal comes at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from .quantised.methods import check_quantization

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: The file that the index of a packed checkpoint names for the experts. It is never written: its name tells people why.
ABSENT = "experts-are-packed-see-PACKED.md.safetensors"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that Git LFS left in place of another
CONFIG_BYTES = 10_000_000  # a larger file is not looked into here: transformers reads it, and says what is wrong
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # what a repository's name is made of


def is_folder(path_or_id: str | Path, subfolder: str = "") -> bool:
    """Whether this is a local checkpoint folder; if not, it is to be looked for on the Hub.

    Raises `CheckpointError` for what can be neither, for a folder without config.json, and `UnsupportedModelError` for
    a checkpoint that is quantised in a way that is not read.
    """
    try:
        path = Path(path_or_id)
    except TypeError:
        raise CheckpointError(
            f"expected the folder of a checkpoint or the name of a Hub repository, found {type(path_or_id).__name__}; "
            "give a text or a Path. A model that is loaded goes to optimize()"
        ) from None
    if not str(path_or_id):  # as a path it is the working directory, which nobody has named
        raise CheckpointError(
            "the path of the checkpoint is empty; give a folder ('.' for the working directory), or a Hub repository"
        )
    if path.is_dir():
        place = path / subfolder
        if not (place / "config.json").is_file():
            raise CheckpointError(_without_config(path, place))
        check_quantization(place, _read_config(place / "config.json"))
        return True
    if path.exists() or str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") > 1:
        found = "found a file" if path.exists() else "there is nothing there"
        if path.suffix == ".gguf":
            found += "; GGUF files are not read: give the folder of the original safetensors checkpoint"
        raise CheckpointError(f"{path_or_id}: expected a checkpoint folder (config.json, *.safetensors), {found}")
    if not REPOSITORY.fullmatch(str(path_or_id)):
        raise CheckpointError(
            f"{str(path_or_id)!r}: there is no folder of that name, and no Hub repository can have it; give the path "
            "of a checkpoint folder, or OWNER/NAME of letters, digits, '-', '_' and '.'"
        )
    return False


def unknown_model_type(place: Path | str, model_type: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{place}: config.json names model type {model_type[:64]!r}, which the installed transformers "
        f"({version('transformers')}) does not have. Install a version that has it"
    )


def without_weights(place: Path, wanted: str) -> CheckpointError:
    """For a folder that has no weights that are read here, saying what it has instead."""
    endings = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    there = sorted(file.name for file in place.iterdir() if file.suffix in endings) if place.is_dir() else []
    found = f"{', '.join(there[:4])}{' ...' if len(there) > 4 else ''}" if there else "neither"
    return CheckpointError(
        f"{place}: expected {wanted}, found {found if place.is_dir() else 'no such folder'}. "
        "Point at the folder of a safetensors checkpoint; .bin files (pickle) are not read: convert them by "
        "loading the model with transformers and calling save_pretrained. GGUF files are not read either"
    )


def _read_config(file: Path) -> Mapping[str, Any]:
    """What the file says, as far as it can be read: transformers says what is wrong with one that cannot."""
    try:
        with file.open("rb") as stream:
            said = json.loads(stream.read(CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _without_config(path: Path, place: Path) -> str:
    said = f"{place}: there is no config.json in it; give the folder of a checkpoint"
    if (place / "adapter_config.json").is_file():
        base = _read_config(place / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return (
            f"{place}: holds an adapter only (adapter_config.json), for the model {str(base)[:200]!r}. Load that with "
            f"moe_offload.from_pretrained(), and then call model.load_adapter({str(place)!r})"
        )
    if any(place.glob("*.gguf")):
        return f"{said}. GGUF files are not read: give the original safetensors checkpoint"
    inner = sorted(file.parent.name for file in path.glob("*/config.json"))[:3]
    return f"{said}" + (f", or subfolder={inner[0]!r} (there are {', '.join(inner)})" if inner else "")
