"""What several ranks read and hold, beside one process that has as many slots as all of them together.

    python benchmarks/rank_reads.py --layers 2 --ranks 1,2,4 --residency 0,25,50,100
    python benchmarks/rank_reads.py --layers 2 --ranks 1,2 --residency 0,25,50 --plain
    python benchmarks/rank_reads.py --families --ranks 2,4 --residency 0,25,50,100,0/100 --plain

A checkpoint with random weights in the shape of `--name` is written once (moe_offload.apps.bench.synthetic); with
`--families` tiny ones of `FAMILIES` are, in float32, of which the logits of every step are compared. Each line is new
processes on this machine: a prompt of one sequence, one of three, and `--new` tokens of each. "sum" is what all ranks
read over what one process reads; "beyond the budget" is the most that a rank held (VmHWM, less what its imports take
and less pages of files, which are the libraries') less its budget. With `--plain` transformers' own expert parallelism
runs first on as many ranks, and every logit is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import re
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FAMILIES = ("deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
NUM_EXPERTS = 64  # of tiny models: 16 on each of four ranks, of which 25 % are more than the floor
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what a configuration calls how many there are
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EXCHANGES = 300


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--name", default="qwen3-30b-a3b", help="a shape of `moe-offload bench synthetic:NAME`")
    asked.add_argument("--families", action="store_true", help="tiny models of eight families in its place")
    asked.add_argument("--layers", type=int)
    asked.add_argument("--cache", type=Path)
    asked.add_argument("--ranks", default="1,2,4")
    asked.add_argument(
        "--residency",
        default="0,25,50,100",
        help="percent of a rank's experts; 0 is the floor, A/B rank 0's and theirs",
    )
    asked.add_argument("--prompt", type=int, default=64)
    asked.add_argument("--new", type=int, default=32)
    asked.add_argument("--plain", action="store_true", help="transformers' own run, too, which holds all experts")
    given = asked.parse_args()
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in (FAMILIES if given.families else ["qwen3_moe"])]
    context.set_forkserver_preload(["torch", "transformers", "moe_offload.api", *models])
    if not given.families:
        from moe_offload.apps.bench.synthetic import make_synthetic

        measure(context, given, str(make_synthetic(given.name, given.layers, given.cache)))
        return
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(family, folder)
            print(f"\n{family}\n")
            measure(context, given, folder)


def write_tiny(family: str, folder: str) -> None:
    from moe_offload.apps.families.tiny import build

    config = build(family).config
    build(family, **{name: NUM_EXPERTS for name in EXPERTS if hasattr(config, name)}).save_pretrained(folder)


def measure(context: Any, given: argparse.Namespace, folder: str) -> None:
    """Print the table of one model."""
    alone: dict[int, dict[str, Any]] = {}  # one process, by how many slots it has in each layer

    def run(world: int, work: str, **more: Any) -> list[dict[str, Any]]:
        size = {"prompt": given.prompt, "new": given.new, "steps": given.families}
        return together(context, world, work, folder=folder, **size, **more)

    columns = ("ranks", "asked", "slots a layer", "bytes read by each", "sum", "beyond the budget: loading", "running")
    print("| " + " | ".join((*columns, "as transformers' ranks", "tokens of one process")) + " |")
    print("|---" * 9 + "|")
    for world in map(int, given.ranks.split(",")):
        with tempfile.TemporaryDirectory() as plain:
            if given.plain and world > 1:
                run(world, "plain", out=plain)
            for asked in given.residency.split(","):
                shares = [float(percent) / 100 for percent in asked.split("/")]
                found = run(world, "ours", residency=shares, out=plain)
                slots = sum(one["slots"] for one in found)
                if slots not in alone:
                    alone[slots] = run(1, "ours", slots=slots)[0] if world > 1 else found[0]
                print(row(asked, found, alone[slots]), flush=True)
        if world > 1 and not given.families:
            print(json.dumps({"ranks": world, "exchange": run(world, "exchange")[0]}), flush=True)


def row(asked: str, found: list[dict[str, Any]], alone: dict[str, Any]) -> str:
    read = [one["bytes_read"] for one in found]
    cells = [
        str(len(found)),
        f"{asked} %",
        " + ".join(str(one["slots"]) for one in found),
        " + ".join(f"{nbytes / 1e6:.1f}" for nbytes in read) + " MB",
        f"{sum(read) / alone['bytes_read']:.3f}",
        *(f"{max(one[what] for one in found) / 1e6:.0f} MB" for what in ("loading_beyond", "held_beyond")),
        {None: "-", True: "equal", False: "DIFFER"}[found[0]["same"]],
        agreement(found, alone),
    ]
    return "| " + " | ".join(cells) + " |"


def agreement(found: list[dict[str, Any]], alone: dict[str, Any]) -> str:
    """How many tokens are those of one process, up to where a sequence parts: in bfloat16, sums over ranks round
    otherwise than within one, in transformers' own run as well."""
    alike = total = 0
    for one, other in zip(itertools.chain(*found[0]["tokens"]), itertools.chain(*alone["tokens"]), strict=True):
        alike += next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        total += len(one)
    return f"{alike} of {total}" if all(one["tokens"] == found[0]["tokens"] for one in found) else "RANKS DIFFER"


