"""Where a checkpoint is: a folder here, or a repository on the Hub. Knows no torch: a wrong path is refused at once."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def is_folder(path_or_id: str | Path) -> bool:
    """Whether this is a local checkpoint folder; if not, it is to be looked for on the Hub.

    Raises `CheckpointError` for what can be neither, and for a folder without config.json.
    """
    path = Path(path_or_id)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path_or_id}: there is no config.json in it; give the folder of a checkpoint")
        return True
    if path.exists() or str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") > 1:
        found = "found a file" if path.exists() else "there is nothing there"
        raise CheckpointError(f"{path_or_id}: expected a checkpoint folder (config.json, *.safetensors), {found}")
    return False
