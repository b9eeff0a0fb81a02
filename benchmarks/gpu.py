"""One command for whoever has a GPU for a quarter of an hour: what it can do, whether we are right on it, then figures.

    OUT=results python benchmarks/gpu.py
    OUT=results python benchmarks/gpu.py --only bench      where time is short: checks, tests or bench, one at a time

Runs gpu_checks.py (links, latencies, our kernels), the GPU tests and the bench (gpu_bench.py), and writes all that they
print to $OUT/gpu.txt, results of the bench to $OUT/bench_*.json and their table to $OUT/bench_<date>.md. Each part is
independent: one that fails, or takes too long, does not keep the next from running.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_bench

HERE = Path(__file__).parent
TEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
TIMEOUT_S = 900
CHECKS = {
    "what the machine is": ["nvidia-smi"],
    "what the GPU and our kernels can do": [sys.executable, str(HERE / "gpu_checks.py")],
}
TESTS = {
    "the kernels are right": [*TEST, "tests/kernels"],
    "whole models are right": [*TEST, "tests/gpu", "tests/test_transfer.py"],
}


def run(command: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit code and what was printed. One that takes longer ends with 124, and all that it has started with it."""
    try:
        started = subprocess.Popen(
            command,
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own: the sides of a bench end with it
        )
    except OSError as error:
        return 127, f"{error}\n"
    code = None
    try:
        out, said = started.communicate(timeout=timeout_s)
        code = started.returncode
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        out, said = started.communicate()
        said += f"\nstopped after {timeout_s:.0f} s\n"
    return 124 if code is None else code, out + said[-8000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("checks", "tests", "bench"), help="these parts")
    only = parser.parse_args().only
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    parts = {"checks": CHECKS, "tests": TESTS, "bench": gpu_bench.commands(out)}
    failed = 0
    with (out / "gpu.txt").open("a" if only else "w") as log:
        for part in only or parts:
            for name, command in parts[part].items():
                begun = time.perf_counter()
                code, printed = run(command, gpu_bench.TIMEOUT_S if part == "bench" else TIMEOUT_S)
                failed += code != 0
                text = f"== {name} ({' '.join(command)}): {code}, {time.perf_counter() - begun:.0f} s\n"
                for stream in (sys.stdout, log):
                    stream.write(text + printed + "\n")
                    stream.flush()
                if part == "bench":  # after each: whoever is cut off keeps what there is
                    table = gpu_bench.markdown(gpu_bench.results(out))
                    (out / f"bench_{datetime.date.today().isoformat()}.md").write_text(table)
        if "bench" in (only or parts):
            print(table)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
