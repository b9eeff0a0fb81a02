"""The formulas compiled by numba, on torch's own threads. Imported when the first packed matrix is unpacked."""
