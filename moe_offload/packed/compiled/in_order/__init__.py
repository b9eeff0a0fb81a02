"""Kernels that add up in the order of torch's own."""
