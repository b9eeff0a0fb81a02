"""moe-offload top."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import LiveError
from ..options.ending import fail_with
from ..options.numbers import seconds

if TYPE_CHECKING:
    from ...observe.live.snapshot import Snapshot
    from .client import Place

HISTORY = 40  # looks in the line of speeds
ENDING_S = 2.0  # a process that ends closes its model first
HOW = "run it with MOE_OFFLOAD_LIVE=1, or call model.moe_offload.serve_live() (moe-offload run, chat and serve do)"


def top(
    target: Annotated[
        str | None,
        typer.Argument(metavar="PID", help="Its process; 4242-2 is the second model of process 4242."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once, at the totals so far.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is seen as JSON, a line a look.")] = False,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between looks.", **seconds(0.05, 3600))] = 1.0,
) -> None:
    """Watch a running model: tokens/s, hit rate, bytes read, waiting, layer by layer. Ctrl-C ends it."""
    try:
        place, first = _find(target)
        if as_json:
            for snapshot in _looks(place, first, once, interval):
                typer.echo(snapshot.to_json().decode())
        else:
            _show(place, first, once, interval)
        if not once:
            what = "the process has ended" if place.ended(ENDING_S) else "the model was closed"
            typer.echo(f"moe-offload: {place.name}: {what}", err=True)
    except KeyboardInterrupt:
        return


def _find(target: str | None) -> tuple[Place, Snapshot]:
    """The one model that is meant; exit code 1 where there is none, 2 where there are several."""
    from .client import ANSWER_S, find_places, find_running

    if target is not None and not re.fullmatch(r"\d+(-\d+)?", target):
        fail_with(f"{target!r} is no process: give its number, as in 4242, or 4242-2 for its second model", 2)
    models = find_running()
    if not models:
        if silent := [place.name for place in find_places() if place.process_is_there]:
            raise LiveError(f"{', '.join(silent)}: no answer within {ANSWER_S:.0f} s, the machine is busy; look again")
        raise LiveError(f"no running model found; {HOW}")
    found = [one for one in models if target in (None, one[0].name)] or [
        one for one in models if target == str(one[0].pid)
    ]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(f"{place.name} ({snapshot.model})" for place, snapshot in found or models)
    if not found:
        raise LiveError(f"no running model {target!r}; there are: {listed}")
    fail_with(f"several models are running, say which: {listed}", 2)


def _looks(place: Place, first: Snapshot, once: bool, interval: float) -> Iterator[Snapshot]:
    """A snapshot now and one each `interval` seconds, until the model is gone."""
    from .client import GoneError, SilentError, ask_snapshot

    yield first
    while not once:
        time.sleep(interval)
        try:
            yield ask_snapshot(place)
        except GoneError:
            return
        except SilentError:  # it is busy: the next look may see it
            continue


def _show(place: Place, first: Snapshot, once: bool, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from .rates import rates_between
    from .screen import draw_screen

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(highlight=False, markup=False, emoji=False, width=120)
    if once:
        console.print(draw_screen(first, None))
        return
    speeds: deque[float] = deque(maxlen=HISTORY)
    before: Snapshot | None = None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for now in _looks(place, first, once, interval):
            rates = None if before is None else rates_between(before, now)
            if rates is not None:
                speeds.append(rates.tokens_per_s)
            seen = draw_screen(now, rates, speeds, console.height)
            if console.is_terminal:
                live.update(seen, refresh=True)
            else:
                console.print(seen)
            before = now
