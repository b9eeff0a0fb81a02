"""What one look at a running model sees: bounded JSON. Counters are totals since the model was optimised; who wants
rates looks twice (`moe-offload top` does)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ...cache.counters import LayerStats, Stats
from ...errors import LiveError
from ...files.strict_json import describe_problems, parse_json

FORMAT = "moe_offload.live"
VERSION = 1
MAX_BYTES = 4 * 2**20  # a layer takes some 350 bytes

Text = Annotated[str, StringConstraints(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=2**63)]


@dataclass(kw_only=True)
class Snapshot(Stats):
    """`handle.stats()`, and what else a process says of its model.

    Args:
        model: What the model calls itself.
        pid: The number of its process.
        uptime_s: Seconds since the model was optimised.
        budget_bytes: What the model may hold.
        plan: What the budget is spent on, bytes by `Plan.parts()`.
        rss_bytes: All that the process holds in RAM: Python and torch (some 400 MB) come on top of the budget.
        queued: Rows that wait to be read.
        reading: Parts of rows that are being read at this moment.
    """

    #: A newer moe_offload may say more than this one knows.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore")

    model: Text
    pid: Count
    uptime_s: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    budget_bytes: Count
    plan: dict[Text, int]
    rss_bytes: Count
    queued: Count
    reading: Count
    layers: Annotated[list[LayerStats], Field(max_length=2**12)]

    def to_json(self) -> bytes:
        """One line, without its end."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}).encode()

    @classmethod
    def of(cls, data: bytes) -> Snapshot:
        """What a socket has answered. Raises LiveError."""
        try:
            found = parse_json(data, FORMAT)
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise ValueError(f"it does not say that it is {FORMAT!r}")
            return _adapter().validate_json(data)
        except ValidationError as error:
            raise _not_readable(describe_problems(error)) from error
        except ValueError as error:
            raise _not_readable(str(error)) from error


@cache
def _adapter() -> TypeAdapter[Snapshot]:
    return TypeAdapter(Snapshot)


def _not_readable(why: str) -> LiveError:
    return LiveError(
        f"what the model answered cannot be read: {why[:300]}. Is it run by another version of moe_offload?"
    )
