"""What the Triton kernels compile to for an H100: the compiler needs no GPU, and says what one would trip over.

Each kernel is launched by its own wrapper, with its own settings, at the sizes that matter; the launch is compiled
instead of run.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from moe_offload.experts import RowCodes
from moe_offload.runtime.kernels import KERNELS, Loads, make_pace
from moe_offload.runtime.kernels.staging import STAGERS, Stagers, Staging
from moe_offload.runtime.kernels.state_block import StateBlock

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

POINTERS = {torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32"}
POINTERS |= {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int16: "*i16"}


class Compiled:
    """Stands in for a kernel: what would be launched is compiled as the launch would have it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **named):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = self.kernel.arg_names
        constants = {name: value for name, value in named.items() if name in names}
        signature, aligned = dict.fromkeys(names, "constexpr"), {}
        for i, (param, value) in enumerate(zip(self.kernel.params, args, strict=False)):
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if value is number and value == 1 and not param.do_not_specialize:
                constants[param.name] = value
                continue
            signature[param.name] = "i32" if value is number else POINTERS[value.dtype]
            if number % 16 == 0 and not param.do_not_specialize:
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
        options = {name: value for name, value in named.items() if name not in names}
        made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.ptx, self.shared_bytes, self.cubin = made.asm["ptx"], made.metadata.shared, made.asm["cubin"]

    def resources(self, tmp_path):
        """What ptxas gave the kernel: REG registers a thread, STACK and LOCAL bytes where they did not suffice."""
        file = tmp_path / "kernel.cubin"
        file.write_bytes(self.cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


#: Formats at the sizes of a large model's experts, as `RowCodes` has them.
PACKED = {
    "mxfp4": RowCodes("mxfp4", 5760, 2880, 1, 0, 0, 8294400, 0, (5760, 90), torch.uint8, torch.bfloat16),
    "fp8": RowCodes("fp8", 768, 2048, 2, 0, 1573248, 393216, 393312, (6, 16), torch.float32, torch.bfloat16),
    "int4": RowCodes("int4", 768, 2048, 2, 0, 884736, 393216, 442368, (768, 64), torch.bfloat16, torch.bfloat16),
    "fp8 of channels": RowCodes("fp8", 768, 2048, 1, 0, 0, 786432, 0, (768, 1), torch.bfloat16, torch.bfloat16),
    "fp8 of exponents": RowCodes("fp8", 768, 2048, 1, 0, 0, 1572864, 0, (768, 64), torch.uint8, torch.float16),
    "fp8 of float32": RowCodes("fp8", 768, 2048, 1, 0, 0, 393216, 0, (6, 16), torch.float32, torch.float32),
    "mxfp4 of float32": RowCodes("mxfp4", 5760, 2880, 1, 0, 0, 8294400, 0, (5760, 90), torch.uint8, torch.float32),
    "int4 of float32": RowCodes("int4", 768, 2048, 1, 0, 0, 0, 0, (768, 64), torch.float32, torch.float32),
}


def multiply_packed(product, name, pairs=None):
    def run(kernels):
        codes, many = PACKED[name], 512 if product == "packed_grouped_mm" else 8
        x_PH = torch.empty(pairs or many, codes.inputs, dtype=codes.dtype)
        rows_SB = torch.empty(2, 8_847_360, dtype=torch.uint8)
        getattr(kernels, product)(x_PH, rows_SB, torch.zeros(len(x_PH), dtype=torch.int64), codes)

    return run


def launches():
    """Each kernel at the sizes of a step of Qwen3-30B-A3B or gpt-oss, and decide at its largest: (kernel, run)."""

    def decide(experts, slots, pairs):
        def run(kernels):
            state, loads = StateBlock([(experts, slots)], "cpu").states[0], Loads.empty(pairs, "cpu")
            kernels.decide(torch.arange(pairs), state, loads, make_pace(1, 32.0, "cpu"))

        return run

    def decide_top(experts, slots, k):
        def run(kernels):
            state, loads = StateBlock([(experts, slots)], "cpu").states[0], Loads.empty(k, "cpu")
            kernels.decide_top(torch.empty(1, experts), k, state, loads, make_pace(1, 32.0, "cpu"))

        return run

    def gather(kernels):
        rows = torch.empty(2, 4096, dtype=torch.bfloat16)
        kernels.gather(rows, rows, Loads.empty(1, "cpu"))

    def multiply(name, pairs, transposed):
        def run(kernels):
            x_PH, weight_SHO = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((pairs, 512), (2, 512, 512)))
            weight_SHO = weight_SHO.transpose(1, 2) if transposed else weight_SHO
            getattr(kernels, name)(x_PH, weight_SHO, torch.zeros(pairs, dtype=torch.int64))

        return run

    def staged(name):
        def run(kernels):
            state, staging = StateBlock([(128, 64)], "cpu").states[0], Staging.empty(32, "cpu")
            rows = torch.empty(2, 4096, dtype=torch.bfloat16)
            arguments = {
                "choose": (torch.arange(8), torch.arange(8), state, staging),
                "stage": (rows, rows, staging),
                "gather_staged": (rows, rows, rows, Loads.empty(8, "cpu"), state, staging),
            }
            getattr(STAGERS["cuda"](), name)(*arguments[name])

        return run

    for name in Stagers._fields:
        yield pytest.param(name, staged(name), id=name)
    for product in ("packed_indexed_mm", "packed_gated_mm", "packed_grouped_mm"):
        for name in PACKED:
            yield pytest.param(product, multiply_packed(product, name), id=f"{product}-{name}")
    for sizes in ((128, 64, 8), (512, 512, 512)):
        yield pytest.param("decide", decide(*sizes), id=f"decide-{sizes}")
    yield pytest.param("decide_top", decide_top(128, 64, 8), id="decide_top")
    yield pytest.param("gather", gather, id="gather")
    for name, pairs in (("indexed_mm", 8), ("gated_mm", 8), ("grouped_mm", 512)):
        for transposed in (False, True):
            yield pytest.param(name, multiply(name, pairs, transposed), id=f"{name}-{transposed}")


