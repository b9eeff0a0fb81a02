"""A checkpoint made beside what a folder has, which takes its place all at once, or as nearly so as files can."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import SaveError
from .headers import INDEX, Headers
from .staging_folder import staging, sync, sync_files

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@contextlib.contextmanager
def new_checkpoint(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to be filled; its files take the place of a checkpoint in `out` at the end, the index last."""
    if out.exists() and not out.is_dir():
        raise SaveError(f"{out}: a folder is to be written there, but it is a file. Give another name")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{out}: cannot be made: {error}. Give a folder that may be written") from error
    try:
        with staging(out, out, needed_bytes, SaveError) as folder:
            yield folder
            sync_files(folder)
            _take_place(folder, out)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # other files have come meanwhile
                out.rmdir()
        raise


def _take_place(folder: Path, out: Path) -> None:
    """Move what is in `folder` to `out`. Until the index is there, nothing can take `out` for a checkpoint."""
    for old in (INDEX, "model.safetensors"):
        (out / old).unlink(missing_ok=True)
    for file in out.iterdir():
        if _SHARD.fullmatch(file.name):
            file.unlink()
    names = sorted((file.name for file in folder.iterdir()), key=lambda name: name == INDEX)
    for name in names:
        (folder / name).replace(out / name)
    sync(out)


def write_index(folder: Path, headers: Headers, num_parameters: int) -> None:
    total_bytes = sum(found.nbytes for found in headers.values())
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total_bytes},
        "weight_map": {key: found.file.name for key, found in headers.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
