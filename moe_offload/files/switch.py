"""Several small files of a folder are replaced at one moment: after a kill all are the old ones, or all the new ones.

A rename replaces one file. So for a while each name is a link by way of one other link, and that is what is replaced:

    config.json            -> .moe_offload-x.switch/now/config.json
    generation_config.json -> .moe_offload-x.switch/now/generation_config.json
    .moe_offload-x.switch/now -> old                                         then, in one rename, -> new
    .moe_offload-x.switch/old/, new/                                         the files of either side

A name that one side does not have is a link to nothing there, which readers take for no file. After a kill the links
stay and are read through; the next run puts files in their places.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from .moves import Moves, link_or_copy
from .staging import PARTIAL
from .whole_file import sync_file, sync_folder

NOW, OLD, NEW = "now", "old", "new"
_LINK = re.compile(r"(\.moe_offload-[^/]+-[0-9a-f]{8})\.switch/now/[^/]+")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)  # what file systems without them say


class Switch:
    """The files `names` of `folder` are to be those of `out`: `prepare`, `turn`, and when all else is done `finish`.

    Args:
        folder: a staging folder in `out`; the folder behind the links is named after it.
        moves: what takes all of it back.
    """

    def __init__(self, folder: Path, names: Sequence[str], out: Path, moves: Moves):
        self.folder, self.names, self.out, self.moves = folder, names, out, moves
        self.place = folder.with_suffix(".switch")

    def prepare(self) -> bool:
        """Put links in the places of the names, to what is there now. Returns False where there are no links."""
        self.moves.make_folder(self.place)
        for side, source in ((OLD, self.out), (NEW, self.folder)):
            (self.place / side).mkdir()
            for name in self.names:
                if (source / name).exists():
                    _copy(source / name, self.place / side / name)
            sync_folder(self.place / side)
        try:
            (self.place / NOW).symlink_to(OLD)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
        sync_folder(self.place)
        for name in self.names:
            self.moves.put_link(f"{self.place.name}/{NOW}/{name}", self.out / name)
        sync_folder(self.out)
        return True

    def turn(self) -> None:
        """From here on each name is the new file."""
        self.moves.put_link(NEW, self.place / NOW)
        sync_folder(self.place)

    def finish(self) -> None:
        """Put the files of `folder` in the places of the links."""
        for name in self.names:
            self.moves.put(self.folder / name, self.out / name)
        sync_folder(self.out)
        self.moves.remove(self.place)


def settle_links(out: Path) -> None:
    """Put files in the places of links that killed runs have left in `out`, on whichever side they were."""
    for link in list(out.iterdir()):
        found = _LINK.fullmatch(str(link.readlink())) if link.is_symlink() else None
        if found is None or (out / f"{found[1]}{PARTIAL}").exists():  # of a run that goes on
            continue
        if link.exists():
            file = link.resolve().parent.with_name("settled")
            file.unlink(missing_ok=True)
            _copy(link, file)
            file.replace(link)
        else:
            link.unlink()
    sync_folder(out)
    for place in out.glob(".moe_offload-*-????????.switch"):
        if not place.with_suffix(PARTIAL).exists():
            shutil.rmtree(place, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Let `target` be the file that `source` is, or is a link to."""
    link_or_copy(source.resolve(), target)
    sync_file(target)
