"""What a product of one row, or of more, costs: ours in torch's order, torch's, and the memory's roof.

    python benchmarks/products.py [--rows 32] [--threads 1] [--megabytes 600]

For each format and shape, some matrices that together are larger than any cache, one product with each, in turns of
ours and of torch.mm on the same matrices (of unpacked ones, for packed formats). Medians; GB/s are of the bytes as
they rest. The first line has what as many threads read that only add up numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from moe_offload.apps.bench.result import describe_machine
from moe_offload.apps.bench.roofs.memory import memory_roof
from moe_offload.packed import FORMATS, exact, in_lanes
from moe_offload.packed.exact import find_order
from moe_offload.packed.ordered import multiply_in_order
from moe_offload.packed.quantise import quantise_fp8, quantise_int4, quantise_mxfp4

TURNED = "bfloat16, outputs side by side"
ROUNDS = 7
SHAPES = [(1536, 2048), (2048, 768), (2816, 2816), (5760, 2880)]
KINDS = {
    "bfloat16": None,
    TURNED: None,
    "mxfp4": quantise_mxfp4,
    "int4": quantise_int4,
    "fp8": lambda w_OI: quantise_fp8(w_OI, 64),
}


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    told.add_argument("--threads", type=int, default=torch.get_num_threads())
    told.add_argument("--megabytes", type=int, default=600)
    told.add_argument("--rows", type=int, default=1)
    asked = told.parse_args()
    torch.set_num_threads(asked.threads)
    print(describe_machine()["cpu"], f"torch {torch.__version__}", f"{asked.threads} threads")
    print(f"memory roof {memory_roof() / 1e9:.1f} GB/s")
    print(
        f"| product with rows: {asked.rows} | ours | GB/s | GFLOP/s | torch.mm of bfloat16 | GB/s | ours of torch.mm |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for outputs, inputs in SHAPES:
            print(measure(kind, outputs, inputs, asked.megabytes * 10**6, asked.rows), flush=True)


def measure(kind: str, outputs: int, inputs: int, nbytes: int, rows: int) -> str:
    order = find_order(rows, outputs, inputs, torch.bfloat16, turned=False)
    in_lanes_of = {"bfloat16": in_lanes.is_in_lanes, TURNED: in_lanes.is_in_parts}.get(kind)
    of_loops = in_lanes_of is not None and in_lanes_of(outputs, inputs)
    if not of_loops and (order is None or kind == TURNED):
        return f"| {kind} [{outputs}, {inputs}] | torch adds up in no order that is known | | | | | |"
    x, out = torch.randn(rows, inputs).bfloat16(), torch.empty(rows, outputs, dtype=torch.bfloat16)
    plain = [torch.randn(outputs, inputs).bfloat16() for _ in range(max(nbytes // (2 * outputs * inputs), 1))]
    if kind == TURNED:
        plain = [matrix.t().contiguous().t() for matrix in plain]
    pack = KINDS[kind]
    if of_loops:
        packed_bytes = plain[0].nbytes
        ours = lambda: [in_lanes.multiply_exactly(x, matrix.t(), out) for matrix in plain]  # noqa: E731
    elif pack is None:
        packed_bytes = plain[0].nbytes
        ours = lambda: [exact.multiplier()(x, matrix, out, *order) for matrix in plain]  # noqa: E731
    else:
        tensors = pack(plain[0])
        packed_bytes = sum(tensor.nbytes for tensor in tensors)
        some = [tuple(t.clone() for t in tensors) for _ in range(max(nbytes // packed_bytes, 1))][: 4 * len(plain)]
        format = FORMATS[kind].fit(tensors)
        ours = lambda: [multiply_in_order(format, one, x, out, order) for one in some]  # noqa: E731
    theirs = lambda: [torch.mm(x, matrix.t(), out=out) for matrix in plain]  # noqa: E731
    count = len(plain) if pack is None else len(some)
    ours(), theirs()
    pairs = [(took_s(ours) / count, took_s(theirs) / len(plain)) for _ in range(ROUNDS)]
    mine, torchs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return (
        f"| {kind} [{outputs}, {inputs}] | {mine * 1e3:.3f} ms | {packed_bytes / mine / 1e9:.1f} "
        f"| {2 * rows * outputs * inputs / mine / 1e9:.1f} "
        f"| {torchs * 1e3:.3f} ms | {plain[0].nbytes / torchs / 1e9:.1f} | {ratio:.2f} |"
    )


def took_s(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
