"""What it costs that ranks cannot lend each other slots: misses of N caches of a share each, over those of one cache.

    python benchmarks/rank_shares.py TRACE.npz ... [--ranks 2,4]

A recorded trace is replayed under the default policy: once through one cache a layer, and once through a cache a rank
for the experts that transformers gives it (an even run of them), with as many slots in all. What ranks read beyond one
process is this, and nothing else: `rank_reads.py` measures it on processes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from moe_offload.apps.simulate.run import replay_stream
from moe_offload.apps.simulate.stream import Stream, per_layer
from moe_offload.config.settings import OffloadConfig
from moe_offload.observe.trace import Trace

SHARES = (0.25, 0.5, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--ranks", default="2,4")
    given = parser.parse_args()
    print("| trace | ranks | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |\n" + "|---" * 5 + "|")
    for path in given.traces:
        trace = Trace.load(path)
        streams = per_layer(trace)
        for world in map(int, given.ranks.split(",")):
            cells = [f"{ratio(streams, world, trace.top_k, share):.3f}" for share in SHARES]
            print(f"| {path.stem} | {world} | " + " | ".join(cells) + " |", flush=True)


def ratio(streams: list[Stream], world: int, top_k: int, share: float) -> float:
    """Misses of all ranks over those of one process."""
    split = alone = 0
    for stream in streams:
        slots = max(top_k, round(share * stream.num_experts / world))
        split += sum(misses(part_of(stream, rank, world), slots) for rank in range(world))
        alone += misses(stream, slots * world)
    return split / alone


def misses(stream: Stream, slots: int) -> int:
    asked_V, hits_V = replay_stream(stream, min(slots, stream.num_experts), OffloadConfig().policy)
    return int((asked_V - hits_V).sum())


def part_of(stream: Stream, rank: int, world: int) -> Stream:
    """What one rank sees: its own experts by local numbers, and only the events that ask for one."""
    count = stream.num_experts // world
    local_NK = stream.ids_NK - rank * count
    ids_NK = np.where((local_NK >= 0) & (local_NK < count), local_NK, -1).astype(np.int32)
    tokens_V = np.add.reduceat((ids_NK >= 0).any(axis=1), stream.first_V, dtype=np.int64)
    asked = tokens_V > 0
    return dataclasses.replace(
        stream,
        num_experts=count,
        ids_NK=ids_NK,
        first_V=stream.first_V[asked],
        stop_V=stream.stop_V[asked],
        tokens_V=tokens_V[asked],
        request_V=stream.request_V[asked],
    )


if __name__ == "__main__":
    main()
