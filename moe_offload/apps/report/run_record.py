"""What is kept of a run: bounded JSON, read as hostile input, with nothing in it that only this machine could read.

Every failure is a ReportError that names the file, what was found in it, and what to do.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ...errors import ReportError
from ...files.strict_json import parse
from ...files.untrusted import read_bounded, refusing
from ...files.whole_file import save_whole

MAX_BYTES = 32 * 2**20
MAX_STEPS = 20_000  # beyond, neighbours are put together

Text = Annotated[str, StringConstraints(max_length=512)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StepPart(_Part):
    """One forward, all layers together; `best` hits are those of Belady's MIN with as many slots, which
    may pass a row by, from an empty cache."""

    began_s: Seconds
    tokens: Count
    hits: Count
    misses: Count
    best: Count
    bytes_read: Count
    stall_s: Seconds


class LayerPart(_Part):
    """`counts`: uses of each expert."""

    name: Text
    top_k: Annotated[int, Field(ge=1, le=2**15)]
    slots: Count
    row_bytes: Count
    hits: Count
    misses: Count
    stall_s: Seconds
    counts: Annotated[list[Count], Field(min_length=1, max_length=2**15, fail_fast=True)]


class CurvePart(_Part):
    """What the default policy would have hit on this very run with another budget: the run's trace, replayed."""

    residency: Share
    budget_bytes: Count
    hit_rate: Share
    bytes_per_token: Annotated[float, Field(ge=0, le=2**53, allow_inf_nan=False)]


class RunRecord(_Part):
    """Make one with `collect.record_of`, read one with `RunRecord.load`."""

    format: Literal["moe_offload.run"] = "moe_offload.run"
    version: Literal[1] = 1
    created: Annotated[str, StringConstraints(max_length=20)]
    model: Text
    machine: dict[Text, Text] = Field(max_length=32)
    budget_bytes: Count
    plan: dict[Text, int] = Field(max_length=32)
    profile: Text | None
    prewarm_bytes: Count
    cold_first_hits: Count | None  # with a profile: what the first 32 tokens would have hit without it
    ended_s: Seconds
    layers: Annotated[list[LayerPart], Field(min_length=1, max_length=4096, fail_fast=True)]
    steps: Annotated[list[StepPart], Field(max_length=MAX_STEPS, fail_fast=True)]
    curve: Annotated[list[CurvePart], Field(max_length=64, fail_fast=True)]

    @model_validator(mode="after")
    def _in_order(self) -> RunRecord:
        begins = [step.began_s for step in self.steps]
        if begins != sorted(begins) or (begins and begins[-1] > self.ended_s):
            raise ValueError("its steps are not in the order of time")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read and check the run at `path`, in bounded time and memory. Raises ReportError."""
        with refusing(path, "run", "A run is what moe-offload run --save-report writes", ReportError):
            return cls.model_validate(parse(read_bounded(Path(path), MAX_BYTES), "moe_offload.run"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` and return it. All or nothing: on any failure (ReportError) an old file is as it was."""
        return save_whole(Path(path), json.dumps(self.model_dump()).encode() + b"\n", "run", ReportError)
