"""A folder, or a checkpoint in one, that appears complete or not at all.

Everything is made in a hidden folder beside, or inside, the wanted one. A new folder then gets its name in one rename.
A checkpoint may take the place of an older one, whose files have the same names, and no rename moves several files.
So the new one comes in under names of its own, and config.json, which can name its weights, is what changes hands:

    model-3f2a9c01-00001-of-00002.safetensors, ... and an index of them       nobody looks at these yet
    config.json: the new one, + "transformers_weights": that index,           from here on it is the new one: all at one
    generation_config.json, ...                                               moment (files/switch.py)
    old index, shards, model.safetensors                                      kept aside
    model-00001-of-00002.safetensors, ..., model.safetensors.index.json       the same files, by their usual names
    config.json: without "transformers_weights", and the other small files
    model-3f2a9c01-...                                                        gone

An error or Ctrl-C takes all of it back. A kill at any moment, which takes nothing back, leaves a folder that
transformers and moe_offload load as the old checkpoint or as the new one. (Where a file system has no symbolic links
the small files beside config.json are replaced one by one, just before it.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.sizes import format_size
from ..errors import OffloadError, PackError, SaveError
from ..files.moves import Moves, NotTakenBack, all_or_nothing
from ..files.staging import staging_folder
from ..files.switch import NEW, Switch, settle_links
from ..files.whole_file import describe_error, sync_file, sync_folder
from .folder import INDEX

if TYPE_CHECKING:  # these import torch, which takes seconds: a folder that cannot be written is refused before
    from .headers import Headers

CONFIG, SINGLE, POINTER = "config.json", "model.safetensors", "transformers_weights"
ASIDE = ".aside"  # in the hidden folder: what is replaced, until all is done
#: Weights as transformers, `pack_checkpoint` and this file name them, and what says where they are.
_WEIGHTS = re.compile(
    r"(model(-[0-9a-f]{8})?|moe_offload_rows)(-\d{5}-of-\d{5})?\.safetensors|model(-[0-9a-f]{8})?\.safetensors\.index\.json"
    r"|PACKED\.md"
)


def folder_to_write(named: str | os.PathLike[str], error: type[OffloadError]) -> Path:
    """The path of a folder that is to be written. Raises `error` for an empty text, which as a path is the working
    directory, and nobody has named that."""
    if not os.fspath(named):
        raise error("the path of the folder to be written is empty; name a folder")
    return Path(named)


def check_new(out: Path) -> None:
    """Raise `PackError` unless a folder `out` can be made: nothing there, or an empty folder; something above it."""
    if out.is_dir() and not out.is_symlink():
        if next(out.iterdir(), None) is not None:
            raise PackError(f"{out}: exists and is not empty; nothing in it is touched. Remove it or give another name")
    elif out.exists() or out.is_symlink():
        raise PackError(f"{out}: a folder is to be written there, but it is a file or a link. Give another name")
    elif not out.absolute().parent.is_dir():
        raise PackError(f"{out}: the folder {out.parent} it is to be in does not exist. Make it first")


@contextlib.contextmanager
def new_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A hidden folder next to `out`, to be filled; renamed to `out` at the end, after everything has reached the disk.

    An error or an interruption removes it instead. Raises `PackError` stating bytes needed and free when there is no
    room, and for any other `OSError` of the body.
    """
    check_new(out)
    with _hidden_folder(out, out.absolute().parent, needed_bytes, PackError) as folder:
        yield folder
        _sync_files(folder)
        try:
            folder.rename(out)
            sync_folder(out.absolute().parent)
        except BaseException:
            with contextlib.suppress(OSError):  # it was not renamed yet
                out.rename(folder)
            raise


