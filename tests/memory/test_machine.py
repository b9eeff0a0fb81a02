"""What a process can have of main memory, from what systems say of it: Linux, its cgroups, macOS."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from moe_offload.memory import machine
from moe_offload.memory.machine import main_memory

GB = 10**9
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            250000.
Pages inactive:                          240000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                           5000.
"Translation faults":                 123456789.
Pages copy-on-write:                    1234567.
File-backed pages:                       180000.
Anonymous pages:                         300000.
Pages stored in compressor:              400000.
Pages occupied by compressor:             90000.
"""


@pytest.fixture
def system(tmp_path, monkeypatch):
    """16 GB, of which psutil finds 10 available; `system(groups, files)` puts the process into cgroups."""
    memory = SimpleNamespace(total=16 * GB, available=10 * GB, inactive=4 * GB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")

    def put(groups: str, files: dict[str, object]) -> None:
        (tmp_path / "own").write_text(groups)
        for name, content in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")

    return put


def of_v2(limit, used, **stat):
    lines = "\n".join(f"{name} {n}" for name, n in stat.items())
    return {"a/b/memory.max": limit, "a/b/memory.current": used, "a/b/memory.stat": lines}


def test_without_cgroups_it_is_what_the_system_says(system):
    assert main_memory() == machine.Memory(16 * GB, 10 * GB)


def test_a_limit_is_less_than_the_machine_and_its_page_cache_is_free(system):
    files = of_v2(4 * GB, 3 * GB, anon=GB, inactive_file=GB, active_file=GB // 2, slab=7)
    system("0::/a/b\n", files)
    assert main_memory() == machine.Memory(4 * GB, 2.5 * GB, "the memory limit of this process's cgroup")


def test_the_groups_around_a_group_bound_it_too(system):
    system("0::/a/b\n", {**of_v2("max", GB), "a/memory.max": 2 * GB, "a/memory.current": GB})
    assert (main_memory().total, main_memory().free) == (2 * GB, GB)


def test_a_soft_limit_counts(system):
    system("0::/a/b\n", {**of_v2("max", GB), "a/b/memory.high": 3 * GB})
    assert main_memory().free == 2 * GB


def test_more_used_than_allowed_leaves_nothing(system):
    system("0::/a/b\n", of_v2(GB, 2 * GB))
    assert main_memory().free == 0


def test_a_large_limit_on_a_full_machine_gives_what_the_machine_has(system):
    system("0::/a/b\n", of_v2(15 * GB, 0))
    assert (main_memory().total, main_memory().free) == (15 * GB, 10 * GB)


def test_version_1_and_a_container_that_sees_its_own_group_at_the_root(system):
    files = {
        "memory/memory.limit_in_bytes": 6 * GB,
        "memory/memory.usage_in_bytes": 5 * GB,
        "memory/memory.stat": f"cache 1\ntotal_inactive_file {GB}\ninactive_file 3",
    }
    system("5:cpu:/\n4:memory:/docker/of-the-host\n0::/\n", files)
    assert (main_memory().total, main_memory().free) == (6 * GB, 2 * GB)


def test_version_1_without_a_limit(system):
    system("4:memory:/\n", {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": GB})
    assert main_memory() == machine.Memory(16 * GB, 10 * GB)


def test_files_that_say_nothing_are_no_limit(system):
    system("nonsense\n", {})
    assert main_memory().total == 16 * GB


def test_macos_does_not_count_what_is_inactive(system, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **_: asked.append(args) or SimpleNamespace(stdout=VM_STAT))
    assert main_memory().free == 16 * GB - 16384 * (300_000 + 100_000 + 90_000 - 5_000)
    assert asked == [(["vm_stat"],)]


@pytest.mark.parametrize("told", [OSError(), subprocess.TimeoutExpired("vm_stat", 5), "Mach says nothing"])
def test_macos_without_vm_stat(system, monkeypatch, told):
    def run(*_, **__):
        if isinstance(told, Exception):
            raise told
        return SimpleNamespace(stdout=told)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert main_memory().free == 6 * GB
