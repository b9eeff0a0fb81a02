"""Usage that is remembered from one start to the next: a profile in a file into which every run is mixed.

    <folder>/<model>-<fingerprint>/<workload>.json      `config/usage.py` says which folder, and which workload

Nothing but counts is kept. New uses are added to those that are there; once `KEPT_TOKENS` would be exceeded, the old
ones are scaled down to half as many first, so that they fade with tokens: last month never outvotes today. (Scaling
at each addition would do the same, and round every small count to nothing within some additions.)

Several processes may add to one file: each reads, mixes and replaces it while it holds a lock, so nothing is lost and
no reader finds half a file. A file that cannot be used is set aside and said, and never an error: it is only a prior.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from ..errors import ProfileError
from ..files.lock_file import held
from ..files.whole_file import describe_error
from .profile import Fingerprint, Profile, merge_profiles

logger = logging.getLogger("moe_offload")

KEPT_TOKENS = 8192
WAIT_S = 5.0  # for other processes: each holds the lock for some milliseconds
DAMAGED = ".damaged"


@dataclass(frozen=True)
class UsageFile:
    """Where the usage of one workload of one model is remembered."""

    folder: Path
    workload: str
    fingerprint: Fingerprint

    @classmethod
    def of_model(cls, folder: Path, model: str, workload: str, fingerprint: Fingerprint) -> UsageFile:
        """That of a model by its name and shape: another size of the same name has a folder of its own."""
        shape = hashlib.sha256(fingerprint.model_dump_json().encode()).hexdigest()[:12]
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in model)[:100]
        return cls(folder / f"{name}-{shape}", workload, fingerprint)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.workload}.json"

    def read(self) -> Profile | None:
        """What is remembered; None where there is nothing that can be used."""
        try:
            return self._load()
        except ProfileError:  # looked at again when no other process can be replacing it
            with contextlib.suppress(OSError), self._held():
                return self._load_or_set_aside()
        return None

    def add(self, new: Profile) -> None:
        """Mix `new` uses into what is there. Raises ProfileError where the file cannot be written."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._held():
                old = self._load_or_set_aside()
                (new if old is None else mixed(old, new)).save(self.path)
        except OSError as error:
            raise ProfileError(f"usage was not saved to {str(self.path)!r}: {describe_error(error)}") from error

    def _held(self) -> contextlib.AbstractContextManager[None]:
        return held(self.folder / ".lock", WAIT_S)

    def _load(self) -> Profile | None:
        if not self.path.exists():
            return None
        found = Profile.load(self.path)
        found.check(self.fingerprint)
        return found

    def _load_or_set_aside(self) -> Profile | None:
        try:
            return self._load()
        except ProfileError as error:
            aside = self.path.with_suffix(DAMAGED)
            self.path.replace(aside)
            logger.warning("remembered usage begins anew, the old file is kept as %s: %s", aside.name, error)
            return None


def mixed(old: Profile, new: Profile) -> Profile:
    """`new` uses in full, and the old ones beside them as long as there is room. What meta says anew counts."""
    fits = old.tokens + new.tokens <= KEPT_TOKENS
    weight = 1.0 if fits else min(1.0, KEPT_TOKENS / 2 / old.tokens)
    return merge_profiles([old, new], [weight, 1.0]).model_copy(update={"meta": {**old.meta, **new.meta}})