def together(context: Any, world: int, work: str, **given: Any) -> list[dict[str, Any]]:
    """What `work` returns on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    ranks = [context.Process(target=begin, args=(rank, world, port, answers, work, given)) for rank in range(world)]
    for one in ranks:
        one.start()
    found: dict[int, dict[str, Any]] = {}
    while len(found) < world:
        with contextlib.suppress(queue.Empty):
            found |= [answers.get(timeout=1)]
        if any(one.exitcode for one in ranks):
            raise RuntimeError("a rank has failed; it said why above")
    for one in ranks:
        one.join()
    return [found[rank] for rank in range(world)]


def begin(rank: int, world: int, port: int, answers: Any, work: str, given: dict[str, Any]) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        answers.put((rank, {"plain": plain, "ours": ours, "exchange": exchange}[work](rank, world, **given)))


def say(model: Any, prompt: int, new: int, steps: bool) -> tuple[list[Any], list[Any]]:
    """Logits of a prompt of one sequence and, where asked for, of each step; the tokens of one and of three."""
    import torch

    most = min(1000, model.config.get_text_config().vocab_size)
    ids = torch.randint(0, most, (3, prompt), generator=torch.Generator().manual_seed(0))
    logits = [model(ids[:1]).logits]
    tokens = []
    for batch in (ids[:1], ids):
        how: dict[str, Any] = {
            "max_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
        }
        if steps:  # in pieces of one size: ours are otherwise what the budget has room for, and sums round by it
            how |= {"output_logits": True, "prefill_chunk_size": prompt // 2}
        found = model.generate(batch, **how)
        tokens.append(found.sequences)
        logits += found.logits or ()
    return [one.full_tensor() if hasattr(one, "full_tensor") else one for one in logits], tokens


def same(found: list[Any], expected: list[Any]) -> bool:
    import torch

    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def plain(rank: int, world: int, folder: str, out: str, **how: Any) -> dict[str, Any]:
    import torch
    import transformers

    from moe_offload.ranks.join import config_of_ranks

    config = config_of_ranks(world, transformers.AutoConfig.from_pretrained(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, experts_implementation="grouped_mm"
    )
    logits, tokens = say(model, **how)
    if rank == 0:
        torch.save([*logits, *tokens], f"{out}/said.pt")
    return {}


def ours(
    rank: int, world: int, folder: str, residency: Sequence[float] = (), slots: int = 0, out: str = "", **how: Any
) -> dict[str, Any]:
    import torch

    import moe_offload
    from moe_offload.checkpoint.outline import outline_folder
    from moe_offload.checkpoint.pretrained.split import split_outline
    from moe_offload.plan.budget import budget_for
    from moe_offload.plan.weights import layer_shapes, sum_costs
    from moe_offload.ranks.join import config_of_ranks, form_ranks

    kv_tokens = 3 * (how["prompt"] + how["new"])
    wanted = moe_offload.OffloadConfig(profile="off", kv_tokens=kv_tokens, experts_implementation="grouped_mm")
    outline, more = outline_folder(Path(folder)), {}
    if world > 1:
        more["distributed_config"] = config_of_ranks(world, outline.model.config)
        form_ranks(more["distributed_config"], wanted)
        outline = split_outline(outline, more["distributed_config"])
    share = slots / outline.moe_layers[0].num_experts if slots else residency[min(rank, len(residency) - 1)]
    shapes = layer_shapes(outline.moe_layers)
    budget = budget_for(share, shapes, sum_costs(outline.model, outline.moe_layers, wanted))
    del outline
    CLEAR.write_text("5")  # VmHWM begins anew
    before = status("VmRSS") - status("RssFile")
    with watching() as most:
        model: Any = moe_offload.from_pretrained(folder, budget, config=wanted, **more)
    loading = max(most) - before - budget
    CLEAR.write_text("5")
    logits, tokens = say(model, **how)
    held, handle = status("VmHWM") - status("RssFile") - before, model.moe_offload
    known = Path(out, "said.pt")
    expected = torch.load(known) if out and known.exists() else None
    found = {
        "slots": handle.plan.slots[0],
        "bytes_read": handle.stats().bytes_read,
        "loading_beyond": loading,
        "held_beyond": held - budget,
        "tokens": [ids.tolist() for ids in tokens],
        "same": None if expected is None else same([*logits, *tokens], expected),
    }
    handle.close()
    return found


@contextlib.contextmanager
def watching() -> Iterator[list[int]]:
    """What this process holds beside pages of files, every few milliseconds. (VmHWM has those of files, too: while it
    loads, a process reads shards through a mapping, whose pages the system takes back as it likes.)"""
    seen, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.003):
            seen.append(status("VmRSS") - status("RssFile"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def exchange(rank: int, world: int, prompt: int, **_: Any) -> dict[str, Any]:
    """Milliseconds of an all-reduce of bfloat16 numbers: the 5th, 50th and 95th percentile."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for tokens in (1, prompt, 512):
        hidden, times = torch.ones(tokens, 2048, dtype=torch.bfloat16), []
        for _ in range(EXCHANGES):
            begun = time.perf_counter()
            dist.all_reduce(hidden)
            times.append(1000 * (time.perf_counter() - begun))
        cuts = statistics.quantiles(times, n=20)
        found[f"{tokens} x 2048"] = [round(cuts[i], 2) for i in (0, 9, 18)]
    dist.destroy_process_group()
    return found


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return 0 if found is None else int(found[1]) * 1024


if __name__ == "__main__":
    main()
