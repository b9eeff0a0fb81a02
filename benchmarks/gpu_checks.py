"""What only a GPU can tell, in a few minutes: the mechanisms we build on, and our kernels against their roofs.

    python benchmarks/gpu_checks.py                        prints a table; writes $OUT/gpu_checks.json where OUT is set
    python benchmarks/gpu_checks.py --only gather decide
    TRITON_INTERPRET=1 python benchmarks/gpu_checks.py --tiny     tries this script and the kernels, without a GPU

Sections are independent: one that fails says so, and the next one runs. Times are medians; a kernel's is the device's
own (events around it, behind a pause that hides the host), and one that stands in a CUDA graph is measured in one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_ahead import measure as measure_ahead
from gpu_decisions import time_decisions
from gpu_packed import compare as compare_packed
from gpu_timing import copy_batch, graph, replaced
from torch import Tensor

from moe_offload.apps.bench.roofs.link import copy_rows, measure_us, registered_memory
from moe_offload.runtime.kernels import KERNELS, Loads

LINK_ROWS_MB = (4.7, 9.4, 26.0)  # Qwen3-30B-A3B in 8 bits and in bf16, gpt-oss-20b in 8 bits
PROGRAMS = (16, 32, 64, 96, 132, 264)
CHUNKS = ((1024, 4), (1024, 8), (2048, 4), (4096, 8), (4096, 16))  # words of 8 bytes, warps
TILES = {
    "ALONG_H": ((4, 512, 2), (8, 256, 1), (8, 512, 2), (8, 512, 4), (16, 256, 4)),
    "ALONG_M": ((64, 64, 4), (64, 64, 8), (32, 128, 4), (128, 64, 8)),
}
#: model, pairs, gate_up and down as (M, H), and whether a column is contiguous rather than a row
MODELS = (("Qwen3-30B-A3B", 8, ((1536, 2048), (2048, 768)), False), ("gpt-oss", 4, ((5760, 2880), (2880, 2880)), True))

ROWS: list[dict[str, Any]] = []


def say(section: str, what: str, value: float | bool, unit: str, **more: Any) -> None:
    ROWS.append({"section": section, "what": what, "value": value, "unit": unit, **more})
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    print(f"{section:<12}{what:<64}{text:>12} {unit:<6}", *(f"{k}={v}" for k, v in more.items()), flush=True)


# mechanisms


def views(options: argparse.Namespace) -> None:
    """Host memory seen as a tensor of the device: by storage, and by the array interface."""
    with registered_memory(8 << 20, options.device) as (host, view):
        host.copy_(torch.randint(0, 255, host.shape, dtype=torch.uint8))
        before = torch.cuda.memory_allocated()
        say("views", "a storage over registered memory reads right", torch.equal(view.clone().cpu(), host), "")
        say("views", "and takes device memory", float(torch.cuda.memory_allocated() - before), "bytes")

        class Array:
            __cuda_array_interface__ = {  # noqa: RUF012
                "shape": tuple(host.shape),
                "typestr": "|u1",
                "data": (host.data_ptr(), False),
                "version": 3,
            }

        other = torch.as_tensor(Array(), device="cuda")
        say("views", "the array interface keeps the address", other.data_ptr() == host.data_ptr(), "")


def latency(options: argparse.Namespace) -> None:
    """What it costs the host to learn 8 ids, and to start a graph."""
    ids, pinned = torch.arange(8, device="cuda"), torch.zeros(8, dtype=torch.int64).pin_memory()
    event, x = torch.cuda.Event(), torch.zeros(1024, device="cuda")
    replay = graph([lambda: x.add_(1)] * 20)

    def copied() -> None:
        pinned.copy_(ids, non_blocking=True)
        event.record()
        event.synchronize()
        pinned.tolist()

    with registered_memory(8192, options.device) as (host, view):
        flags, seen_by_device = host.view(torch.int64).numpy(), view.view(torch.int64)[:8]

        def polled() -> None:
            flags[7] = -1
            seen_by_device.copy_(ids)
            until = time.perf_counter() + 1
            while flags[7] != 7:
                if time.perf_counter() > until:
                    raise TimeoutError("the host does not see what the device has stored in mapped memory")

        for what, f in (
            ("tolist", ids.tolist),
            ("pinned copy and event", copied),
            ("store to mapped memory, host polls", polled),
            ("replay of a graph of 20 kernels, the host's side", replay),
        ):
            seconds = []
            for _ in range(300):
                torch.cuda.synchronize()
                begun = time.perf_counter()
                f()
                seconds.append(time.perf_counter() - begun)
            say("latency", what, statistics.median(seconds) * 1e6, "us")


def streams(options: argparse.Namespace) -> None:
    """Whether Inductor keeps `torch.cuda.stream` (torch 2.11: expected not to)."""
    from torch._inductor.utils import run_and_get_code

    side = torch.cuda.Stream()

    def f(x: Tensor) -> Tensor:
        with torch.cuda.stream(side):
            y = x.sin()
        torch.cuda.current_stream().wait_stream(side)
        return y.cos() + x

    _, (code, *_) = run_and_get_code(torch.compile(f), torch.randn(1 << 20, device="cuda"))
    say("streams", "stream switches in the generated code", float(code.count("cuda.stream(")), "")
    say("streams", "waits in the generated code", float(code.count("wait_stream")), "")


# our kernels


def decide(options: argparse.Namespace) -> None:
    """Microseconds of one layer's bookkeeping within a CUDA graph; the router's choice and the gate, joined and not."""
    time_decisions(options, say)


def gather(options: argparse.Namespace) -> None:
    """GB/s over the link: our kernel by its grid and its chunks, and the copy engine."""
    for row_mb in (0.02,) if options.tiny else LINK_ROWS_MB:
        columns = int(row_mb * 1e6) // 4096 * 2048  # bf16; rows are whole pages
        experts, slots = (6, 3) if options.tiny else (max(8, int(600 // row_mb)), 8)
        with registered_memory(experts * columns * 2, options.device) as (host, view):
            host_EN, rows_EN = (rows.view(torch.bfloat16).view(experts, columns) for rows in (host, view))
            bank_SN = torch.empty(slots, columns, dtype=torch.bfloat16, device=options.device)
            for count in (1, 2) if options.tiny else (1, 4):
                link(f"{row_mb} MB x{count}", host_EN, rows_EN, bank_SN, count, options)


def link(name: str, host_EN: Tensor, rows_EN: Tensor, bank_SN: Tensor, count: int, options: argparse.Namespace) -> None:
    from moe_offload.runtime.kernels import gather_triton

    loads = Loads.empty(count, options.device)
    loads.slot_P.copy_(torch.arange(count))
    loads.expert_P.copy_(torch.arange(count) + 1)
    loads.count_1.fill_(count)

    def report(what: str, f: Callable[[], Any]) -> None:
        taken = measure_us(f, options.device)
        say("gather", f"{name}, {what}", count * host_EN[0].nbytes / taken / 1e3, "GB/s", us=round(taken))

    ours = partial(gather_triton.gather, rows_EN, bank_SN, loads)
    for programs in (1, 2) if options.tiny else PROGRAMS:
        report(f"kernel, {programs} programs", partial(ours, programs))
    for chunk, warps in CHUNKS[:1] if options.tiny else CHUNKS:
        with replaced(gather_triton, CHUNK=chunk, WARPS=warps):
            report(f"kernel, chunks of {chunk * 8 >> 10} KiB, {warps} warps", ours)
    report("copy engine, row by row", partial(copy_rows, bank_SN, host_EN, list(range(count))))
    if not options.tiny:
        try:
            report("copy engine, one batch", copy_batch(bank_SN, host_EN, count))
        except LookupError as error:  # the other rows are measured all the same
            print(f"copy engine, one batch: {error}")
    loads.count_1.zero_()
    say("gather", f"{name}, kernel that finds nothing to load", measure_us(ours, options.device), "us")


def indexed_mm(options: argparse.Namespace) -> None:
    """Products straight from the bank against torch.bmm on gathered copies; the roof is a copy within the device."""
    source = torch.empty(1 << (16 if options.tiny else 30), dtype=torch.uint8, device=options.device)
    taken = measure_us(partial(torch.empty_like(source).copy_, source), options.device)
    roof = 2 * source.nbytes / taken / 1e3
    say("indexed_mm", "roof: read and written by a copy within the device", roof, "GB/s")
    for model, pairs, shapes, transposed in MODELS:
        for rows, hidden in ((40, 24),) if options.tiny else shapes:
            products(f"{model} {rows}x{hidden} P={pairs}", pairs, rows, hidden, transposed, roof, options)


def products(
    name: str, pairs: int, rows: int, hidden: int, transposed: bool, roof: float, options: argparse.Namespace
) -> None:
    from moe_offload.runtime.kernels import indexed_triton

    sets = 2 if options.tiny else 8  # of slots, taken in turn: the second-level cache must not hold them
    slots = torch.randperm(sets * pairs).view(sets, pairs).to(options.device)
    x_PH = torch.randn(pairs, hidden, dtype=torch.bfloat16, device=options.device)
    bank_SN = torch.randn(sets * pairs, rows * hidden, dtype=torch.bfloat16, device=options.device)
    weight_SMH = bank_SN.view(-1, hidden, rows).transpose(1, 2) if transposed else bank_SN.view(-1, rows, hidden)

    def report(what: str, mm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        run = graph([partial(mm, x_PH, weight_SMH, slots_P) for slots_P in slots], options.device)
        taken = measure_us(run, options.device) / sets
        rate = pairs * bank_SN[0].nbytes / taken / 1e3
        say("indexed_mm", f"{name}, {what}", taken, "us", gb_s=round(rate), of_roof=f"{rate / roof:.0%}")

    report("gathered, torch.bmm", KERNELS["cpu"]().indexed_mm)
    report("ours", indexed_triton.indexed_mm)
    table = "ALONG_M" if transposed else "ALONG_H"
    for tile in TILES[table]:
        with replaced(indexed_triton, **{table: indexed_triton.Tile(*tile)}):
            report(f"ours, tile {tile[0]}x{tile[1]}, {tile[2]} warps", indexed_triton.indexed_mm)


def packed(options: argparse.Namespace) -> None:
    """Products with quantised rows (MXFP4, FP8, int4), unpacked in registers: right, and as fast as with bfloat16?"""
    compare_packed(options, say)


def ahead(options: argparse.Namespace) -> None:
    """Guessed rows copied beside a layer's products: what it takes from them, what it saves, and how soon it stops."""
    measure_ahead(options, say)


