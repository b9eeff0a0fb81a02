"""A command in one of several processes (`torchrun`, `accelerate launch`): which commands there are, and who speaks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ...config.launched import is_first, read_launched
from ...errors import ConfigError

#: Commands that all ranks run together. Every other would do the same work, and write the same files, once a process.
TOGETHER = ("run", "serve", "plan")
MEETING = ("run", "serve")  # of these, what loads a model
#: Where another command does what was probably wanted.
INSTEAD = {
    "bench": "It measures beside engines that run in one process; `run` says at its end what several ranks reach: "
    "tokens/s, and hits, bytes read and peak memory of each and of all",
}


def refuse_ranks(command: str) -> None:
    """Raise `ConfigError` where several processes were started for a command that is for one."""
    launched = read_launched()
    if launched is not None and command not in TOGETHER:
        raise ConfigError(
            f"moe-offload {command} is for one process, and {launched.world} were started (torchrun, accelerate "
            f"launch); run it without a launcher. Several share a model in {', '.join(TOGETHER)}"
            + (f". {INSTEAD[command]}" if command in INSTEAD else "")
        )


def tell_ranks(command: str, why: Exception) -> None:
    """Let the other ranks know that this one ends, where it has not met them yet: they would wait for it. Where one
    launcher started all of them it ends them at once, and the line of the one that failed is on the same terminal."""
    with contextlib.suppress(ConfigError):  # an environment that makes no sense has been told
        launched = read_launched()
        if launched is None or command not in MEETING:
            return
        if launched.here == launched.world and "TORCHELASTIC_RUN_ID" in os.environ:
            return
        from ...ranks.group import has_begun
        from ...ranks.join import config_of_ranks, tell_refusal

        if not has_begun():
            tell_refusal(config_of_ranks(launched.world), why)


def rank_prefix() -> str:
    """What begins a message of this process where there are several: their lines come mixed on one terminal."""
    with contextlib.suppress(ConfigError):  # an environment that makes no sense is being told
        launched = read_launched()
        return "" if launched is None else f"rank {launched.rank}: "
    return ""


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Inside, what any rank but the first writes goes nowhere. An error leaves the block, so it is still told."""
    if is_first():
        yield
        return
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123  never closed: log handlers keep it
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = nowhere
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
