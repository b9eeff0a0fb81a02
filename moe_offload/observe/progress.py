"""Bars for what takes long. They go to stderr, and have transformers' own switches:
`transformers.utils.logging.disable_progress_bar()` and HF_HUB_DISABLE_PROGRESS_BARS.

    Loading       dense weights: transformers' own bar; experts that rest in RAM: ours
    Spilling      experts of a loaded model, to disk
    Pre-warming   slots, from a profile
    Compiling     a graph: Dynamo traces every layer in Python, a minute for a deep model
    Packing       a checkpoint
    Quantising    its experts
    Replaying     the trace of a run, for its report
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

DELAY_S = 1.0  # what compiles faster needs no bar

Stage = Literal["Loading", "Spilling", "Pre-warming", "Compiling", "Packing", "Quantising", "Saving", "Replaying"]


def show_bar(stage: Stage, total: int, unit: str = "B", what: str = "", delay_s: float = 0.0) -> Any:
    """A context manager with `update(n)`; `total` in bytes, or in any other `unit`. Shown after `delay_s` seconds."""
    from transformers.utils import logging as hf_logging

    return hf_logging.tqdm(
        total=total, desc=f"{stage} {what}".rstrip(), unit=unit, unit_scale=unit == "B", delay=delay_s
    )


class _Compiling:
    """The bar of the graph that is being compiled. Its thread shows it once that has taken DELAY_S, then ticks."""

    def __init__(self) -> None:
        from transformers.utils import logging as hf_logging

        self.bar = hf_logging.tqdm(desc="Compiling: tracing", bar_format="{desc} [{elapsed}]", delay=DELAY_S)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._tick, name="moe_offload-compiling", daemon=True)
        self.thread.start()

    def _tick(self) -> None:
        while not self.ended.wait(DELAY_S):
            self.bar.update(0)

    def end(self) -> None:
        self.ended.set()
        self.thread.join()
        self.bar.set_description_str("Compiling", refresh=False)
        self.bar.close()


#: Of each thread: `ours`, whether it is in a call of an offloaded model; `begun_s`, when it began to compile.
_calls = threading.local()
_shown: _Compiling | None = None
_compiled_s = 0.0


@contextlib.contextmanager
def showing_compilation() -> Iterator[None]:
    """What this thread compiles inside the block has a bar. Dynamo says when it compiles: not every call does."""
    from torch._dynamo.callback import callback_handler

    if _begin not in callback_handler.start_callbacks:  # the first call, or the first after torch._dynamo.reset()
        callback_handler.register_start_callback(_begin)
        callback_handler.register_end_callback(_end)
    _calls.ours = True
    try:
        yield
    finally:
        _calls.ours = False


def compiled_s() -> float:
    """Seconds that this process has spent compiling so far, in calls of offloaded models."""
    return _compiled_s


def name_stage(name: str) -> None:
    """Let the bar say that compiling has come to the stage `name`."""
    if _shown is not None:
        _shown.bar.set_description_str(f"Compiling: {name}", refresh=False)


def _begin(_: Any) -> None:
    """Dynamo calls this and `_end` under a lock of its own, and only for the outermost compilation."""
    global _shown
    from transformers.utils import logging as hf_logging

    _calls.begun_s = time.perf_counter()
    if getattr(_calls, "ours", False) and hf_logging.is_progress_bar_enabled():
        _shown = _Compiling()


def _end(_: Any) -> None:
    global _shown, _compiled_s
    if getattr(_calls, "ours", False):
        _compiled_s += time.perf_counter() - _calls.begun_s
    shown, _shown = _shown, None
    if shown is not None:
        shown.end()
