"""One command for whoever has a GPU for half an hour: what it can do, whether we are right on it, then the tables.

    OUT=results python benchmarks/gpu.py                      everything
    OUT=results python benchmarks/gpu.py --only bench         where time is short: checks, tests or bench,
    OUT=results python benchmarks/gpu.py --only kernels       or single parts of them
    OUT=results python benchmarks/gpu.py --only bench --full  all layers of both models: an hour, 110 GB of RAM

A machine that stops a command after ten minutes takes it in pieces: --only checks, then tests, then each bench by its
name (--only with a name that is none lists them). SIGTERM and Ctrl-C leave what a bench had found by then.

Each part is independent, with a time limit of its own: one that fails, or takes too long, does not keep the next from
running, and what it had found by then stays. Everything that is printed goes to $OUT/gpu.txt, which begins with a line
for each part: whether it passed, and the line where its own output begins. In the tests a decode step that is not
recorded as a CUDA graph is an error of Inductor's. The figures of
gpu_checks.py to $OUT/gpu_checks.json, each bench (gpu_bench.py) to $OUT/<model>_<hardware>_<yyyy-mm>.md and .json.

The benches replay recorded routing where the traces are: in shared/traces, here or beside the repository, or in the
folder that --traces names. Without them the model's own router chooses, and the tables say so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bench import BENCHES, FULL_LIMIT_S, ROOT, Bench

NOT_PACKED = "--ignore=tests/gpu/test_packed.py"  # a part of its own
TRACES = (ROOT / "shared" / "traces", ROOT.parent / "shared" / "traces")


@dataclass(frozen=True)
class Part:
    """A command with a time limit, in seconds."""

    group: str
    name: str
    command: list[str]
    limit_s: float
    bench: Bench | None = None


def parts(cache: Path, traces: Path | None, full: bool) -> list[Part]:
    pytest = ["env", "TORCHINDUCTOR_CUDAGRAPH_OR_ERROR=1", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    checks = [sys.executable, str(ROOT / "benchmarks" / "gpu_checks.py")]
    return [
        Part("checks", "machine", ["nvidia-smi"], 60),
        Part("checks", "mechanisms", checks, 300),
        Part("tests", "kernels", [*pytest, "tests/runtime/kernels"], 300),
        Part("tests", "packed", [*pytest, "tests/gpu/test_packed.py"], 300),
        Part("tests", "models", [*pytest, "tests/gpu", "tests/memory/transfer/test_threads.py", NOT_PACKED], 600),
        *(
            Part("bench", one.name, one.command(cache, traces, full), FULL_LIMIT_S if full else one.limit_s, one)
            for one in BENCHES
        ),
    ]


def run(part: Part, log: Any) -> bool:
    """Run it, print and log what it says, and say whether it succeeded. It and all it started end at its limit."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            how = f"cannot be started: {error}"
        else:
            try:
                how = str(process.wait(part.limit_s))
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):  # the sides of a bench, too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                how = f"stopped after its {part.limit_s:.0f} s"
        said.seek(0)
        text = said.read().decode(errors="replace")
    print_and_log(f"== {part.name} ({shlex.join(part.command)}): {how}, {time.perf_counter() - begun:.0f} s", log)
    print_and_log(text, log)
    return how == "0"


def print_and_log(text: str, log: Any) -> None:
    for stream in (sys.stdout, log):
        stream.write(text + "\n")
        stream.flush()


def run_all(chosen: list[Part], out: Path, cache: Path, log: Any) -> list[str]:
    """The names of those that failed."""
    failed = []
    for i, part in enumerate(chosen):
        complete = False
        try:
            complete = run(part, log)
        finally:
            if part.bench is not None:
                file = part.bench.keep(out, cache, part.command, complete)
                print_and_log(f"written to {file}" if file else "nothing was found", log)
        if part.bench is not None:
            if part.bench.model not in {later.bench.model for later in chosen[i + 1 :] if later.bench}:
                # Both models whole would fill a small disk.
                shutil.rmtree(part.bench.checkpoints(cache), ignore_errors=True)
        if not complete:
            failed.append(part.name)
    return failed


def put_summary_first(file: Path, chosen: list[Part], failed: list[str]) -> None:
    """Let the file begin with what passed, what failed, and where to look."""
    text = file.read_text()
    lines = text.splitlines()
    said = [f"{len(chosen) - len(failed)} of {len(chosen)} parts passed"]
    for part in chosen:
        begins = [i for i, line in enumerate(lines) if line.startswith(f"== {part.name} (")]
        where = f"line {begins[-1] + len(chosen) + 2}" if begins else "it did not begin"
        said.append(f"{'FAILED' if part.name in failed else 'passed'} {part.name}: {where}")
    file.write_text("\n".join(said) + "\n" + text)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    nowhere = parts(Path(), None, False)
    names = [*dict.fromkeys(part.group for part in nowhere), *(part.name for part in nowhere)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, help="these parts; gpu.txt is then added to")
    parser.add_argument("--full", action="store_true", help="all layers of the models")
    parser.add_argument("--traces", type=Path, help="the folder of recorded routing")
    options = parser.parse_args()
    if not has_gpu():
        parser.error("no CUDA device: all of this needs one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended, and what was found is kept
    out = Path(os.environ.get("OUT", ".")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    traces = options.traces or next((folder for folder in TRACES if folder.is_dir()), None)
    log_mode = "a" if options.only else "w"
    with tempfile.TemporaryDirectory(prefix="moe_offload-gpu-") as cache, (out / "gpu.txt").open(log_mode) as log:
        chosen = [
            part
            for part in parts(Path(cache), traces, options.full)
            if not options.only or not {part.group, part.name}.isdisjoint(options.only)
        ]
        failed = run_all(chosen, out, Path(cache), log)
        print_and_log(f"failed: {', '.join(failed) or 'none'}", log)
    put_summary_first(out / "gpu.txt", chosen, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
