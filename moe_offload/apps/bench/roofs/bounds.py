"""The roof, which no offloading can beat, and how near ours comes: plain arithmetic on what was measured.

    bound = max(the resident model's own time, missed bytes / what the disk or the link gives)

Each request is compared by itself: with the resident model's time for the same prompt, with the bytes that this request
missed, and with the bandwidth measured before and after it.
"""

from __future__ import annotations

import statistics

from ..workload import Measured, count_steps, token_s


def find_bounds(one: Measured) -> dict[str, float]:
    """For decoded tokens and for the prompt: `*_bound_s`, and `*_over_roof`, our time over it. Medians over requests.

    Empty where the resident model did not answer the same requests.
    """
    resident = one.beside
    if resident is None or not one.answers or len(resident.answers) != len(one.answers):
        return {}
    decode, prefill = [], []
    for mine, theirs, roof in zip(one.answers, resident.answers, one.roofs, strict=True):
        missed = mine["decode"]["bytes_read"] / count_steps(mine)
        decode.append(_against(token_s(mine), token_s(theirs), missed / roof))
        prefill.append(_against(mine["ttft_s"], theirs["ttft_s"], mine["prefill"]["bytes_read"] / roof))
    return {
        "decode_bound_s": statistics.median(bound for bound, _ in decode),
        "decode_over_roof": statistics.median(over for _, over in decode),
        "prefill_bound_s": statistics.median(bound for bound, _ in prefill),
        "prefill_over_roof": statistics.median(over for _, over in prefill),
        "share_of_resident_speed": statistics.median(
            token_s(theirs) / token_s(mine) for mine, theirs in zip(one.answers, resident.answers, strict=True)
        ),
    }


def traffic_over_roof(one: Measured) -> float:
    """Missed bytes of decoded tokens per second, over the roof: near 1 where misses are all there is to wait for."""
    pairs = zip(one.answers, one.roofs, strict=True)
    return float(statistics.median(a["decode"]["bytes_read"] / a["decode_s"] / roof for a, roof in pairs))


def _against(taken_s: float, resident_s: float, moving_s: float) -> tuple[float, float]:
    bound_s = max(resident_s, moving_s)
    return bound_s, taken_s / bound_s
