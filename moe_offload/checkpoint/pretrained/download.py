"""A folder with everything that is read of a checkpoint: the given one, or a download of just those files.

A repository often holds the same weights several times (`original/`, `consolidated.*`, other variants). First come the
small files, which say what the weights are called, and then those.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError
from ..folder import ABSENT, SINGLE, is_folder
from ..packed import ROWS
from .arguments import Arguments
from .weight_files import listed_names, with_variant

SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # never .bin, nor any other pickle
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def get_folder(path_or_id: str | Path, arguments: Arguments | None = None) -> Path:
    """The folder of a checkpoint, without its `subfolder`: a local one as it is, a repository's once downloaded.

    Raises `CheckpointError` where there is neither, and where the folder is no checkpoint.
    """
    arguments = arguments or Arguments()
    if is_folder(path_or_id, arguments.subfolder):
        return Path(path_or_id)
    return download_checkpoint(str(path_or_id), arguments)


def download_checkpoint(name: str, arguments: Arguments, **hub: Any) -> Path:
    """The snapshot of a repository on the Hub, with the files that are read of it. `hub` goes to huggingface_hub."""
    from huggingface_hub import snapshot_download

    hub = {**arguments.hub, **hub}
    inside = f"{arguments.subfolder}/" if arguments.subfolder else ""

    def fetch(*names: str, revision: str | None = None, only_at_top: bool = False) -> Path:
        said = {**hub, **({"revision": revision} if revision else {})}
        patterns = [glob.escape(inside) + name for name in names]
        ignored = [glob.escape(inside) + "*/*"] if only_at_top else None
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored, **said))

    small = (*SMALL, "*.py") if arguments.trust_remote_code else SMALL
    try:
        folder = fetch(*small, only_at_top=True)
        commit, place = folder.name, folder / arguments.subfolder  # the second download is of the same commit
        _refuse_other_code(name, place / "config.json", arguments)
        named = _named_in(place / "config.json")
        single = named if named and named.endswith(".safetensors") else with_variant(SINGLE, arguments.variant)
        fetch(*map(glob.escape, (single, *ADAPTER)), "additional_chat_templates/*.jinja", revision=commit)
        if not (place / single).is_file():
            listed = listed_names(place, variant=arguments.variant, named=named)
            rows = [f"{ROWS}-*.safetensors"] if ABSENT in listed else []
            fetch(*(glob.escape(file) for file in listed if file != ABSENT), *rows, revision=commit)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: neither a local folder nor a repository that can be reached on the Hub ({error})"
        ) from error
    return folder


def _refuse_other_code(name: str, config: Path, arguments: Arguments) -> None:
    """Code that lies beside the weights is downloaded with them, of their revision: another one would not be run."""
    entries = _said_in(config).get("auto_map")
    own = [entry for entry in (entries.values() if isinstance(entries, dict) else ()) if "--" not in str(entry)]
    if own and arguments.trust_remote_code and arguments.code_revision is not None:
        raise ConfigError(
            f"{name}: code_revision={arguments.code_revision!r} asks for other code than lies beside the weights "
            f"({own[0]}), which is downloaded with them; download that revision of the .py files into a folder with "
            "the weights, and give the folder"
        )


def _named_in(config: Path) -> str | None:
    named = _said_in(config).get("transformers_weights")
    return named if isinstance(named, str) else None


def _said_in(config: Path) -> dict[str, Any]:
    try:
        said = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return {}  # said in full where the configuration is read
    return said if isinstance(said, dict) else {}
