"""The formulas of the formats, compiled by numba, on torch's own threads; imported when a matrix first needs them."""
