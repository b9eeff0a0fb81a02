"""`run` where several ranks compute one answer: what all must be given alike, and what each has read and held."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...cache.counters import Counters
from ...config.launched import read_launched
from ...config.sizes import format_size
from ...errors import ConfigError
from .speed import peak_memory_bytes

if TYPE_CHECKING:
    from ...handle import Handle


def refuse_for_ranks(prompt: str | None = None, **files: Any) -> None:
    """Raise `ConfigError` for a flag that cannot be honoured where several processes were started."""
    launched = read_launched()
    if launched is None:
        return
    if prompt == "-":
        raise ConfigError(
            f"--prompt -: {launched.world} processes share one standard input, and each would read a part of it; give "
            "--file"
        )
    for name, value in files.items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value}: several ranks share the experts, and none hears of all ids; "
                "leave it out, or run in one process"
            )


def common_seed(handle: Handle, seed: int | None, how: Mapping[str, Any]) -> int | None:
    """The seed that every rank samples with: ranks that drew other tokens would compute different texts."""
    if handle.ranks is None or seed is not None or not how.get("do_sample"):
        return seed
    drawn: int = handle.ranks.exchange("seed", random.SystemRandom().getrandbits(63), "begin to sample")[0]
    return drawn


def lines_of_ranks(handle: Handle, counters: Sequence[Counters]) -> list[str]:
    """A line for each rank, and one for all: what they have hit, read and held. Every rank calls it; none for a model
    in one process."""
    if handle.ranks is None:
        return []
    peaks = handle.ranks.exchange("peak", peak_memory_bytes(), "tell what it has held")
    names = [*map(str, handle.ranks.names), f"all {len(peaks)} ranks"]
    return [
        f"{name}: hit rate {one.hit_rate:.1%}; {format_size(one.moved_bytes)} read; peak memory {format_size(peak)}"
        for name, one, peak in zip(names, [*counters, Counters.total(counters)], [*peaks, sum(peaks)], strict=True)
    ]
