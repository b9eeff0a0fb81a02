"""The record of a run: bounded JSON, read as hostile input. It makes sense on any machine, so a report can be made
there.

Every failure is a ReportError that names the file, what was found in it, and what to do.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ...cache.counters import LayerStats
from ...errors import ReportError
from ...files.strict_json import parse_json
from ...files.untrusted import read_bounded, refusing_file
from ...files.whole_file import save_whole
from ...observe.trace.recorder import ForwardRecord, Seconds

MAX_BYTES = 32 * 2**20
MAX_FORWARDS = 20_000  # beyond, neighbours are put together

Text = Annotated[str, StringConstraints(max_length=512)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


@dataclass(kw_only=True)
class RunForward(ForwardRecord):
    """One forward, or neighbours of one kind together. `best` hits are those of Belady's MIN with as many slots, which
    may pass a row by, from an empty cache."""

    best: Count


@dataclass(kw_only=True)
class RunLayer(LayerStats):
    """`counts`: uses of each expert."""

    counts: Annotated[list[Count], Field(min_length=1, max_length=2**15, fail_fast=True)]


class RunBudget(_Part):
    """What the default policy would have hit on this very run with another budget: the run's trace, replayed."""

    residency: Share
    budget_bytes: Count
    hit_rate: Share
    bytes_per_token: Annotated[float, Field(ge=0, le=2**53, allow_inf_nan=False)]


class RunRecord(_Part):
    """Make one with `collect.collect_run`, read one with `RunRecord.load`."""

    format: Literal["moe_offload.run"] = "moe_offload.run"
    version: Literal[1] = 1
    created: Annotated[str, StringConstraints(max_length=20)]
    model: Text
    machine: dict[Text, Text] = Field(max_length=32)
    budget_bytes: Count
    plan: dict[Text, int] = Field(max_length=32)
    profile: Text | None
    prewarm_bytes: Count
    cold_first_hits: Count | None  # with a profile: what prompt and 32 tokens would have hit without it
    ended_s: Seconds
    layers: Annotated[list[RunLayer], Field(min_length=1, max_length=4096, fail_fast=True)]
    forwards: Annotated[list[RunForward], Field(max_length=MAX_FORWARDS, fail_fast=True)]
    curve: Annotated[list[RunBudget], Field(max_length=64, fail_fast=True)]

    @model_validator(mode="after")
    def _in_order(self) -> RunRecord:
        times = [at_s for forward in self.forwards for at_s in (forward.began_s, forward.ended_s)]
        if times != sorted(times) or (times and times[-1] > self.ended_s):
            raise ValueError("its forwards are not in the order of time")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read and check the run at `path`, in bounded time and memory. Raises ReportError."""
        with refusing_file(path, "run", "A run is what moe-offload run --save-report writes", ReportError):
            data = read_bounded(Path(path), MAX_BYTES)
            parse_json(data, "moe_offload.run")  # strict, and bounded in depth
            return cls.model_validate_json(data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` and return it. All or nothing: on any failure (ReportError) an old file is as it was."""
        return save_whole(Path(path), json.dumps(self.model_dump()).encode() + b"\n", "run", ReportError)
