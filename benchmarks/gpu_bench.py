"""`moe-offload bench --device cuda` for `gpu.py`: the command lines, and the dated files that results become.

A checkpoint of one shape is written once and serves all the runs of it. What is measured last, a time limit may leave
out: half of the experts come first.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FULL_LIMIT_S = 2400.0
QWEN, GPT = "qwen3-30b-a3b", "gpt-oss-20b"
TRACES = {QWEN: "qwen3-30b-a3b_k6_bigmoeonedge.npz", GPT: "gpt-oss-20b_decode_dev.npz"}
ALL = ("--residency", "50%,25%,10%,100%", "--sides", "resident,ours,ours-host@50%,accelerate@50%")


@dataclass(frozen=True)
class Bench:
    """One run, on so many of the model's layers that it takes minutes; `asked` is what it measures."""

    name: str
    model: str
    layers: int
    limit_s: float
    asked: tuple[str, ...]

    def command(self, cache: Path, traces: Path | None, full: bool) -> list[str]:
        command = [sys.executable, "-m", "moe_offload", "bench", f"synthetic:{self.model}", "--device", "cuda"]
        command += [*(() if full else ("--layers", str(self.layers))), *self.asked]
        if traces is not None and (traces / TRACES[self.model]).is_file():
            command += ["--routing", str(traces / TRACES[self.model])]
        return [*command, "--cache", str(self.checkpoints(cache)), "--out", str(self.found(cache))]

    def checkpoints(self, cache: Path) -> Path:
        return cache / self.model

    def found(self, cache: Path) -> Path:
        """Where the result is, as far as it has come."""
        return cache / f"{self.name}.json"

    def keep(self, out: Path, cache: Path, command: list[str], complete: bool) -> Path | None:
        """Write what was found so far into `out`, as dated files; None where nothing was."""
        found = self.found(cache)
        if not found.is_file():
            return None
        result = json.loads(found.read_text())
        file = out / _file_name(self.name, result)
        file.write_text(_markdown(command, result, complete))
        shutil.copy(found, file.with_suffix(".json"))
        return file


BENCHES = (
    Bench(QWEN, QWEN, 12, 340, (*ALL, "--prompt-tokens", "4096", "--new-tokens", "256", "--requests", "3")),
    # The most memory that is held over a thousand tokens, beside the budget: prompts are what a budget has room for.
    Bench(
        f"{QWEN}-1000-tokens", QWEN, 12, 120,
        ("--residency", "50%", "--sides", "ours", "--prompt-tokens", "512", "--new-tokens", "1000", "--requests", "1"),
    ),
    # Its attention is not fused: the scores of 4096 tokens would take 8 GB.
    Bench(GPT, GPT, 4, 240, (*ALL, "--prompt-tokens", "512", "--new-tokens", "256", "--requests", "3")),
)  # fmt: skip


def _file_name(name: str, result: dict[str, Any]) -> str:
    """<model>_<hardware>_<yyyy-mm>.md, as the files beside this one are named."""
    words = result["machine"]["gpu"].lower().replace("nvidia", " ").split()
    return f"{name}_{'-'.join(words)}_{result['date'][:7]}.md"


def _markdown(command: list[str], result: dict[str, Any], complete: bool) -> str:
    from moe_offload.apps.bench.table import format_table

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    asked = shlex.join(["moe-offload", *command[command.index("bench") : command.index("--cache")]])
    cut_short = "" if complete else "\nThe run was cut short: what is below is what it had found by then.\n"
    return (
        f"# {Path(result['model']).name}, random weights: {result['machine']['gpu']}, {result['date']}\n\n"
        f"Commit {commit or 'unknown'}. One run of `moe-offload bench`, all sides in it; *bound* is the larger of the "
        "resident model's own\ntime and missed bytes over the link.\n"
        f"{cut_short}\n```\n$ {asked}\n\n{format_table(result)}\n```\n"
    )