@pytest.fixture
def kernels():
    return KERNELS["cuda"]()


#: Where a product is launched from, if not from a function of its own.
KERNEL_OF = {"packed_indexed_mm": "_few", "packed_gated_mm": "_few", "packed_grouped_mm": "_many"}


def compiled(monkeypatch, function, name):
    stand_in = Compiled(function.__globals__[name])
    monkeypatch.setitem(function.__globals__, name, stand_in)
    return stand_in


@pytest.mark.parametrize(("name", "run"), [*launches()])
def test_registers_suffice(kernels, monkeypatch, tmp_path, name, run):
    """A value that is put away in memory, and fetched again, costs more than what it was made of."""
    function = getattr(STAGERS["cuda"]() if name in Stagers._fields else kernels, name)
    kernel = compiled(monkeypatch, function, KERNEL_OF.get(name, f"_{name}"))
    run(kernels)
    used = kernel.resources(tmp_path)
    assert 8 <= used["REG"] <= 255 and used["STACK"] == used["LOCAL"] == 0, used
    assert kernel.shared_bytes <= 227 << 10


@pytest.mark.parametrize(("experts", "slots", "pairs"), [(128, 32, 8), (32, 16, 4), (512, 512, 512)])
def test_scores_are_never_fused_into_one_rounding(kernels, monkeypatch, experts, slots, pairs):
    kernel = compiled(monkeypatch, kernels.decide, "_decide")
    state, loads, ids_P = (
        StateBlock([(experts, slots)], "cpu").states[0],
        Loads.empty(pairs, "cpu"),
        torch.arange(pairs),
    )
    kernels.decide(ids_P, state, loads, make_pace(1, 32.0, "cpu"))
    doubles = set(re.findall(r"\w+(?:\.\w+)*\.f64\b", kernel.ptx))
    assert {"mul.rn.f64", "add.rn.f64", "div.rn.f64"} <= doubles and not any("fma" in op for op in doubles)


def test_rows_are_copied_sixteen_bytes_at_a_time(kernels, monkeypatch):
    kernel = compiled(monkeypatch, kernels.gather, "_gather")
    rows = torch.empty(2, 4096, dtype=torch.bfloat16)
    kernels.gather(rows, rows, Loads.empty(1, "cpu"))
    for way in ("ld", "st"):
        wide = [op for op in re.findall(rf"{way}\.global\S*", kernel.ptx) if "v2.b64" in op or "v4.b32" in op]
        assert len(wide) == 4


