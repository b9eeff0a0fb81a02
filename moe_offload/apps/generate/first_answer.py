"""What the first answer after a start was like, beside that of the start at which nothing was remembered."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ...config.sizes import format_size

if TYPE_CHECKING:
    from ...handle import Handle
    from .streaming import Streamer

PREFIX = "cold_"  # begins the names under which the usage's meta keeps the figures of the start without memory


@dataclass(frozen=True)
class FirstAnswer:
    """Until its first token: the tokens of the prompt that were computed, the time without compiling, what was read for
    it, what was there already."""

    prompt_tokens: int
    first_token_s: float
    read_bytes: int
    hit_rate: float
    day: str

    @classmethod
    def of(cls, streamer: Streamer, before: Any, known: int = 0) -> FirstAnswer | None:
        """Of an answer that has begun; `before` are `Handle.stats()` when it was asked for. The `known` tokens of its
        prompt were in a KV cache: what they save is not to be credited to remembered usage."""
        if streamer.first_s is None or streamer.at_first is None:
            return None
        spent = streamer.at_first - before
        day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        first_token_s = streamer.first_s - streamer.begun_s
        computed = streamer.prompt_tokens - known
        return cls(computed, round(first_token_s, 4), spent.bytes_read, round(spent.hit_rate, 4), day)

    def meta(self) -> dict[str, str]:
        return {PREFIX + name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_meta(cls, meta: dict[str, str]) -> FirstAnswer | None:
        """What `meta` has kept; None where it has nothing that can be read."""
        try:
            kept = {name: meta[PREFIX + name] for name in cls.__annotations__}
            return cls(
                int(kept["prompt_tokens"]),
                float(kept["first_token_s"]),
                int(kept["read_bytes"]),
                float(kept["hit_rate"]),
                kept["day"],
            )
        except (KeyError, ValueError):
            return None

    def __str__(self) -> str:
        return (
            f"first token after {self.first_token_s:.2f} s ({self.prompt_tokens} tokens of prompt computed), "
            f"{format_size(self.read_bytes)} read for it, {self.hit_rate:.1%} of its experts were there"
        )


def compare_starts(handle: Handle, first: FirstAnswer) -> str:
    """A line about the first answer of a start; that of a start without memory is kept for those to come."""
    if handle.remembered is None:
        if handle.usage_path is None:
            return ""
        handle.save_usage(**first.meta())
        return f"this start remembered nothing: {first}. The next one begins with what is used now"
    cold = FirstAnswer.from_meta(handle.remembered.meta)
    than = "" if cold is None else f"; without memory, on {cold.day}: {cold}"
    return f"this start remembered {handle.remembered.tokens} tokens: {first}{than}"