SECTIONS = (views, latency, streams, decide, gather, ahead, indexed_mm, packed)
OURS = (decide, gather, ahead, indexed_mm, packed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[f.__name__ for f in SECTIONS], help="these sections")
    parser.add_argument("--tiny", action="store_true", help="our kernels at tiny sizes, on the CPU: times mean nothing")
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda:0"
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny with TRITON_INTERPRET=1 tries the script without one")
    card = "none" if options.tiny else torch.cuda.get_device_name()
    machine = {"device": card, "torch": torch.__version__, "cuda": torch.version.cuda}
    with contextlib.suppress(ImportError):
        import triton

        machine["triton"] = triton.__version__
    print(machine)
    failed = []
    for section in OURS if options.tiny else SECTIONS:
        if options.only and section.__name__ not in options.only:
            continue
        print(f"\n{section.__name__}: {section.__doc__}")
        begun = time.perf_counter()
        try:
            section(options)
        except Exception:
            traceback.print_exc()
            failed.append(section.__name__)
        print(f"{section.__name__} took {time.perf_counter() - begun:.0f} s", flush=True)
        if "OUT" in os.environ:  # after each: the next may be the one that is killed
            found = {"machine": machine, "failed": failed, "rows": ROWS}
            Path(os.environ["OUT"], "gpu_checks.json").write_text(json.dumps(found, indent=1))
    print("\nfailed:", ", ".join(failed) or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
