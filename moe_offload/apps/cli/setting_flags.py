"""A flag for each setting, for `moe-offload config`, which writes them to a file."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from ..options.flags import Budget, Compile, Compute, DeviceMapOption, MaxMemory, Policy, ProfileIn


@dataclasses.dataclass(frozen=True)
class SettingFlags:
    """Fields of `OffloadConfig`, as a person types them; "none" is a value, too (`tests/apps/cli/test_config.py`)."""

    budget: Budget = None
    max_memory: MaxMemory = None
    device_map: DeviceMapOption = None
    profile: ProfileIn = None
    policy: Policy = None
    half_life: Annotated[
        str | None, typer.Option("--half-life", help="Tokens after which a use counts half (policy decayed_lfu).")
    ] = None
    compile: Compile = None
    compute: Compute = None
    kv_tokens: Annotated[
        str | None, typer.Option("--context", help="Tokens of prompt and answer that the KV cache has room for.")
    ] = None
    kv_sequences: Annotated[
        str | None, typer.Option("--sequences", help="KV caches of that many tokens that there is room for; 1.")
    ] = None
    reserve: Annotated[
        str | None,
        typer.Option("--reserve", help="Kept free of experts for KV cache and workspace: 1GB; without it auto."),
    ] = None
    wave_rows: Annotated[
        str | None,
        typer.Option("--wave-rows", help="Experts of scratch that a prompt streams through; without it auto."),
    ] = None
    prewarm: Annotated[
        str | None, typer.Option("--prewarm", help="yes or no: load the expected experts before the first token.")
    ] = None
    lookahead: Annotated[
        str | None, typer.Option("--lookahead", help="yes or no: ask each router one layer early.")
    ] = None
    overlap: Annotated[
        str | None,
        typer.Option("--overlap", help="yes or no: compute resident experts while others load; without it as fits."),
    ] = None
    decide: Annotated[
        str | None, typer.Option("--decide", help="host, device or auto: who says which expert is evicted.")
    ] = None
    dynamic: Annotated[
        str | None,
        typer.Option("--dynamic", help="yes or no, as in torch.compile: two graphs for good, or one for each shape."),
    ] = None
    fullgraph: Annotated[
        str | None, typer.Option("--fullgraph", help="yes or no, as in torch.compile: a graph break is an error.")
    ] = None
    experts_implementation: Annotated[
        str | None,
        typer.Option(
            "--experts-implementation", help="grouped_mm, batched_mm or auto: transformers' code that is rewritten."
        ),
    ] = None
    offload_folder: Annotated[str | None, typer.Option("--offload-folder", help="Where experts are spilled.")] = None
    lock_memory: Annotated[
        str | None,
        typer.Option("--lock-memory", help="yes, no or auto: keep slots and scratch from being swapped out."),
    ] = None
    rank_timeout: Annotated[
        str | None, typer.Option("--rank-timeout", help="Seconds that one process of several waits for another.")
    ] = None
    live: Annotated[str | None, typer.Option("--live", help="yes or no: let `moe-offload top` watch.")] = None
    untested: Annotated[
        str | None, typer.Option("--untested", help="yes or no: compute on a GPU, which nobody has tried yet.")
    ] = None
    poison: Annotated[str | None, typer.Option("--poison", help="yes or no: fill free slots with NaN, for tests.")] = (
        None
    )
