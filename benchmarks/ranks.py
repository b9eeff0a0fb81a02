"""Ranks that share a model's experts, and one of them is ended at a random moment: how do the others end?

    python benchmarks/ranks.py --times 100 --ranks 2,4

Each time a tiny model is loaded by all ranks, which read a prompt, generate, save a profile and close. One rank, drawn
by chance, gets SIGKILL, SIGTERM, SIGINT or SIGSTOP, or raises, at a moment drawn by chance in a phase drawn by chance.
The others must end within 30 s, with an error that names it, or have finished their work. Nothing may be left: no
process, no half file, no file in /dev/shm or in the folder for temporary files. A line of JSON for each time, then a
table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

PHASES = ("load", "prompt", "decode", "save", "close")
LIMIT_S = 30.0
ENDS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP", "raise")


def work(rank: int, world: int, port: int, folder: str, out: str, told: Any, raises: tuple[str, float] | None) -> None:
    """The program of one rank. `raises`: in which phase it ends by itself, and after how many seconds."""
    log = os.open(f"{out}/rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = os.environ["TMPDIR"] = f"{out}/tmp"
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    import moe_offload
    from moe_offload.ranks.join import config_of_ranks

    torch.set_num_threads(1)

    def begin(phase: str) -> None:
        told.put((rank, phase))
        if raises is not None and raises[0] == phase:
            time.sleep(raises[1])
            raise ValueError("drawn by chance")

    begin("load")
    model: Any = moe_offload.from_pretrained(
        folder,
        "20MB",
        config={"profile": "off", "kv_tokens": 256, "rank_timeout": 25.0},
        distributed_config=config_of_ranks(world),
    )
    ids = torch.arange(3, 103).view(1, -1)
    begin("prompt")
    with torch.no_grad():
        for _ in range(8):
            model(ids)
        begin("decode")
        model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=0)
    begin("save")
    for n in range(20):
        model.moe_offload.save_profile(f"{out}/profile.json", n=str(n))
    begin("close")
    model.moe_offload.close()


def one_time(folder: str, world: int, spans_s: dict[str, float], context: Any) -> dict[str, Any]:
    victim, phase, end = random.randrange(world), random.choice(PHASES), random.choice(ENDS)
    after_s = random.uniform(0, spans_s[phase])
    out = tempfile.mkdtemp(prefix="moe_ranks_")
    Path(out, "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = context.Queue()
    raises = (phase, after_s) if end == "raise" else None
    ranks = [
        context.Process(target=work, args=(r, world, port, folder, out, told, raises if r == victim else None))
        for r in range(world)
    ]
    for one in ranks:
        one.start()
    said = None
    while said != (victim, phase) and ranks[victim].is_alive():  # else it has ended before: the logs say why
        with contextlib.suppress(queue.Empty):
            said = told.get(timeout=1)
    started = [child for one in ranks for child in children_of(one.pid)]
    if raises is None:
        time.sleep(after_s)
        if ranks[victim].is_alive():
            os.kill(ranks[victim].pid, getattr(signal, end))
    if end != "SIGSTOP":
        ranks[victim].join(LIMIT_S)
    ended_s = time.monotonic()
    for rank, one in enumerate(ranks):
        if rank != victim:
            one.join(max(0.0, ended_s + LIMIT_S - time.monotonic()))
    found: dict[str, Any] = {"ranks": world, "end": end, "phase": phase, "victim": victim, "after_s": round(after_s, 2)}
    found["others_s"] = round(time.monotonic() - ended_s, 1)
    found["ended"] = [how(rank, one, out, victim) for rank, one in enumerate(ranks)]
    for one in ranks:
        one.kill()
        one.join()
    found["files"] = leftovers(out)
    found["processes"] = [child.pid for child in started if child.is_running()]
    if not found["files"] and all(one in ("named", "finished", "victim") for one in found["ended"]):
        shutil.rmtree(out)
    return found


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def how(rank: int, process: Any, out: str, victim: int) -> str:
    """How a rank has ended: "finished", "named" (by an error that names the victim), or what it said instead."""
    log = Path(out, f"rank{rank}.log").read_text(errors="replace")
    if rank == victim and process.exitcode != 0:
        return "victim"
    if process.exitcode is None:
        return "hangs " + log[-2000:]
    if process.exitcode == 0:
        return "finished"
    last = next(
        (line for line in reversed(log.splitlines()) if re.search("RankError|ConfigError|moe_offload:", line)), ""
    )
    return "named" if re.search(rf"rank {victim}\b", last) else f"unnamed ({process.exitcode}): {log[-2000:]}"


def leftovers(out: str) -> list[str]:
    """Files that are there and should not be. The profile is whole, or it is not there."""
    expected = {"tmp", "profile.json"}
    left = [str(path) for path in Path(out).iterdir() if path.name not in expected and path.suffix != ".log"]
    left += [str(path) for path in Path(out, "tmp").iterdir()]
    profile = Path(out, "profile.json")
    if profile.exists():
        json.loads(profile.read_text())
    return left + sorted(str(path) for path in Path("/dev/shm").iterdir() if path.name.startswith(("moe_", "torch_")))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--times", type=int, default=100)
    asked.add_argument("--ranks", default="2,4", help="how many there are, one after the other")
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    random.seed(given.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "moe_offload.api", "transformers.models.qwen3_moe"])
    from moe_offload.apps.families.tiny import build

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
        build("qwen3_moe", num_hidden_layers=2, num_experts=12, **sizes).save_pretrained(folder)
        found = []
        for time_, world in zip(range(given.times), itertools.cycle(map(int, given.ranks.split(",")))):
            found.append(one_time(folder, world, SPANS_S, context))
            print(json.dumps({"time": time_, **found[-1]}), flush=True)
    print(table(found))
    sys.exit(any(bad(one) for one in found))


def others(one: dict[str, Any]) -> list[str]:
    """In a word how each but the victim has ended."""
    return [said.partition(" ")[0] for rank, said in enumerate(one["ended"]) if rank != one["victim"]]


def bad(one: dict[str, Any]) -> bool:
    return bool(one["files"] or one["processes"] or {"hangs", "unnamed"} & set(others(one)))


def table(found: list[dict[str, Any]]) -> str:
    """A row for each number of ranks and way to end."""
    columns = ("named", "finished", "unnamed", "hangs")
    lines = [
        "| ranks | end | times | slowest | " + " | ".join(columns) + " | files left | processes left |",
        "|---" * 10 + "|",
    ]
    for key in sorted({(one["ranks"], one["end"]) for one in found}):
        rows = [one for one in found if (one["ranks"], one["end"]) == key]
        sums = collections.Counter(itertools.chain(*map(others, rows)))
        left = [str(sum(len(one[what]) for one in rows)) for what in ("files", "processes")]
        slowest_s = max(one["others_s"] for one in rows)
        cells = [*map(str, key), str(len(rows)), f"{slowest_s} s", *(str(sums[name]) for name in columns), *left]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: About how long each phase takes here: until when the moment is drawn.
SPANS_S = {"load": 2.0, "prompt": 0.5, "decode": 3.0, "save": 1.0, "close": 0.1}

if __name__ == "__main__":
    main()
