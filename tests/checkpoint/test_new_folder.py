"""A checkpoint that takes the place of another: whatever happens at any step, the folder has the old or the new one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers.modeling_utils import _get_resolved_checkpoint_files

from moe_offload.checkpoint.folder import INDEX
from moe_offload.checkpoint.new_folder import new_checkpoint, new_folder
from moe_offload.errors import OffloadError, PackError, SaveError
from moe_offload.files import moves
from moe_offload.files.staging import staging_folder
from tests.fakes.file_faults import Fault, full, interrupt


def write(folder: Path, name: str, shards: int) -> None:
    """The files of checkpoint `name`, in so many shards; with one, without an index."""
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    for i, file in enumerate(files if shards > 1 else ["model.safetensors"]):
        save_file({f"{name}.{i}": torch.full((4,), float(len(name) + i))}, folder / file)
    if shards > 1:
        map_ = {f"{name}.{i}": file for i, file in enumerate(files)}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 16 * shards}, "weight_map": map_}))
    for file in ("config.json", "generation_config.json", f"only_{name}.json"):
        (folder / file).write_text(json.dumps({"name": name}))


def loaded(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Whose configuration and whose tensors transformers finds there; all else is of the same one."""
    config = PreTrainedConfig.from_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["name"] == config.name
    assert (folder / "only_new.json").is_file() is (config.name == "new")
    options = {"variant": None, "gguf_file": None, "use_safetensors": None, "user_agent": None, "is_remote_code": False}
    named = getattr(config, "transformers_weights", None)
    files, _ = _get_resolved_checkpoint_files(str(folder), **options, transformers_explicit_filename=named)
    return config.name, tuple(sorted(key for file in files for key in load_file(file)))


def want(name: str, shards: int) -> tuple[str, tuple[str, ...]]:
    return name, tuple(f"{name}.{i}" for i in range(shards))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def save_over(out: Path, shards: int, fault: Fault) -> None:
    with new_checkpoint(out, 1000) as folder:
        write(folder, "new", shards)
        fault.__enter__()
    fault.__exit__()


CASES = [(1, 2), (2, 1), (2, 2), (3, 2), (1, 1)]  # shards of the old checkpoint, and of the new one


def named(case: tuple[int, int]) -> str:
    return f"{case[1]} over {case[0]}"


