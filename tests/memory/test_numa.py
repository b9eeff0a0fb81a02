"""Rows below a GPU lie at the socket that it hangs on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_offload.memory import numa
from moe_offload.memory.buffers import HUGE_PAGE, map_pages

MAPS = Path("/proc/self/numa_maps")


def policy_at(address):
    lines = [line.split() for line in MAPS.read_text().splitlines()]
    return next(words[1] for words in reversed(lines) if int(words[0], 16) <= address)


@pytest.mark.skipif(not MAPS.exists(), reason="this kernel has no NUMA policies")
@pytest.mark.parametrize("huge", [False, True])
def test_pages_are_taken_from_the_node_that_is_asked_for(huge):
    probe = map_pages(HUGE_PAGE)
    if not numa.prefer_node(probe, 0):
        pytest.skip("this container may not set policies")
    rows, others = map_pages(3 * HUGE_PAGE + 5, huge, node=0), map_pages(3 * HUGE_PAGE + 5, huge)
    assert policy_at(rows.data_ptr()).startswith("prefer") and policy_at(others.data_ptr()) == "default"
    rows.fill_(3)
    assert bool((rows == 3).all())


def test_a_node_or_a_machine_that_is_not_there_changes_nothing(monkeypatch):
    assert not numa.prefer_node(map_pages(HUGE_PAGE), 900)
    monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
    assert not numa.prefer_node(map_pages(HUGE_PAGE), 0)
    rows = map_pages(HUGE_PAGE, node=0)
    rows.fill_(3)
    assert bool((rows == 3).all())


@pytest.mark.parametrize(
    ("nodes", "said", "found"), [(2, "1\n", 1), (2, "-1\n", None), (1, "0\n", None), (2, None, None), (2, "?", None)]
)
def test_the_node_of_a_gpu_is_what_the_system_says(nodes, said, found, monkeypatch, tmp_path):
    place = tmp_path / "pci" / "0001:2a:00.0"
    place.mkdir(parents=True)
    if said is not None:
        (place / "numa_node").write_text(said)
    for i in range(nodes):
        (tmp_path / "node" / f"node{i}").mkdir(parents=True)
    monkeypatch.setattr(numa, "PCI", tmp_path / "pci")
    monkeypatch.setattr(numa, "NODES", tmp_path / "node")
    gpu = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x2A, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert numa.node_of("cuda:0") == found
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert numa.node_of("cuda:0") is None
