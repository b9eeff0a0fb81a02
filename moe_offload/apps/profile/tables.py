"""Tables of profiles, for people: `inspect`, `diff`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from ...cache import POLICIES, Policy
from ...cache.layer_cache import LayerCache
from ...config.settings import OffloadConfig
from ...errors import TraceError
from ...observe.profile import Profile
from ...observe.profile_stats import measure_distances, measure_skews, most_wanted, pinned_hit_rate, uses_per_token
from ...observe.trace import Trace
from ..simulate.plain import replay_events
from ..simulate.stream import per_layer


def inspect_profile(profile: Profile, slots: Sequence[int] | None, trace: Trace | None) -> dict[str, Any]:
    """All facts of a profile: its `layers`; with slots, a `pinned` hit rate; with a trace, those of a `replay`."""
    found: dict[str, Any] = {
        "model_type": profile.fingerprint.model_type,
        "created": profile.created,
        "tokens": profile.tokens,
        "meta": profile.meta,
        "layers": [dataclasses.asdict(skew) for skew in measure_skews(profile)],
    }
    if slots is not None:
        found["slots"] = list(slots)
        found["pinned"] = pinned_hit_rate(profile, slots)
    if slots is not None and trace is not None:
        found["replay"] = with_and_without(profile, slots, trace)
    return found


def with_and_without(profile: Profile, slots: Sequence[int], trace: Trace) -> dict[str, dict[str, float]]:
    """Hit rates of the default policy over `trace`, from an empty cache and from one that the profile has pre-warmed.

    Of the first forward (the prompt), the first 32 tokens after it, and all. Raises TraceError for another model's.
    """
    if list(trace.num_experts) != profile.fingerprint.experts:
        raise TraceError(
            f"the trace is of layers with {_brief(trace.num_experts)} experts, the profile of "
            f"{_brief(profile.fingerprint.experts)}; they are of different models"
        )
    found = {}
    for name in ("cold", "profile"):
        asked, hits = {"first forward": 0, "next 32": 0, "all": 0}, {"first forward": 0, "next 32": 0, "all": 0}
        for layer, stream in enumerate(per_layer(trace)):
            cache = LayerCache(stream.num_experts, slots[layer], _policy(stream.num_experts))
            if name == "profile":
                start_from(cache, profile, layer, slots)
            events = list(stream.events())
            hits_V = replay_events(events, cache).tolist()
            asked_V = [len(event.used) for event in events]
            for part, span in (("first forward", slice(1)), ("next 32", slice(1, 33)), ("all", slice(None))):
                asked[part] += sum(asked_V[span])
                hits[part] += sum(hits_V[span])
        found[name] = {part: hits[part] / asked[part] for part in asked if asked[part]}
    return found


def start_from(cache: LayerCache, profile: Profile, layer: int, slots: Sequence[int]) -> None:
    """What `optimize` does with a profile: seed the policy, fill the slots. A test compares both."""
    cache.policy.seed(uses_per_token(profile, layer))
    for load in cache.fill_free_slots([e for of, e in most_wanted(profile, slots) if of == layer]):
        cache.commit(load, 0, demanded=False)


def inspect_table(found: dict[str, Any]) -> str:
    meta = "".join(f", {key}: {text}" for key, text in found["meta"].items())
    head = f"{found['model_type']}, {found['tokens']} tokens, {found['created']}{meta}"
    names = ("layer", "experts", "used", "entropy", "effective", "top 10%", "top 25%", "top 50%")
    lines = [list(names)]
    for row in found["layers"]:
        shares = [f"{row[name]:.1%}" for name in ("top10", "top25", "top50")]
        facts = [row["layer"], row["experts"], row["used"], f"{row['entropy_bits']:.2f}", f"{row['effective']:.1f}"]
        lines.append([*map(str, facts), *shares])
    text = [head, "", *_aligned(lines)]
    if "pinned" in found:
        low, high = min(found["slots"]), max(found["slots"])
        text += ["", f"{low if low == high else f'{low} to {high}'} slots a layer:"]
        text.append(f"  the hottest pinned, this workload       {found['pinned']:.1%} of the uses hit")
    for name, parts in found.get("replay", {}).items():
        start = "from an empty cache" if name == "cold" else "pre-warmed with this profile"
        rates_of = ", ".join(f"{part} {rate:.1%}" for part, rate in parts.items())
        text.append(f"  the trace replayed, {start:<29} {rates_of}")
    return "\n".join(text)


def compare_profiles(a: Profile, b: Profile) -> dict[str, Any]:
    """`layers`: distance of each; the share that the hottest quarters of both have in common."""
    rows = []
    for layer, distance in enumerate(measure_distances(a, b)):
        quarter = -(-len(a.counts[layer]) // 4)
        hot_a, hot_b = ({e for e in p.hottest(layer)[:quarter] if p.counts[layer][e]} for p in (a, b))
        shared = len(hot_a & hot_b) / max(min(len(hot_a), len(hot_b)), 1)
        rows.append({"layer": layer, "distance": distance, "hottest_quarter_shared": shared})
    return {"layers": rows, "mean": statistics.mean(row["distance"] for row in rows)}


def diff_table(found: dict[str, Any]) -> str:
    lines = [["layer", "distance", "hottest quarter shared"]]
    for row in found["layers"]:
        lines.append([str(row["layer"]), f"{row['distance']:.3f}", f"{row['hottest_quarter_shared']:.0%}"])
    lines.append(["mean", f"{found['mean']:.3f}", ""])
    return "\n".join(["Jensen-Shannon distance: 0 the same shares, 1 no expert in common", "", *_aligned(lines)])


def slots_at(profile: Profile, share: float) -> list[int]:
    """Slots of each layer when `share` of its experts are resident; the experts of one token always fit."""
    of = profile.fingerprint
    return [max(k, round(share * e)) for k, e in zip(of.top_k, of.experts, strict=True)]


def _policy(experts: int) -> Policy:
    settings = OffloadConfig()
    return POLICIES[settings.policy](experts, settings.half_life)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)).rstrip() for line in lines]


def _brief(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else ", ".join(map(str, sizes))
