"""What an offloaded model remembers from one start to the next: which experts its workload uses."""

from __future__ import annotations

import weakref
from pathlib import Path

from ..config.usage import is_workload
from ..errors import ConfigError
from ..observe.profile import Profile
from ..observe.usage import UsageFile
from ..observe.usage_keeper import KEEPER, Usage
from .state import State


class Remembering(State):
    """Usage that is remembered by itself (`profile="auto"`), and the workload that it is counted for."""

    _usage: Usage | None = None
    _began_with: Profile | None = None

    def _begin_remembering(self, file: UsageFile, began_with: Profile | None) -> None:
        """Write from now on to `file` what is used, which `began_with` was read from. `optimize` calls it."""
        layers = self._runtime.layers  # not this handle: what is kept for the end must not keep the model alive
        self._usage, self._began_with = Usage(file, lambda: [layer.counters for layer in layers]), began_with
        KEEPER.keep(self._usage)
        weakref.finalize(self, KEEPER.end, self._usage).atexit = False  # by then KEEPER has written all

    @property
    def remembered(self) -> Profile | None:
        """What this model's slots began with: the usage that was remembered when it was loaded, if there was any."""
        return self._began_with

    @property
    def workload(self) -> str | None:
        """What usage is counted for at this moment; None where it is not remembered."""
        return None if self._usage is None else self._usage.file.workload

    @property
    def usage_path(self) -> Path | None:
        """The file that usage is remembered in; None where it is not (`profile`, or nothing may be written)."""
        return None if self._usage is None else self._usage.file.path

    def save_usage(self, **meta: str) -> Path | None:
        """Write down now what is otherwise written every few minutes, at `close`, and at the end of the process.

        Args:
            meta: Free text about the workload, kept in the file until something else is said.

        Returns:
            The file; None where usage is not remembered. A file that cannot be written is logged, not raised.

        Example:

            ```python
            model = moe_offload.from_pretrained("Qwen/Qwen3-30B-A3B", budget="8GB", profile="italian")
            model.generate(**inputs)
            model.moe_offload.save_usage()
            ```
        """
        if self._usage is not None:
            self._usage.write(**meta)
        return self.usage_path

    def count_for(self, workload: str) -> None:
        """Count what is used from now on for `workload`: one server, several kinds of text. Where usage is not
        remembered, nothing happens.

        Args:
            workload: 1 to 64 letters, digits, - and _.

        Raises:
            ConfigError: No workload may be called so.

        Example:

            ```python
            model.moe_offload.count_for("italian")
            ```
        """
        if not is_workload(workload):
            raise ConfigError(f"workload {workload[:64]!r}: a name is 1 to 64 letters, digits, - and _")
        if self._usage is not None and self.workload != workload:
            self._usage.turn_to(workload)

    def _end_remembering(self) -> None:
        if self._usage is not None:
            self._usage.write()
            KEEPER.end(self._usage)