@pytest.fixture(params=CASES, ids=named)
def case(request: Any, tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    yield from prepared(tmp_path, *request.param)


@pytest.fixture(params=[pytest.param(one, marks=[pytest.mark.long][: one != (3, 2)]) for one in CASES], ids=named)
def case_of_kills(request: Any, tmp_path: Path) -> Iterator[tuple[Path, int, int]]:
    yield from prepared(tmp_path, *request.param)


def prepared(tmp_path: Path, old: int, new: int) -> Iterator[tuple[Path, int, int]]:
    (tmp_path / "before").mkdir()
    write(tmp_path / "before", "old", old)
    (tmp_path / "before" / "notes.txt").write_text("mine")
    (tmp_path / "want").mkdir()
    write(tmp_path / "want", "new", new)
    yield tmp_path, old, new
    sys.setprofile(None)


def fresh(tmp_path: Path) -> Path:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    return Path(shutil.copytree(tmp_path / "before", tmp_path / "out"))


def steps(tmp_path: Path, shards: int) -> int:
    counting = Fault()
    save_over(fresh(tmp_path), shards, counting)
    return counting.seen


def test_the_new_one_is_there_and_what_is_not_of_a_checkpoint_stays(case):
    tmp_path, _, new = case
    assert steps(tmp_path, new) > 10
    out = tmp_path / "out"
    others = {"notes.txt": b"mine", "only_old.json": b'{"name": "old"}'}
    assert content(out) == {**content(tmp_path / "want"), **others}
    assert loaded(out) == want("new", new)


@pytest.mark.parametrize("what", [full, interrupt])
def test_after_an_error_or_ctrl_c_at_any_step_the_folder_is_as_it_was(case, what):
    tmp_path, _, new = case
    before, failed = content(tmp_path / "before"), 0
    for at in range(1, steps(tmp_path, new) + 1):
        out = fresh(tmp_path)
        try:
            save_over(out, new, Fault(at, what))
        except (SaveError, KeyboardInterrupt) as error:
            failed += 1
            assert "not all of what was there" not in str(error)
            if loaded(out)[0] == "old":  # else all was done, but for the cleaning up
                assert content(out) == before, at
        finally:
            sys.setprofile(None)
        assert loaded(out) in (want("old", case[1]), want("new", new)), at
    assert failed > 10


def test_after_a_kill_at_any_step_one_of_the_two_is_there_and_the_next_save_cleans_up(case_of_kills):
    tmp_path, old, new = case_of_kills
    seen = set()
    for at in range(1, steps(tmp_path, new) + 1):
        out = fresh(tmp_path)
        child = os.fork()
        if child == 0:
            save_over(out, new, Fault(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            os._exit(0)
        os.waitpid(child, 0)
        found = loaded(out)
        assert found in (want("old", old), want("new", new)), at
        assert (out / "notes.txt").read_text() == "mine"
        seen.add(found)
        if at % 5 == 0:
            save_over(out, new, Fault())
            assert loaded(out) == want("new", new)
            kept = {"notes.txt", "only_old.json"}
            assert content(out).keys() - kept == content(tmp_path / "want").keys(), at
            assert not any(any(folder.iterdir()) for folder in out.glob(".*")), at
    assert len(seen) == 2


def test_without_hard_links(case, monkeypatch):
    """FAT, some network and FUSE file systems."""
    monkeypatch.setattr(moves.os, "link", lambda *_, **__: full())
    test_the_new_one_is_there_and_what_is_not_of_a_checkpoint_stays(case)


def test_without_symbolic_links(case, monkeypatch):
    monkeypatch.setattr(Path, "symlink_to", lambda *_, **__: full())
    test_the_new_one_is_there_and_what_is_not_of_a_checkpoint_stays(case)


@pytest.mark.parametrize("what", ["error", "kill"])
def test_small_files_alone_are_replaced_together(tmp_path, what):
    """As of a model with an adapter, whose own weights stay."""
    out, names = tmp_path / "out", ("adapter_config.json", "adapter_model.safetensors")

    def save(fault: Fault) -> None:
        with new_checkpoint(out, 10) as folder:
            for name in names:
                (folder / name).write_text("new")
            fault.__enter__()
        fault.__exit__()

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / names[1]).write_text("old")

    begin()
    counting, seen = Fault(), set()
    save(counting)
    for at in range(1, counting.seen + 1):
        begin()
        if what == "kill":
            child = os.fork()
            if child == 0:
                save(Fault(at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
                os._exit(0)
            os.waitpid(child, 0)
        else:
            try:
                save(Fault(at, interrupt))
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
        found = tuple((out / name).read_text() if (out / name).is_file() else None for name in names)
        assert found in ((None, "old"), ("new", "new")), at
        seen.add(found)
    assert len(seen) == 2


def test_links_of_a_cache_of_the_hub_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    write(tmp_path / "blobs", "old", 2)
    (tmp_path / "out").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "out" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    blobs = content(tmp_path / "blobs")
    save_over(tmp_path / "out", 2, Fault())
    assert loaded(tmp_path / "out") == want("new", 2) and content(tmp_path / "blobs") == blobs


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old", 2)
    real = Path.replace

    def replace(self: Path, target: Path) -> Any:
        if target == out / "config.json" and ".aside" in str(self) and len(calls) == 0:
            calls.append(target)
            return real(self, target)
        if target == out / "generation_config.json" and ".aside" in str(self):
            full()
        if calls and self.parent == out:
            full()
        return real(self, target)

    calls: list[Path] = []
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(SaveError, match=r"not all of what was there.*\.kept.*by hand"):
        save_over(out, 2, Fault())
    monkeypatch.undo()
    sys.setprofile(None)
    [kept] = [file for file in out.glob(".*.kept/.aside/*generation_config.json") if not file.is_symlink()]
    assert json.loads(kept.read_text()) == {"name": "old"}


# Folders of killed runs.


def killed_while_staging(parent: Path) -> Path:
    child = os.fork()
    if child == 0:
        with staging_folder(parent, "other") as folder:
            (folder / "part").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    [left] = parent.glob(".moe_offload-other-*.partial")
    return left


def test_what_a_killed_run_has_left_goes_with_the_next_one_and_nothing_else_does(tmp_path):
    left = killed_while_staging(tmp_path)
    foreign = tmp_path / ".other-12345678.partial"
    foreign.mkdir()
    with staging_folder(tmp_path, "living") as living:
        (living / "part").touch()
        with new_folder(tmp_path / "out", 10) as folder:
            (folder / "file").touch()
        assert living.is_dir() and not left.exists() and foreign.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "out"]


@pytest.mark.parametrize("what", [full, interrupt])
def test_a_new_folder_is_there_or_not(tmp_path, what):
    def make(fault: Fault) -> None:
        with fault, new_folder(tmp_path / "out", 10) as folder:
            (folder / "file").touch()

    counting = Fault()
    make(counting)
    assert counting.seen > 1
    for at in range(1, counting.seen + 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            make(Fault(at, what))
        except (PackError, KeyboardInterrupt):
            assert list(tmp_path.iterdir()) in ([], [tmp_path / "out"]), at
        finally:
            sys.setprofile(None)


def test_a_place_that_takes_no_folders_is_not_called_full():
    for place in (Path("/proc/foo"), Path("/sys/foo")):
        with pytest.raises(OffloadError) as caught, new_folder(place, 10**9):
            pass
        assert "too full" not in str(caught.value) and "free some space" not in str(caught.value), caught.value
        assert str(place) in str(caught.value) and "may be written" in str(caught.value)
