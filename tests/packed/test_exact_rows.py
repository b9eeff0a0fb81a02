"""Few rows of x are tried by themselves: what larger products do says nothing of them."""

import torch

from moe_offload.packed import exact


def test_decoding_does_not_depend_on_prompts(monkeypatch):
    """A library whose products of 8 rows and more have other bits from the side, as with AMX."""
    product = torch.mm

    def other_bits_from_8_rows_on(x, matrix):
        found = product(x, matrix)
        return found if len(x) < 8 or matrix.is_contiguous() else found + 1

    monkeypatch.setattr(torch, "mm", other_bits_from_8_rows_on)
    exact._transposed_is_exact.cache_clear()
    found = {rows: exact.transposed_is_exact(rows, 48, 32, torch.bfloat16) for rows in (1, 4, 5, 8, 300)}
    exact._transposed_is_exact.cache_clear()
    assert found == {1: True, 4: True, 5: False, 8: False, 300: False}
