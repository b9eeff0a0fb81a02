"""What tells a file apart from its replacement, and from itself after its bytes have changed.

Size and time of modification are not enough: whoever writes in place can put the time back (`touch -r`). The time of
the last status change (ctime) cannot be put back, but it also moves when the bytes stay: chmod, a new or removed name
(`ln`, `rm`, a rename onto it), a rename of the file. Each of these shows in something else as well, so

    ctime moved, and permissions, owner or number of names did, too      the same bytes: go on, from the new ctime
    ctime moved, and the name no longer leads to the file                it was renamed: likewise, once
    ctime moved, and nothing shows why                                   it may have been rewritten: not used

The last also refuses a change of extended attributes, or of times, that left the bytes alone: any doubt is an error.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileStamp:
    """`attributes`: number of names, permissions, owner and group. `named`: its name still leads to it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    attributes: tuple[int, int, int, int]
    named: bool

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        """The stamp of an open file. Raises OSError."""
        s = os.fstat(descriptor)
        attributes = (s.st_nlink, s.st_mode, s.st_uid, s.st_gid)
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, attributes, s.st_nlink > 0)

    def followed_by(self, found: FileStamp, path: Path) -> FileStamp | None:
        """The stamp to compare with from now on where `found` is surely of the same bytes; else None."""
        if (found.device, found.inode, found.size, found.mtime_ns) != (
            self.device,
            self.inode,
            self.size,
            self.mtime_ns,
        ):
            return None
        if found.ctime_ns == self.ctime_ns:
            return self
        named = self.named and found.leads_from(path)
        if found.attributes != self.attributes or named != self.named:
            return dataclasses.replace(found, named=named)
        return None

    def leads_from(self, path: Path) -> bool:
        """Whether `path` is a name of this file."""
        try:
            s = path.stat()
        except OSError:
            return False
        return (s.st_dev, s.st_ino) == (self.device, self.inode)
