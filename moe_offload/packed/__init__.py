"""What one packed matrix is worth, and how fast it is unpacked: one file for each format, the same bits everywhere.

    mxfp4     4-bit floats, a power of two for each 32 columns       blocks [O, G, 16] or [O, I/2], scales [O, G]
    fp8       8-bit floats, a scale for each block of the matrix     q [O, I], scale [so, si], [O, 1], [1] or []
    int4      4-bit integers, a scale for each group or row          packed [O, I/8], scale [O, I/g] or [O, 1]

A format knows the tensors of *one* matrix as they lie in a checkpoint, and nothing of files, experts or slots. The
torch formula of each is the meaning, bit for bit what plain transformers makes of the same tensors; compiled kernels
are the same formula faster, and are taken where numba is installed, the matrix is on the CPU and bfloat16 is asked for.

Shapes: O outputs and I inputs of one matrix, G groups of one row, M tokens. May import errors and torch; never a file.
"""

from __future__ import annotations

from .formats import Format
from .fp8 import FP8
from .int4 import Int4
from .mxfp4 import MXFP4

#: Name of a format -> what makes one from the shapes of a matrix's tensors, code tensor first.
FORMATS: dict[str, type[Format]] = {"mxfp4": MXFP4, "fp8": FP8, "int4": Int4}

__all__ = ["FORMATS", "FP8", "MXFP4", "Format", "Int4"]
