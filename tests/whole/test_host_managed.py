"""A whole model whose rows go through the transfer of a device with streams, which are slow on purpose: same tokens.

The streams are those of the host here. What a GPU adds (that kernels run later) is in memory/transfer/test_staged.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_offload.apps.families.tiny import build
from moe_offload.memory.transfer import TRANSFERS
from moe_offload.memory.transfer.staged import DeviceTransfer
from tests.fakes.offloaded import IDS, QWEN, SETTINGS, offload, resident, say
from tests.fakes.streams import HostStreams


@pytest.fixture(params=[("disk", "grouped_mm"), ("cpu", "grouped_mm"), ("cpu", "batched_mm")], ids="-".join)
def offloaded_slowly(request, monkeypatch):
    torch._dynamo.reset()
    made = []

    def transfer(device):
        made.append(DeviceTransfer(HostStreams(0.001), staging_rows=2))
        return made[-1]

    monkeypatch.setitem(TRANSFERS, "cpu", transfer)
    where, implementation = request.param
    config = replace(SETTINGS, experts_implementation=implementation, wave_rows=2)
    model = offload(build(QWEN, num_hidden_layers=2), 0.3, device_map=where, config=config)
    yield model
    model.moe_offload.close()
    assert made and not any(thread.is_alive() for thread in made[0]._threads)


def test_tokens_are_those_of_the_resident_model(offloaded_slowly):
    model, plain = offloaded_slowly, resident(layers=2)
    for ids in (IDS, IDS.flip(1), IDS.repeat(1, 4)):
        assert torch.equal(say(model, ids), say(plain, ids))
    stats = model.moe_offload.stats()
    assert stats.misses > 20 and stats.bytes_read > 0 and stats.stall_s > 0
    assert model.moe_offload.depth().nbytes == 0
