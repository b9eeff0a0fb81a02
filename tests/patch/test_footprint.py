"""get_memory_footprint() tells what an offloaded model holds."""

from __future__ import annotations

from tests.fakes.offloaded import offloaded, resident


def test_the_footprint_is_dense_weights_and_slots():
    whole = resident(layers=2)
    buffers = whole.get_memory_footprint() - whole.get_memory_footprint(return_buffers=False)
    model = offloaded(layers=2, residency=0.5)
    handle = model.moe_offload
    dense_bytes, bank_bytes = handle.plan.costs.dense_bytes, handle.plan.bank_bytes
    assert model.get_memory_footprint() == dense_bytes + bank_bytes < whole.get_memory_footprint()
    assert model.get_memory_footprint(return_buffers=False) == dense_bytes + bank_bytes - buffers and buffers > 0
    handle.close()
    assert model.get_memory_footprint() == dense_bytes, "the slots were given back"
