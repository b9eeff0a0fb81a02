"""Products with weights that lie packed in their rows: codes and scales are read, and unpacked in registers.

    unpack_triton    a code and its scale -> the number, bit for bit what `moe_offload/packed` makes of them
    few_triton       a few pairs, a decode step's; with a gate, too
    many_triton      many pairs, a prompt's
    reference        the same by tensor operations, which unpack as the CPU does

`RowCodes` (experts/layout.py) says where in a row they lie.
"""
