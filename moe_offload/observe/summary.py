"""What has happened so far, in a line or two of text."""

from __future__ import annotations

from ..cache.counters import Stats
from ..config.sizes import format_size


def summary_of(stats: Stats) -> str:
    """Tokens, hits, bytes; what was read ahead and what the device decided, where either was done."""
    if not stats.requests:
        return "nothing has run yet"
    lines = [
        f"{stats.tokens} tokens: hit rate {stats.hit_rate:.1%} ({stats.hits} hits, {stats.misses} misses, "
        f"{stats.streamed} of them streamed past the cache), {format_size(stats.bytes_read)} read, "
        f"{stats.stall_s:.2f} s waited"
    ]
    if stats.ahead or stats.wasted_bytes:
        lines.append(
            f"read ahead: {stats.ahead} rows that were then asked for ({stats.late} of them late), "
            f"{format_size(stats.wasted_bytes)} read and not used"
        )
    by_device = [layer.decides for layer in stats.layers].count("device")
    if by_device:
        lines.append(
            f"the device decides in {by_device} of {len(stats.layers)} layers: it did in {stats.by_device} of "
            f"{stats.events} events, the host in {stats.by_host}"
        )
    return "\n".join(lines)
