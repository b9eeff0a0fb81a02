"""What the bench asks of the device it measures on. Only this file of the bench and `link.py` call `torch.cuda`."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ...errors import ConfigError
from ...memory.machine import main_memory
from ...memory.numa import node_of
from .sides.limit import peak_bytes, reset_peak, resident_bytes


class Cpu:
    """The CPU, and the methods that every device of the bench has; `name` is torch's."""

    name = "cpu"

    def check(self) -> None:
        """Raise `ConfigError` where there is none."""

    def settle(self) -> None:
        """Wait for what has been launched. Called where the clock starts and stops, and nowhere else."""

    def room_bytes(self) -> int:
        """Memory that nothing holds."""
        return main_memory().free

    def held_bytes(self) -> int:
        """What this process holds there."""
        return resident_bytes()

    def reset_peak(self) -> None:
        """Forget the most that it has held."""
        reset_peak()

    def take_peak(self) -> int | None:
        """The most it has held since the last call; None where asking would disturb what is measured."""
        return None

    def memory(self) -> dict[str, int]:
        """The most it has held since `reset_peak`, in bytes: `peak_bytes`, and what the device calls its own."""
        return {"peak_bytes": peak_bytes()}

    def facts(self) -> dict[str, Any]:
        """What a reader must know of it beside the processor."""
        return {}


class Cuda:
    """The same of the first GPU."""

    name = "cuda:0"

    def __init__(self) -> None:
        self._most = self._most_reserved = 0  # before the last `take_peak`

    def check(self) -> None:
        if not torch.cuda.is_available():
            built = torch.version.cuda
            found = "finds no CUDA device here" if built else "is built without CUDA"
            raise ConfigError(
                f"--device cuda: torch {torch.__version__} {found}; leave --device out to measure on the CPU"
            )

    def settle(self) -> None:
        torch.cuda.synchronize()

    def room_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        self._most = self._most_reserved = 0
        torch.cuda.init()  # there are no counters before
        torch.cuda.reset_peak_memory_stats()

    def take_peak(self) -> int | None:
        peak = torch.cuda.max_memory_allocated()
        self._most = max(self._most, peak)
        self._most_reserved = max(self._most_reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return peak

    def memory(self) -> dict[str, int]:
        self.take_peak()
        return {"peak_bytes": self._most, "reserved_bytes": self._most_reserved}

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        found = {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["numa_node"] = node_of("cuda:0")
        try:
            found["triton"] = importlib.import_module("triton").__version__
        except ImportError:
            found["triton"] = None
        return found


DEVICES: dict[str, type[Cpu] | type[Cuda]] = {"cpu": Cpu, "cuda": Cuda}
