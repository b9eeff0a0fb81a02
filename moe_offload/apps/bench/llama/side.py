"""llama.cpp as a side: it maps the GGUF file, and the kernel decides which pages of it stay in memory.

It answers the same commands as `sides/side.py`. It is told which tokens follow the prompt, as the others are, so that
all read the same experts; its own choice at each step is compared with theirs. Weights are the same, products round
otherwise: its choices may part from theirs.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..devices import Cpu
from ..request import counted_read
from .gguf_file import FILE


class LlamaSide:
    """The model in a process of its own, with a context for requests of at most `tokens` tokens."""

    def __init__(self, folder: str, scratch: str, tokens: int, **_: Any):
        self.file, self.tokens, self.device = Path(scratch) / FILE, tokens, Cpu()
        self._model: Any = None
        self._context: Any = None

    def load(self) -> dict[str, Any]:
        from ik_llama_cpp._internals import IkContext, IkModel

        self.device.reset_peak()
        begun = time.perf_counter()
        self._model = IkModel(str(self.file), use_mmap=True)
        threads = len(os.sched_getaffinity(0))
        self._context = IkContext(self._model, n_ctx=self.tokens + 8, n_threads=threads, flash_attn=False)
        return {"load_s": time.perf_counter() - begun, "routing": None, "slots": None}

    def ask(
        self, prompt: list[int], new_tokens: int, row: int, left_out: int = 0, forced: list[int] | None = None
    ) -> dict[str, Any]:
        self._context.kv_cache_clear()
        marks, tokens, read = [time.perf_counter()], list[int](), [counted_read()]
        for step in range(1 + new_tokens):
            fed = prompt if step == 0 else [forced[step - 1] if forced else tokens[-1]]
            tokens.append(self._choose_next(fed, 0 if step == 0 else len(prompt) + step - 1))
            marks.append(time.perf_counter())
            read.append(counted_read())
        first, resumed = 1, 1 + left_out
        return {
            "ttft_s": marks[first] - marks[0],
            "decode_s": marks[-1] - marks[resumed],
            "steps_s": np.diff(marks[resumed:]).tolist(),
            "tokens": tokens,
            "left_out": left_out,
            "prefill": {n: read[first][n] - read[0][n] for n in read[0]},
            "decode": {n: read[-1][n] - read[resumed][n] for n in read[0]},
            "used": None,
            "peaks_bytes": [None, None],
        }

    def memory(self) -> dict[str, int]:
        return self.device.memory()

    def _choose_next(self, fed: list[int], position: int) -> int:
        """The likeliest token after `fed`, which begins at `position` of the sequence."""
        from ik_llama_cpp._ctypes_api import llama_batch_free
        from ik_llama_cpp._internals import make_batch_range

        batch = make_batch_range(fed, pos_start=position)
        try:
            failed = self._context.decode(batch)
        finally:
            llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode answered {failed} for {len(fed)} tokens at {position}")
        logits = ctypes.cast(self._context.get_logits(len(fed) - 1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, shape=(self._model.n_vocab,)).argmax())
