"""One command for whoever has a GPU for ten minutes: what it can do, whether we are right on it, then the whole table.

    OUT=results python benchmarks/gpu.py                 everything
    OUT=results python benchmarks/gpu.py --only bench    the table alone; --only machine checks kernels models the rest
    OUT=results python benchmarks/gpu.py --only bench --full     all layers of both models: an hour, 110 GB of RAM

Each part is independent, with a time limit of its own: one that fails, or takes too long, does not keep the next from
running, and what it had found by then stays. Everything that is printed goes to $OUT/gpu.txt, the figures of
gpu_checks.py to $OUT/gpu_checks.json, each bench to $OUT/<model>_<hardware>_<yyyy-mm>.md and .json.

The benches replay recorded routing where the traces are: in shared/traces, here or beside the repository, or in the
folder that --traces names. Without them the model's own router chooses, and the tables say so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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

ROOT = Path(__file__).resolve().parents[1]
TRACES = (ROOT / "shared" / "traces", ROOT.parent / "shared" / "traces")
GROUPS = ("machine", "checks", "kernels", "models", "bench")


@dataclass(frozen=True)
class Part:
    """A command with a time limit, in seconds."""

    group: str
    name: str
    command: list[str]
    limit_s: float


@dataclass(frozen=True)
class Model:
    """A model, and so many of its layers that loading and compiling them, seven times over, takes minutes."""

    name: str
    layers: int
    prompt_tokens: int
    trace: str
    limit_s: float


MODELS = (
    Model("qwen3-30b-a3b", 12, 4096, "qwen3-30b-a3b_k6_bigmoeonedge.npz", 340),
    # Its attention is not fused: the scores of 4096 tokens would take 8 GB.
    Model("gpt-oss-20b", 4, 512, "gpt-oss-20b_decode_dev.npz", 240),
)
FULL_LIMIT_S = 2400.0


def parts(cache: Path, traces: Path | None, full: bool) -> list[Part]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    checks = [sys.executable, str(ROOT / "benchmarks" / "gpu_checks.py")]
    return [
        Part("machine", "what the machine is", ["nvidia-smi"], 60),
        Part("checks", "what the GPU and our kernels can do", checks, 300),
        Part("kernels", "the kernels are right", [*pytest, "tests/kernels"], 300),
        Part("models", "whole models are right", [*pytest, "tests/gpu", "tests/test_transfer.py"], 600),
        *(
            Part("bench", model.name, bench(model, cache, traces, full), FULL_LIMIT_S if full else model.limit_s)
            for model in MODELS
        ),
    ]


def bench(model: Model, cache: Path, traces: Path | None, full: bool) -> list[str]:
    """The command line. Half the experts come first: what is measured last, a time limit may leave out."""
    command = [sys.executable, "-m", "moe_offload", "bench", f"synthetic:{model.name}", "--device", "cuda"]
    command += [] if full else ["--layers", str(model.layers)]
    command += ["--residency", "50%,25%,10%,100%", "--sides", "resident,ours,ours-host@50%,accelerate@50%"]
    command += ["--prompt-tokens", str(model.prompt_tokens), "--new-tokens", "256", "--requests", "3"]
    if traces is not None and (traces / model.trace).is_file():
        command += ["--routing", str(traces / model.trace)]
    return [*command, "--cache", str(cache / model.name), "--json", str(result_file(cache, model.name))]


def result_file(cache: Path, model: str) -> Path:
    return cache / f"{model}.json"


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


def keep(out: Path, cache: Path, part: Part, complete: bool) -> Path | None:
    """What a bench has found so far, as dated files; None where it has found nothing."""
    found = result_file(cache, part.name)
    if not found.is_file():
        return None
    result = json.loads(found.read_text())
    file = out / file_name(part.name, result)
    file.write_text(markdown(part, result, complete))
    shutil.copy(found, file.with_suffix(".json"))
    return file


def file_name(model: str, result: dict[str, Any]) -> str:
    """<model>_<hardware>_<yyyy-mm>.md, as the files beside this one are named."""
    words = result["machine"]["gpu"].lower().replace("nvidia", " ").split()
    return f"{model}_{'-'.join(words)}_{result['date'][:7]}.md"


def markdown(part: Part, result: dict[str, Any], complete: bool) -> str:
    from moe_offload.bench.table import table

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    asked = part.command[part.command.index("bench") : part.command.index("--cache")]
    command = shlex.join(["moe-offload", *asked])
    rows = "" if complete else "\nThe run was cut short: what is below is what it had found by then.\n"
    return (
        f"# {Path(result['model']).name}, random weights: {result['machine']['gpu']}, {result['date']}\n\n"
        f"Commit {commit or 'unknown'}. One run of `moe-offload bench`, all sides in it; *bound* is the larger of the "
        "resident model's own\ntime and missed bytes over the link.\n"
        f"{rows}\n```\n$ {command}\n\n{table(result)}\n```\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="these parts")
    parser.add_argument("--full", action="store_true", help="all layers of the models")
    parser.add_argument("--traces", type=Path, help="the folder of recorded routing")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT", ".")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    traces = options.traces or next((folder for folder in TRACES if folder.is_dir()), None)
    failed = []
    with tempfile.TemporaryDirectory(prefix="moe_offload-gpu-") as cache, (out / "gpu.txt").open("w") as log:
        for part in parts(Path(cache), traces, options.full):
            if part.group not in options.only:
                continue
            complete = run(part, log)
            if part.group == "bench":
                shutil.rmtree(Path(cache) / part.name, ignore_errors=True)  # both models whole would fill a small disk
                file = keep(out, Path(cache), part, complete)
                print_and_log(f"written to {file}" if file else "nothing was found", log)
            if not complete:
                failed.append(part.name)
        print_and_log(f"failed: {', '.join(failed) or 'none'}", log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
