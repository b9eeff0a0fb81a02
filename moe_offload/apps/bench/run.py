"""The bench: sides that answer the same requests in turn, with the roofs measured beside them.

    roof     the bandwidth of a process that only reads this disk (or copies over this link), before and after each
    request turns    the resident model stays alive beside ours where both fit, through all residencies, and takes turns
    with it others   accelerate and mmap after that, each alone, in the memory that ours has

Every side answers the same prompts, over the same recorded routing. On a CPU all must answer with the same tokens; on
a GPU the resident model's kernels are others, which round otherwise, and the result says how far the tokens agree.
"""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from ...checkpoint.pretrained.weight_files import weight_files
from ...errors import ConfigError
from ...files.staging import staging_folder
from ...memory.stores.row_reads import PART_BYTES
from ...memory.transfer.threads import THREADS
from ...pack import pack_checkpoint
from .devices import DEVICES
from .llama.gguf_file import FILE, write_gguf
from .result import result_of
from .roofs.disk import DiskRoof
from .roofs.link import link_roof
from .roofs.memory import memory_roof
from .sides.contenders import PACKED, write_mapped
from .sides.names import LLAMA, check_sides
from .sides.turns import Roof, Running, Stage
from .workload import OURS, Measured, Workload

#: Side -> the plans it is measured inside, by what was asked.
Chosen = dict[str, tuple[str, ...]]
#: For what surrounds a model in memory: the rest of the machine; the contexts of three processes, a prompt of 4096.
KEPT_FREE_BYTES = {"cpu": 2 * 10**9, "cuda": 6 * 10**9}


def run_bench(
    work: Workload,
    sides: Sequence[str],
    scratch: Path,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run `sides` over `work`; return the result as plain JSON values. `say` hears what happens, line by line.

    A side may name the one residency that it is wanted at, as in "accelerate@50%". `keep` is given the result so far,
    each time a side is through.
    """
    chosen = choose_plans(sides, work)
    device = DEVICES[work.device]()
    device.check()
    notes, done = missing_rivals(work.device), list[Measured]()
    with unwound_by_signals(), staging_folder(scratch, "bench") as temporary:
        if work.packed and "ours" in chosen:
            say("ours: packing")
            pack_checkpoint(work.folder, temporary / PACKED, verify="none", trust_remote_code=work.trust_remote_code)
        room = device.room_bytes() - KEPT_FREE_BYTES[work.device]
        size = sum(file.stat().st_size for file in weight_files(work.folder).files)
        if "resident" in chosen and size > room:
            say("resident: the whole model does not fit in the memory that is free; left out")
            del chosen["resident"]
        if not chosen:
            raise ConfigError("--sides: there is nothing to measure")
        budgets = [work.plans[asked].budget_bytes for side in OURS for asked in chosen.get(side, ())]
        together = "resident" in chosen and bool(budgets) and size + max(budgets) < room
        settings = {
            "device": work.device,
            "folder": str(work.folder),
            "scratch": str(temporary),
            "routing": work.routing,
            "tokens": work.tokens,
            "trust_remote_code": work.trust_remote_code,
        }
        with _roof(work, temporary) as roof:
            stage = Stage(work, settings, roof, say)
            for found in chain(_resident_and_ours(stage, chosen, together), _others(stage, chosen)):
                done += found
                result = result_of(work, done, together, notes, roof.details())
                keep(result)
    for note in notes:
        say(note)
    return result


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, through every `finally`: sides, groups and files are gone."""

    def end(number: int, _: Any) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # a second one must not stop the cleaning up
        raise SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _resident_and_ours(stage: Stage, chosen: Chosen, together: bool) -> Iterator[list[Measured]]:
    """The resident model, and ours at one residency after the other: in turns with it, or else after it."""
    beside: Measured | None = None
    with ExitStack() as alive:
        team: list[Running] = []
        if "resident" in chosen:
            team = [stage.start("resident", chosen["resident"][0], alive)]
            if not together:
                (beside,) = stage.take_turns(team)
                yield [beside]
                alive.close()
                team = []
        for asked in stage.work.plans:
            for side in (side for side in OURS if asked in chosen.get(side, ())):
                with ExitStack() as turn:
                    *turns, one = stage.take_turns([*team, stage.start(side, asked, turn)])
                one.beside = turns[0] if turns else beside
                yield [*turns, one]


def _others(stage: Stage, chosen: Chosen) -> Iterator[list[Measured]]:
    """Each alone, the resident model gone."""
    for side in (side for side in chosen if side not in ("resident", *OURS)):
        scratch = Path(stage.settings["scratch"])
        if side == "mmap":
            stage.say("mmap: writing the file to map")
            write_mapped(stage.work.folder, scratch, stage.work.trust_remote_code)
        if side == LLAMA:
            stage.say(f"{LLAMA}: writing the GGUF file")
            write_gguf(stage.work.folder, scratch / FILE)
        for asked in chosen[side]:
            with ExitStack() as turn:
                found = stage.take_turns([stage.start(side, asked, turn)])
            yield found


def choose_plans(sides: Sequence[str], work: Workload) -> Chosen:
    """Inside which of the plans each side is wanted. Raises `ConfigError` for what is not there."""
    chosen = Chosen()
    check_sides(sides, work.device, work.plans)
    for named in sides:
        side, _, share = named.partition("@")
        wanted = {*chosen.get(side, ()), share} if share else {*work.plans}
        chosen[side] = tuple(asked for asked in work.plans if asked in wanted)
    return chosen


def missing_rivals(device: str) -> list[str]:
    """Notes on projects that a reader of GPU figures would expect to be compared, and that are not."""
    if device == "cpu":
        return []
    if importlib.util.find_spec("moe_infinity") is None:
        return ["MoE-Infinity: not installed (there is no module moe_infinity), so not compared"]
    return ["MoE-Infinity: installed, but this bench has no side for it, so not compared"]


@contextmanager
def _roof(work: Workload, temporary: Path) -> Iterator[Roof]:
    if work.device == "cpu":
        # Measured on the very files that ours reads: other files might be cached by the host.
        packed = sorted((temporary / PACKED).glob("*.safetensors"))
        files = packed or weight_files(work.folder).files
        yield DiskRoof(files, min(work.row_bytes, PART_BYTES), THREADS, {"memory_bytes_per_s": memory_roof()})
    else:
        with link_roof(work.row_bytes, DEVICES[work.device].name) as roof:
            yield roof
