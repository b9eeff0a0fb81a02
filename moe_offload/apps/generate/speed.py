"""One line about what a run was like, in the words of llama.cpp and vLLM."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, Any

from ...config.sizes import format_size

if TYPE_CHECKING:
    from .streaming import Streamer


def speed_line(streamer: Streamer, before: Any, after: Any, known: int = 0) -> str:
    """Prompt and generated tokens per second, time to first token, hit rate, bytes read per token, peak memory.

    Times are without compiling, which is told apart: the next prompt does not pay it.

    `before` and `after` are `Handle.stats()` around the run: hits and bytes are of what came between. Of the prompt
    `known` tokens were in a KV cache, and not read again.
    """
    parts = []
    if streamer.first_s is not None and streamer.last_s is not None:
        first_token_s = streamer.first_s - streamer.begun_s
        read = streamer.prompt_tokens - known
        beside = f" ({known} of them known)" if known else ""
        parts.append(f"prompt {streamer.prompt_tokens} tokens{beside}, {read / first_token_s:.1f} tokens/s")
        more, decode_s = streamer.new_tokens - 1, streamer.last_s - streamer.first_s
        rate = f", {more / decode_s:.1f} tokens/s" if more and decode_s else ""
        parts.append(f"generated {streamer.new_tokens} tokens{rate}")
        parts.append(f"time to first token {first_token_s:.2f} s")
    else:
        parts.append(f"prompt {streamer.prompt_tokens} tokens, none generated")
    hits, misses = after.hits - before.hits, after.misses - before.misses
    if hits + misses:
        parts.append(f"hit rate {hits / (hits + misses):.1%}")
    tokens = after.tokens - before.tokens
    if tokens:
        parts.append(f"{format_size((after.bytes_read - before.bytes_read) // tokens)} read per token")
    if streamer.clock.compiling_s >= 0.05:
        parts.append(f"compiling {streamer.clock.compiling_s:.1f} s beside that")
    parts.append(f"peak memory {format_size(peak_memory_bytes())}")
    return "; ".join(parts)


def peak_memory_bytes() -> int:
    """The most main memory this process has held. Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
