"""What a profile of a whole model says to one rank of several, which has a share of the experts."""

from __future__ import annotations

from collections.abc import Sequence

from ..experts import MoELayer
from ..observe.profile import Fingerprint, Profile


def profile_of_share(profile: Profile, moe_layers: Sequence[MoELayer]) -> Profile:
    """What `profile` says of the experts that this rank has, by their local numbers."""
    if all(moe.share is None for moe in moe_layers):
        return profile
    counts = [
        layer[moe.first_expert : moe.first_expert + moe.num_experts]
        for layer, moe in zip(profile.counts, moe_layers, strict=True)
    ]
    top_k = [min(k, moe.num_experts) for k, moe in zip(profile.fingerprint.top_k, moe_layers, strict=True)]
    shape: Fingerprint = profile.fingerprint.model_copy(
        update={"experts": [moe.num_experts for moe in moe_layers], "top_k": top_k}
    )
    needed = max(-(-sum(layer) // k) for layer, k in zip(counts, top_k, strict=True))
    return Profile.of(shape, max(profile.tokens, needed), counts, dict(profile.meta))