def test_one_thread_asks_whether_to_go_on_and_all_hear_it(monkeypatch):
    """A thread that stopped later than others would copy a part of a chunk, which is then counted as whole or not."""
    function = STAGERS["cuda"]().stage
    kernel, rows = compiled(monkeypatch, function, "_stage"), torch.empty(2, 4096, dtype=torch.bfloat16)
    function(rows, rows, Staging.empty(2, "cpu"))
    loop = kernel.ptx[kernel.ptx.index("Inner Loop Header") :]
    first = re.search(r"setp\.eq\.b32 \t(%p\d+), %r\d+, 0;", kernel.ptx)
    asks = re.search(rf"@{first[1]} (atom|ld)\.global\.gpu\.relaxed\S+", loop)
    assert asks, "the first thread, and only it, and not what a cache of its own has kept"
    order = [loop.index(part) for part in (asks[0], "st.shared", "bar.sync \t0;\n\tld.shared", " bra ")]
    assert order == sorted(order)
    wide = [op for op in re.findall(r"ld\.global\S*", kernel.ptx) if "v2.b64" in op or "v4.b32" in op]
    assert len(wide) == 4


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_read_sixteen_bytes_at_a_time_and_no_warp_waits(kernels, monkeypatch, transposed):
    kernel = compiled(monkeypatch, kernels.indexed_mm, "_indexed_mm")
    x_PH, weight_SMH = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((1, 512), (2, 512, 512)))
    kernels.indexed_mm(
        x_PH, weight_SMH.transpose(1, 2) if transposed else weight_SMH, torch.zeros(1, dtype=torch.int64)
    )
    loop = kernel.ptx[kernel.ptx.index("Inner Loop Header") :]
    loop = loop[: loop.index("\tbra ") if "\tbra " in loop else loop.index(" bra ")]
    assert loop.count("ld.global.v4.b32") >= 4 and "bar.sync" not in loop and "st.shared" not in loop


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "product"), [(torch.bfloat16, "wgmma.mma_async"), (torch.float32, "fma.rn.f32")])
def test_tiles_are_loaded_ahead_and_multiplied_as_their_dtype_allows(kernels, monkeypatch, transposed, dtype, product):
    """bfloat16 by the tensor cores; float32 never, which would round it to 10 bits."""
    kernel = compiled(monkeypatch, kernels.grouped_mm, "_grouped_mm")
    x_PH, weight_SHO = (torch.empty(*shape, dtype=dtype) for shape in ((512, 1024), (2, 1024, 1024)))
    slots_P = torch.zeros(512, dtype=torch.int64)
    kernels.grouped_mm(x_PH, weight_SHO.transpose(1, 2) if transposed else weight_SHO, slots_P)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*;", kernel.ptx)
    assert copies and all(", 0x10" in copy for copy in copies) and product in kernel.ptx
    assert "tf32" not in kernel.ptx and kernel.shared_bytes <= 227 << 10


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("product", ["packed_indexed_mm", "packed_grouped_mm"])
def test_what_is_unpacked_is_rounded_to_the_nearest_and_keeps_subnormals(kernels, monkeypatch, product, name):
    """The casts that the interpreter's tests stand in for, and multiplications that do not flush."""
    kernel = compiled(monkeypatch, getattr(kernels, product), KERNEL_OF[product])
    multiply_packed(product, name)(kernels)
    casts = set(re.findall(r"cvt\.\w+\.(?:b?f16(?:x2)?)\.f32", kernel.ptx))
    assert all(cast.startswith("cvt.rn.") for cast in casts) and "ftz" not in kernel.ptx
    assert bool(casts) == (PACKED[name].dtype != torch.float32)
    assert ("wgmma.mma_async" in kernel.ptx) == (product == "packed_grouped_mm" and bool(casts))


@pytest.mark.parametrize("name", PACKED)
def test_codes_are_read_sixteen_bytes_at_a_time_and_no_warp_waits(kernels, monkeypatch, name):
    kernel = compiled(monkeypatch, kernels.packed_indexed_mm, "_few")
    multiply_packed("packed_indexed_mm", name)(kernels)
    loop = kernel.ptx[kernel.ptx.index("Inner Loop Header") :]
    loop = loop[: loop.index(" bra ")]
    assert "ld.global.v4.b32" in loop and kernel.shared_bytes == 0
    assert "bar.sync" not in loop and "shared" not in loop
