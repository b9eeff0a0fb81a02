"""The formulas of the formats compiled by numba, run on torch's own threads.

`unpack` and `scan` are imported when the first packed matrix is unpacked (`formats.load_kernels`), `fused` by the first
product of compute="packed"; `vectors` and `dot` are the instructions they are made of, `pool` runs them.
May import numba, numpy, torch and the formats' constants.
"""
