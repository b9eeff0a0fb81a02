"""Remembered usage: what fades, what several processes make of one file, and what becomes of a damaged one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_offload.errors import ProfileError
from moe_offload.observe.profile import Profile
from moe_offload.observe.usage import KEPT_TOKENS, UsageFile, mixed
from tests.observe.test_profile import FINGERPRINT, PROFILE
from tests.paths import ROOT


@pytest.fixture
def file(tmp_path):
    return UsageFile.of_model(tmp_path, "a/model", "italian", FINGERPRINT)


def of_tokens(tokens, expert, **meta):
    """All tokens use `expert` of the second layer."""
    return Profile.of(FINGERPRINT, tokens, [[0] * 4, [tokens * (e == expert) for e in range(3)]], meta)


def test_nothing_is_remembered_before_something_was_used(file):
    assert file.read() is None and not file.folder.exists()


def test_what_is_added_is_there(file):
    file.add(PROFILE)
    file.add(of_tokens(5, 2, more="said"))
    found = file.read()
    assert found.tokens == 15 and found.counts == [[7, 1, 7, 5], [0, 10, 5]]
    assert found.meta == {**PROFILE.meta, "more": "said"}
    assert file.path.stat().st_mode & 0o077 == 0, "what one uses is nobody else's business"


def test_a_model_of_another_shape_has_a_folder_of_its_own(tmp_path, file):
    other = FINGERPRINT.model_copy(update={"hidden": 16})
    assert UsageFile.of_model(tmp_path, "a/model", "italian", other).folder != file.folder
    assert file.folder.parent == tmp_path and file.path.name == "italian.json"


def test_last_month_does_not_outvote_today():
    memory = of_tokens(1, 0)
    for _ in range(100):
        memory = mixed(memory, of_tokens(1000, 0))
        assert memory.tokens <= KEPT_TOKENS
    for _ in range(KEPT_TOKENS // 1000 + 1):
        memory = mixed(memory, of_tokens(1000, 1))
    assert memory.counts[1][1] > memory.counts[1][0] > 0


def test_little_that_was_there_is_not_scaled_up_by_much_that_is_new():
    memory = mixed(of_tokens(100, 0), of_tokens(KEPT_TOKENS, 1))
    assert memory.counts[1][:2] == [100, KEPT_TOKENS]


def test_small_additions_leave_small_counts(file):
    memory = Profile.of(FINGERPRINT, KEPT_TOKENS // 4, [[0] * 4, [3, 1000, 0]])
    for _ in range(1000):
        memory = mixed(memory, of_tokens(1, 2))
    assert memory.counts[1] == [3, 1000, 1000], "rounded at every addition, the first would be gone"


def test_more_than_is_kept_at_once_is_kept_alone():
    found = mixed(of_tokens(KEPT_TOKENS, 0), of_tokens(3 * KEPT_TOKENS, 1))
    assert found.counts[1] == [KEPT_TOKENS // 2, 3 * KEPT_TOKENS, 0]
    again = mixed(found, of_tokens(1, 2))
    assert again.tokens <= KEPT_TOKENS and again.counts[1][2] == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"\x80\x04", b'{"format": "moe_offload.profile", "version": 9}'])
def test_a_damaged_file_is_set_aside_with_a_line(file, damage, caplog):
    file.add(PROFILE)
    file.path.write_bytes(damage)
    assert file.read() is None
    assert not file.path.exists() and file.path.with_suffix(".damaged").read_bytes() == damage
    assert caplog.text.count("begins anew") == 1
    file.add(PROFILE)
    assert file.read() == PROFILE.model_copy(update={"created": file.read().created})


def test_damage_that_comes_while_a_model_runs_costs_what_was_there_and_no_more(file, caplog):
    file.add(PROFILE)
    file.path.write_bytes(b"[")
    file.add(of_tokens(5, 2))
    assert file.read().tokens == 5 and "begins anew" in caplog.text


def test_a_file_of_another_model_is_not_mixed_with(file):
    file.folder.mkdir()
    Profile.of(FINGERPRINT.model_copy(update={"hidden": 16}), 1, [[0] * 4, [0] * 3]).save(file.path)
    assert file.read() is None and file.path.with_suffix(".damaged").exists()


def test_what_cannot_be_written_is_a_typed_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="usage was not saved to"):
        UsageFile.of_model(tmp_path / "file", "m", "default", FINGERPRINT).add(PROFILE)


ADD = """
import sys
from pathlib import Path
from moe_offload.observe.profile import Profile
from moe_offload.observe.usage import UsageFile
from tests.observe.test_usage import FINGERPRINT, of_tokens
file = UsageFile.of_model(Path(sys.argv[1]), "a/model", "italian", FINGERPRINT)
for _ in range(40):
    file.add(of_tokens(1, int(sys.argv[2])))
    found = Profile.load(file.path)  # without the lock: never half a file
    assert found.counts[1][int(sys.argv[2])] > 0
"""


def test_processes_that_add_at_once_lose_nothing(tmp_path, file):
    processes = [
        subprocess.Popen([sys.executable, "-c", ADD, str(tmp_path), str(expert)], cwd=ROOT, stderr=subprocess.PIPE)
        for expert in (0, 1)
    ]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read().decode()
        process.stderr.close()
    assert file.read().tokens == 80 and file.read().counts[1] == [40, 40, 0]
