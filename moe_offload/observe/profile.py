"""A profile: how often each expert of each layer was used by a workload. Bounded JSON, read as hostile input.

A profile is a prior. It decides what is loaded before the first token and where the scores start, and then fades: a
wrong one costs speed, never tokens. (A *trace*, the ordered ids that `simulate` replays, is another file and format.)

    {"format": "moe_offload.profile", "version": 1, "created": "2026-11-23T20:00:00Z", "fingerprint": {...},
     "tokens": 512, "counts": [[17, 0, 495, ...], ...], "meta": {"prompt": "italian"}}

Every failure is a ProfileError that names the file, what was found in it, and what to do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from ..cache.counters import Counters, LayerCounters
from ..errors import ProfileError
from ..files.strict_json import describe_problems, parse_json, shorten_repr
from ..files.untrusted import read_bounded, refusing_file
from ..files.whole_file import save_whole

MAX_BYTES = 4 * 2**20
MAX_COUNT = 2**53  # the largest range of integers that every JSON reader keeps exact

CREATED = "%Y-%m-%dT%H:%M:%SZ"

Text = Annotated[str, StringConstraints(max_length=256)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Size = Annotated[int, Field(ge=1, le=2**20)]

# Lists stop at their first error: a hostile file must not make us collect a million of them.
Counts = Annotated[list[Count], Field(fail_fast=True)]
Sizes = Annotated[list[Size], Field(fail_fast=True)]


class Fingerprint(BaseModel):
    """The shape of a model's experts: a profile fits a model if and only if these are equal.

    layers: how many layers have experts; experts, top_k: of each such layer; hidden, inner: widths, `inner` one number
    or one a layer; dtype: of the expert weights, such as "bfloat16". Raises ValueError when they contradict each other.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model_type: Text
    layers: Size
    experts: Sizes
    top_k: Sizes
    hidden: Size
    inner: Size | Sizes
    dtype: Text

    @model_validator(mode="after")
    def _consistent(self) -> Fingerprint:
        for name in ("experts", "top_k", "inner"):
            per_layer = getattr(self, name)
            if isinstance(per_layer, list) and len(per_layer) != self.layers:
                raise ValueError(f"{name} has {len(per_layer)} entries for {self.layers} layers")
        for layer, (experts, top_k) in enumerate(zip(self.experts, self.top_k, strict=True)):
            if top_k > experts:
                raise ValueError(f"layer {layer} chooses {top_k} of {experts} experts")
        return self


