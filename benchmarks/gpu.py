"""One command for whoever has a GPU for ten minutes: what it can do, whether we are right on it, then figures.

    OUT=results python benchmarks/gpu.py

Runs gpu_checks.py (links, latencies, our kernels), the GPU tests, and writes all that they print to $OUT/gpu.txt. Each
part is independent: one that fails does not keep the next from running.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PARTS = {
    "what the machine is": ["nvidia-smi"],
    "what the GPU and our kernels can do": [sys.executable, str(HERE / "gpu_checks.py")],
    "the kernels are right": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"],
    "whole models are right": [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/gpu",
        "tests/test_transfer.py",
    ],
}


def main() -> int:
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (out / "gpu.txt").open("w") as log:
        for name, command in PARTS.items():
            begun = time.perf_counter()
            done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
            failed += done.returncode != 0
            text = f"== {name} ({' '.join(command)}): {done.returncode}, {time.perf_counter() - begun:.0f} s\n"
            for stream in (sys.stdout, log):
                stream.write(text + done.stdout + done.stderr[-8000:] + "\n")
                stream.flush()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