@contextlib.contextmanager
def new_checkpoint(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to be filled; its files take the place of those in `out` at the end, as said above.

    Raises `SaveError` stating bytes needed and free when there is no room, and for any other `OSError` of the body.
    """
    if out.exists() and not out.is_dir():
        raise SaveError(f"{out}: a folder is to be written there, but it is a file. Give another name")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{out}: cannot be made: {describe_error(error)}. Give a folder that may be written") from error
    try:
        with _hidden_folder(out, out, needed_bytes, SaveError) as folder:
            settle_links(out)
            yield folder
            _sync_files(folder)
            with all_or_nothing(folder / ASIDE) as moves:
                _take_place(folder, out, moves)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # other files have come meanwhile
                out.rmdir()
        raise


def write_index(folder: Path, headers: Headers, num_parameters: int) -> None:
    total_bytes = sum(found.nbytes for found in headers.values())
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total_bytes},
        "weight_map": {key: found.file.name for key, found in headers.items()},
    }
    (folder / INDEX).write_text(_json(index), encoding="utf-8")


def _take_place(folder: Path, out: Path, moves: Moves) -> None:
    """Move what is in `folder` to `out`, the old weights of `out` out of the way; config.json last, or in its turn."""
    new = sorted(file.name for file in folder.iterdir() if file.name != ASIDE)
    weights = [name for name in new if _WEIGHTS.fullmatch(name)]
    small = sorted({*new} - {*weights}, key=lambda name: name == CONFIG)
    old = sorted(file.name for file in out.iterdir() if _WEIGHTS.fullmatch(file.name)) if weights else []
    if weights and CONFIG in new and (out / CONFIG).exists():
        _under_own_names(folder, weights, out, moves)
        _change_hands(folder, small, weights, old, out, moves)
    elif weights:
        for name in old:
            moves.remove(out / name)
        for name in (*weights, *small):
            moves.put(folder / name, out / name)
    else:
        _switch(folder, small, out, moves).finish()
    sync_folder(out)


def _switch(folder: Path, small: list[str], out: Path, moves: Moves, config: Mapping[str, Any] | None = None) -> Switch:
    """From here on the small files of `out` are those of `folder`; till the end, config.json says `config`."""
    switch = Switch(folder, small, out, moves)
    linked = switch.prepare()
    if config is not None:
        moves.put_text(_json(config), switch.place / NEW / CONFIG)
    if linked:
        switch.turn()
    else:
        for name in small:
            moves.put(switch.place / NEW / name, out / name)
    sync_folder(out)
    return switch


def _under_own_names(folder: Path, weights: list[str], out: Path, moves: Moves) -> None:
    """The new weights as nothing in `out` is called, and where there are several an index of them."""
    for name in weights:
        if name != INDEX:
            moves.put(folder / name, out / _own(name, folder))
    if INDEX in weights:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {key: _own(name, folder) for key, name in index["weight_map"].items()}
        moves.put_text(_json(index), out / _own(INDEX, folder))
    sync_folder(out)


def _change_hands(folder: Path, small: list[str], weights: list[str], old: list[str], out: Path, moves: Moves) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    pointed = {**config, POINTER: _own(INDEX if INDEX in weights else SINGLE, folder)}
    switch = _switch(folder, small, out, moves, pointed)
    for name in old:
        moves.remove(out / name)
    for name in weights:
        if name != INDEX:
            moves.link(out / _own(name, folder), out / name)
    if INDEX in weights:
        moves.put(folder / INDEX, out / INDEX)
    sync_folder(out)
    switch.finish()
    for name in weights:
        moves.remove(out / _own(name, folder))


def _own(name: str, folder: Path) -> str:
    """What the new file `name` is called while the old one may be there: of the hidden folder's own number."""
    return name.replace("model", f"model-{folder.name.split('.')[-2][-8:]}", 1)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def _hidden_folder(out: Path, parent: Path, needed_bytes: int, error: type[OffloadError]) -> Iterator[Path]:
    """A folder in `parent` where what is meant for `out` is made. It is gone in the end, whatever happens.

    Raises `error` stating bytes needed and free when there is no room, before anything is written if that can be told,
    and for any other `OSError` of the body.
    """
    kept = Path()
    try:
        with staging_folder(parent, out.absolute().name) as folder:
            space = shutil.disk_usage(parent)
            if space.total and space.free < needed_bytes:  # /proc has no bytes at all, and is not full
                raise OSError(errno.ENOSPC, "the disk is too full")
            try:
                yield folder
            except NotTakenBack:
                kept = folder.with_suffix(".kept")
                folder.rename(kept)
                raise
    except NotTakenBack as found:
        raise error(
            f"{out}: cannot be written, and not all of what was there could be put back: {describe_error(found)}. The "
            f"rest of it is in {kept / ASIDE}; move it back by hand"
        ) from found
    except OSError as found:
        raise error(
            f"{out}: cannot be written: {describe_error(found)}. {_advice(out, needed_bytes, found)}"
        ) from found


def _advice(out: Path, needed_bytes: int, error: OSError) -> str:
    """What to do, once what was written is gone again."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None):
        return "Nothing was left behind, and what was there before is unchanged; give a folder that may be written"
    try:
        free_bytes = shutil.disk_usage(out.absolute().parent).free
        free = f"{free_bytes} bytes ({format_size(free_bytes)}) are free"
    except OSError:
        free = "how much is free cannot be told"
    return (
        f"It needs {needed_bytes} bytes ({format_size(needed_bytes)}), {free}. Nothing was left behind, and what was "
        "there before is unchanged; free some space, or give a folder on another disk"
    )


def _sync_files(folder: Path) -> None:
    """See every file of `folder`, and their names, to the disk."""
    for file in folder.iterdir():
        sync_file(file)
    sync_folder(folder)