class Profile(BaseModel):
    """Expert counts of a workload. Make one with `Profile.of`, read one with `Profile.load`.

    Args:
        created: When it was made, in UTC.
        fingerprint: What a model must agree with for the profile to be used.
        tokens: Tokens observed.
        counts: `counts[l][e]` is how many of them used expert e of MoE layer l.
        meta: Free text about the workload.

    Raises:
        ProfileError: From `of` and `load`, for counts that cannot be, and for a file that is damaged or too large.

    Example:

        ```python
        moe_offload.record_profile(model, inputs).save("mine.json")
        profile = moe_offload.Profile.load("mine.json")
        print(profile.tokens, profile.counts[0][17])
        ```
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal["moe_offload.profile"] = "moe_offload.profile"
    version: Literal[1] = 1
    created: Annotated[str, StringConstraints(max_length=20)]
    fingerprint: Fingerprint
    tokens: Count
    counts: Annotated[list[Counts], Field(fail_fast=True)]
    meta: dict[Text, Text] = Field(default_factory=dict, max_length=64)

    @classmethod
    def of(
        cls,
        fingerprint: Fingerprint,
        tokens: int,
        counts: Sequence[Sequence[int]],
        meta: dict[str, str] | None = None,
    ) -> Profile:
        """A profile created now. Raises ProfileError when the counts cannot be those of `tokens` tokens."""
        try:
            return cls(
                created=datetime.now(timezone.utc).strftime(CREATED),
                fingerprint=fingerprint,
                tokens=tokens,
                counts=[list(layer) for layer in counts],
                meta=dict(meta or {}),
            )
        except ValidationError as error:
            raise ProfileError(f"these counts make no profile: {describe_problems(error)}") from None

    @classmethod
    def of_layers(cls, fingerprint: Fingerprint, layers: Sequence[LayerCounters], meta: dict[str, str]) -> Profile:
        """The profile of what these layers have counted."""
        counts = [list(layer.counts) for layer in layers]
        return cls.of(fingerprint, Counters.total(layers).tokens, counts, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read and check the profile at `path`, in bounded time and memory. Raises ProfileError."""
        with refusing_file(path, "profile", "Check the path; record it anew, or run without it", ProfileError):
            data = read_bounded(Path(path), MAX_BYTES)
            return cls.model_validate(parse_json(data, "moe_offload.profile"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` and return it. All or nothing: on any failure (ProfileError) an old file is as it was.

        A symlink at `path` is replaced, not followed. The file is readable by its owner only.
        """
        data = json.dumps(self.model_dump()).encode() + b"\n"
        if len(data) > MAX_BYTES:
            raise ProfileError(f"profile {_shown(path)} was not saved: {len(data)} bytes, the limit is {MAX_BYTES}")
        return save_whole(Path(path), data, "profile", ProfileError)

    def check(self, fingerprint: Fingerprint, of: str = "the model") -> None:
        """Raise ProfileError, listing what differs, unless this profile is of a model with this fingerprint, which is
        that `of` the model, or of another profile."""
        differing = [
            f"{name} {shorten_repr(ours)} in the profile, {shorten_repr(theirs)} in {of}"
            for name in Fingerprint.model_fields
            if (ours := getattr(self.fingerprint, name)) != (theirs := getattr(fingerprint, name))
        ]
        if differing:
            todo = "Record one with this model" if of == "the model" else "Only profiles of one model go together"
            raise ProfileError(f"this profile is of another model: {'; '.join(differing)}. {todo}")

    def hottest(self, layer: int) -> list[int]:
        """All experts of `layer`, the most used first; experts used equally often in the order of their ids."""
        if not 0 <= layer < len(self.counts):
            raise ProfileError(f"layer {layer} was asked for; the profile has layers 0 to {len(self.counts) - 1}")
        counts = self.counts[layer]
        return sorted(range(len(counts)), key=lambda expert: -counts[expert])

    @field_validator("created")
    @classmethod
    def _is_utc(cls, created: str) -> str:
        if datetime.strptime(created, CREATED).strftime(CREATED) != created:
            raise ValueError("created must be UTC, written as 2026-11-23T20:00:00Z")
        return created

    @model_validator(mode="after")
    def _fits_fingerprint(self) -> Profile:
        of = self.fingerprint
        if len(self.counts) != of.layers:
            raise ValueError(f"counts of {len(self.counts)} layers for a model of {of.layers}")
        for layer, (counts, experts, top_k) in enumerate(zip(self.counts, of.experts, of.top_k, strict=True)):
            if len(counts) != experts:
                raise ValueError(f"layer {layer} has {len(counts)} counts for {experts} experts")
            if sum(counts) > self.tokens * top_k:
                raise ValueError(
                    f"layer {layer} counts {sum(counts)} uses, {self.tokens} tokens x top-{top_k} allow fewer"
                )
        return self


def merge_profiles(profiles: Sequence[Profile], weights: Sequence[float] | None = None) -> Profile:
    """One profile of several workloads of one model: counts and tokens are added, each times its profile's weight.

    Weights are finite and not negative; by default all are 1. Fractions are rounded so that the result stays
    consistent: counts down, tokens up. Meta entries on which all profiles agree are kept. Raises ProfileError.
    """
    factors = _factors(len(profiles), weights)
    first = profiles[0]
    for profile in profiles[1:]:
        profile.check(first.fingerprint, of="the first one")
    pairs = list(zip(factors, profiles, strict=True))
    return Profile.of(
        first.fingerprint,
        tokens=math.ceil(sum(factor * profile.tokens for factor, profile in pairs)),
        counts=[
            [int(sum(factor * profile.counts[layer][expert] for factor, profile in pairs)) for expert in range(experts)]
            for layer, experts in enumerate(first.fingerprint.experts)
        ],
        meta={key: text for key, text in first.meta.items() if all(p.meta.get(key) == text for p in profiles)},
    )


def _factors(n: int, weights: Sequence[float] | None) -> list[Fraction]:
    """Exact weights, so that a merge of large counts neither drifts nor depends on the order."""
    if n == 0:
        raise ProfileError("merge was given no profiles; it takes at least one")
    if weights is None:
        return [Fraction(1)] * n
    if len(weights) != n:
        raise ProfileError(f"merge was given {len(weights)} weights for {n} profiles; it takes one each")
    try:
        factors = [Fraction(weight) for weight in weights]
    except (ValueError, OverflowError, TypeError):  # nan, inf, not a number
        factors = [Fraction(-1)]
    if min(factors) < 0 or max(factors) == 0:
        raise ProfileError(f"merge weights {list(weights)!r}: they must be finite, none negative, and not all 0")
    return factors


def _shown(path: str | os.PathLike[str]) -> str:
    return repr(os.fspath(path))
