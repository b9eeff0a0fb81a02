"""What one look at a running model sees: bounded JSON. Counters are totals since the model was optimised; who wants
rates looks twice (`rates.py`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ...errors import LiveError
from ...files.strict_json import parse, problems

MAX_BYTES = 4 * 2**20  # a layer takes some 350 bytes

Text = Annotated[str, StringConstraints(max_length=256)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class _Part(BaseModel):
    # A newer moe_offload may say more than this one knows.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Counts(_Part):
    """As in `handle.Stats`."""

    tokens: Count
    hits: Count
    misses: Count
    streamed: Count
    bytes_read: Count
    prewarm_bytes: Count
    stall_s: Seconds
    ahead: Count
    late: Count
    wasted_bytes: Count
    events: Count = 0
    by_device: Count = 0

    @property
    def requests(self) -> int:
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Hits over requests; None where nothing was asked for."""
        return self.hits / self.requests if self.requests else None

    @property
    def moved_bytes(self) -> int:
        """All that was read, for whatever reason."""
        return self.bytes_read + self.prewarm_bytes + self.wasted_bytes


class LayerNow(Counts):
    """One MoE layer: `resident` of its `experts` are in its `slots`. `decides` is who does in decode steps."""

    name: Text
    experts: Count
    slots: Count
    resident: Count
    row_bytes: Count
    decides: Text = "host"


class Snapshot(Counts):
    """Make one with `take.take`, read one with `Snapshot.of`.

    `plan` is what the budget is spent on, in bytes. `queued` rows wait to be read, `reading` parts of rows are being
    read at this moment. `rss_bytes` is all the process holds in RAM: Python and torch (some 400 MB) come on top of the
    budget.
    """

    format: Literal["moe_offload.observe.live"] = "moe_offload.observe.live"
    version: Literal[1] = 1
    model: Text
    pid: Count
    uptime_s: Seconds
    budget_bytes: Count
    plan: dict[Text, int]
    rss_bytes: Count
    graphs: Count
    queued: Count
    reading: Count
    layers: Annotated[list[LayerNow], Field(max_length=2**12)]

    @classmethod
    def of(cls, data: bytes) -> Snapshot:
        """What a socket has answered. Raises LiveError."""
        try:
            return cls.model_validate(parse(data, "moe_offload.observe.live"))
        except ValidationError as error:
            raise _not_readable(problems(error)) from error
        except ValueError as error:
            raise _not_readable(str(error)) from error


def _not_readable(why: str) -> LiveError:
    return LiveError(
        f"what the model answered cannot be read: {why[:300]}. Is it run by another version of moe_offload?"
    )
