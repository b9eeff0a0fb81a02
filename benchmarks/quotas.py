"""What slots that move between layers could gain: the best fixed quotas that hindsight chooses, beside equal ones.

    python benchmarks/quotas.py TRACE.npz ... [--residency 25%]

Each layer's requests are replayed under the default policy at half to twice its equal share; between these sizes hits
are interpolated. Then the slots of all layers are dealt out one by one to the layer that gains most from one more. A
rule that moves slots by what it has seen comes near these quotas at best, unless layers take turns in needing room.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_offload.apps.simulate.run import parse_capacity, replay_stream, slots_of
from moe_offload.apps.simulate.stream import per_layer
from moe_offload.observe.trace import Trace

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0)  # of the equal number of slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--residency", default="25%")
    options = parser.parse_args()
    print("| trace | equal slots | the best fixed quotas | gain, points | slots of a layer |\n|---|---|---|---|---|")
    for path in options.traces:
        equal, best, slots = compare_quotas(Trace.load(path), parse_capacity(options.residency))
        row = [path.stem, f"{equal:.2%}", f"{best:.2%}", f"{100 * (best - equal):.2f}", f"{min(slots)} to {max(slots)}"]
        print(f"| {' | '.join(row)} |", flush=True)


def compare_quotas(trace: Trace, share: float) -> tuple[float, float, list[int]]:
    """Hit rates with equal slots and with the best, and the best."""
    streams, equal = per_layer(trace), slots_of(trace, share)
    sizes = [
        sorted({min(experts, max(trace.top_k, round(n * part))) for part in SHARES})
        for experts, n in zip(trace.num_experts, equal, strict=True)
    ]
    asked = sum(int(replay_stream(stream, n, "default")[0].sum()) for stream, n in zip(streams, equal, strict=True))
    jobs = [(stream, n) for stream, of_layer in zip(streams, sizes, strict=True) for n in of_layer]
    with ThreadPoolExecutor(2) as threads:
        found = iter(list(threads.map(lambda job: int(replay_stream(*job, "default")[1].sum()), jobs)))
    hits = [np.interp(range(of[0], of[-1] + 1), of, [next(found) for _ in of]) for of in sizes]
    with_equal = sum(float(h[n - of[0]]) for h, n, of in zip(hits, equal, sizes, strict=True))
    best = deal_out(hits, [of[0] for of in sizes], sum(equal))
    with_best = sum(float(h[n - of[0]]) for h, n, of in zip(hits, best, sizes, strict=True))
    return with_equal / asked, with_best / asked, best


def deal_out(hits: Sequence[NDArray[np.float64]], fewest: Sequence[int], slots: int) -> list[int]:
    """Slots of each layer: `hits[l][i]` are those of layer l with `fewest[l] + i` slots."""
    taken = [0] * len(hits)
    gains = [np.diff(h) for h in hits]
    for _ in range(slots - sum(fewest)):
        open_ones = [layer for layer, n in enumerate(taken) if n < len(gains[layer])]
        if not open_ones:
            break
        taken[max(open_ones, key=lambda layer: gains[layer][taken[layer]])] += 1
    return [n + least for n, least in zip(taken, fewest, strict=True)]


if __name__ == "__main__":
    main()
