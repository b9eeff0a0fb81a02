"""How one expert's tensors lie in its row.

Shapes: E experts of a layer, H hidden, I inner.

A *row* is everything one expert needs (weights, biases, scales) as one contiguous, 4 KiB-aligned block of bytes: it
moves, and is committed, as a unit. Fields follow each other in the order the module declares them, each aligned to 64
bytes so that a kernel sees the alignment it would see in an ordinary tensor:

    row of qwen3_moe   | gate_up_proj [2I, H] | down_proj [H, I] | padding to 4 KiB |
    row of gpt_oss     | gate_up_proj [H, 2I] | gate_up_proj_bias [2I] | down_proj [I, H] | down_proj_bias [H] | ... |

A matrix of float32 or float64 begins as far from a cache line as plain transformers has it. That maps the file, where a
tensor may begin anywhere, and the bits of a product depend on it: MKL adds up the product of one row with such a matrix
in another order where that does not begin at a multiple of 16 bytes (torch 2.13, EPYC; not so bfloat16 and float16).

    row of dbrx, whose stack lies 8 bytes past a line of its file | 8 bytes | w1 [F, H] | v1 [F, H] | w2 [F, H] | ... |

Of a quantised checkpoint a row holds what the files hold, *packed*, and its weights are unpacked where they are used:

    row of qwen3_moe, FP8   | gate_proj F8 [I, H] | its scales | up_proj F8 [I, H] | its scales | down_proj ... |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

ROW_ALIGN = 4096  # the unit of O_DIRECT and of a page
FIELD_ALIGN = 64  # a cache line, and what torch's own CPU allocator gives
PLACED = (torch.float32, torch.float64)  # the dtypes whose products depend on where a matrix begins

#: Of each field of an expert, how many bytes past a cache line it begins where plain transformers has it.
Begins = tuple[int, ...]


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@dataclass(frozen=True)
class Field:
    """One parameter's share of a row: `shape` and `nbytes` are those of a single expert."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    nbytes: int

    def view_in(self, row: torch.Tensor) -> torch.Tensor:
        """The field itself, of a row uint8 [row_bytes]."""
        return row[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    @property
    def is_placed(self) -> bool:
        """Whether products with it depend on where it begins."""
        return len(self.shape) > 1 and self.dtype in PLACED


@dataclass(frozen=True)
class RowLayout:
    """Where each field of one expert lies in its row."""

    fields: tuple[Field, ...]
    row_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The element type in which a bank of such rows is seen: the fields' own where they share one, else bytes."""
        kinds = {field.dtype for field in self.fields}
        return kinds.pop() if len(kinds) == 1 else torch.uint8

    @classmethod
    def of(cls, params: dict[str, torch.Tensor]) -> RowLayout:
        """Lay out stacked parameters `{name: [E, ...]}`, in the order given."""
        return cls.in_order((name, tuple(param.shape[1:]), param.dtype) for name, param in params.items())

    @classmethod
    def in_order(
        cls, parts: Iterable[tuple[str, tuple[int, ...], torch.dtype]], begins: Iterable[int] = itertools.repeat(0)
    ) -> RowLayout:
        """Lay out tensors of one expert, given as (name, shape, dtype), one after the other. `begins`: so many bytes
        past a cache line."""
        fields, end = [], 0
        for (name, shape, dtype), begin in zip(parts, begins, strict=False):
            nbytes = math.prod(shape) * dtype.itemsize
            offset = end + (begin - end) % FIELD_ALIGN
            fields.append(Field(name, shape, dtype, offset, nbytes))
            end = offset + nbytes
        return cls(tuple(fields), round_up(end, ROW_ALIGN))

    def beginning(self, begins: Begins) -> RowLayout:
        """The same fields, each so many bytes past a cache line."""
        return self.in_order(((field.name, field.shape, field.dtype) for field in self.fields), begins)

    @property
    def begins(self) -> Begins:
        """How many bytes past a cache line each field begins."""
        return tuple(field.offset % FIELD_ALIGN for field in self.fields)


@dataclass(frozen=True)
class RowCodes:
    """Where kernels find a packed weight in a row: `matrices` [outputs, inputs] of one format, one below the other.

    Codes begin at byte `codes_at`, those of each matrix `codes_step` behind those of the one before; scales likewise,
    in units of one. `grid` says into how many blocks of one scale the rows and the columns of a matrix are cut.
    `format` is a name in `packed.FORMATS`, `dtype` what is unpacked.
    """

    format: str
    outputs: int
    inputs: int
    matrices: int
    codes_at: int
    codes_step: int
    scales_at: int
    scales_step: int
    grid: tuple[int, int]
    scale_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """O of all matrices together."""
        return self.outputs * self.matrices


class PackedWeight(Protocol):
    """One parameter of an expert that lies packed in its row, and is unpacked where it is used.

    Shapes: P token-expert pairs, I inputs, O outputs of the product, S slots. Rows are uint8 [row_bytes], contiguous.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def format(self) -> str:
        """The name of the format it rests in, for people."""

    @property
    def recipe(self) -> str:
        """What is unpacked and how, as text: two weights with the same text unpack the same bytes alike."""

    @property
    def workspace_bytes(self) -> int:
        """What unpacking takes at a time."""

    def unpack(self, row: torch.Tensor, out: torch.Tensor) -> None:
        """Write the parameter into `out`, of its shape and dtype."""

    def multiply(
        self,
        x_PI: torch.Tensor,
        rows_SB: torch.Tensor,
        runs: Sequence[tuple[int, int, int]],
        out_PO: torch.Tensor,
        transposed: bool,
    ) -> None:
        """For each run (slot, begin, end): `out = x @ W` of its pairs and the row in its slot, or `x @ W.T` if
        `transposed`, with the bits of that product with the unpacked parameter."""

    def row_codes(self, transposed: bool) -> RowCodes | None:
        """What kernels of a device need to know to compute that product by themselves, with the very numbers that are
        unpacked; None where they cannot. A weight that has none for either way is unpacked by the host."""
