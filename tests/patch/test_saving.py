"""save_pretrained of an offloaded model: what the unmodified model would write, byte for byte, a row at a time, and
nothing that only looks like it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload import ClosedError, ConfigError, OffloadError, SaveError, pack_checkpoint
from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint.conversion import Join, Regroup, Swap, convert_tensors, restore_tensors
from moe_offload.checkpoint.folder import INDEX
from moe_offload.files.moves import Moves
from moe_offload.memory.stores.disk import DiskStore
from moe_offload.runtime.model import Runtime
from tests.fakes.offloaded import QWEN, SETTINGS, offload, offloaded, say
from tests.whole.test_memory import ROOT, config_of, write_checkpoint


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's files; the index, where there is one, lists exactly these."""
    found: dict[str, torch.Tensor] = {}
    homes = {}
    for file in folder.glob("*.safetensors"):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
        homes |= dict.fromkeys(loaded, file.name)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == homes
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def assert_same(folder: Path, other: Path) -> None:
    """Both folders have the same tensors, bit for bit, and the same configuration."""
    want, found = tensors(folder), tensors(other)
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert (found[key].shape, found[key].dtype) == (tensor.shape, tensor.dtype), key
        assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def open_checkpoint(folder: Path, **options):
    budget = moe_offload.make_plan(folder, "1GB", config=SETTINGS).floor_bytes + 100_000
    return moe_offload.from_pretrained(folder, budget, config=SETTINGS, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "original"
    build(QWEN, num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def never_stacked(monkeypatch):
    """Whoever asks for all experts of a layer at once fails."""
    monkeypatch.setattr(Runtime, "read_stacked", lambda *_: pytest.fail("a whole layer was read"))


CASES = {
    "one tensor an expert, from a checkpoint": (QWEN, {}, "checkpoint"),
    "renamed, from a spill file": ("mixtral", {}, "disk"),
    "stacked, with biases, from a spill file": ("gpt_oss", {}, "disk"),
    "stacked, with biases, from a checkpoint": ("gpt_oss", {}, "checkpoint"),
    "dense layers and shared experts, from RAM": ("deepseek_v3", {}, "cpu"),
    "tied embeddings, from RAM": (QWEN, {"tie_word_embeddings": True}, "cpu"),
    "bfloat16, from a checkpoint": ("mixtral", {"dtype": torch.bfloat16}, "checkpoint"),
}


@pytest.mark.parametrize(("family", "options", "rows"), CASES.values(), ids=CASES)
def test_it_is_what_the_resident_model_writes_and_loads_again(family, options, rows, tmp_path, never_stacked):
    plain = build(family, num_hidden_layers=2, **options)
    plain.save_pretrained(tmp_path / "plain")
    want = say(plain, n=8)
    model = open_checkpoint(tmp_path / "plain") if rows == "checkpoint" else offload(plain, device_map=rows)
    assert model.moe_offload.tiers == ["host" if rows == "cpu" else "disk"] * len(model.moe_offload.moe_layers)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]
        assert sum(sizes) <= 60_000 or len(sizes) == 1
    assert_same(tmp_path / "plain", tmp_path / "saved")
    model.moe_offload.close()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again.set_experts_implementation("grouped_mm")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
    assert torch.equal(say(again, n=8), want)
    model = open_checkpoint(tmp_path / "saved")
    assert torch.equal(say(model, n=8), want)
    model.moe_offload.close()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}], ids=str)
def test_what_fits_in_one_file_is_one_file_as_in_transformers(options, tmp_path, never_stacked):
    """To the byte, and over a checkpoint in shards, whose index would win over nothing but is not to stay."""
    plain = build(QWEN, num_hidden_layers=1, **options)
    plain.save_pretrained(tmp_path / "plain")
    total = sum(tensor.nbytes for tensor in load_file(tmp_path / "plain" / "model.safetensors").values())
    with open_checkpoint(tmp_path / "plain").moe_offload as handle:
        for limit in ("50GB", total - 1, total):
            handle.model.save_pretrained(tmp_path / "ours", max_shard_size=limit)
            plain.save_pretrained(tmp_path / f"theirs {limit}", max_shard_size=limit)
            assert_same(tmp_path / f"theirs {limit}", tmp_path / "ours")
            names = {file.name for file in (tmp_path / "ours").iterdir()}
            if limit == total - 1:
                assert INDEX in names
            else:
                assert names == {file.name for file in (tmp_path / f"theirs {limit}").iterdir()}


def test_a_packed_checkpoint_is_saved_as_what_it_was_packed_from(original, tmp_path, never_stacked):
    pack_checkpoint(original, tmp_path / "packed")
    with open_checkpoint(tmp_path / "packed").moe_offload as handle:
        handle.model.save_pretrained(tmp_path / "saved")
    assert_same(original, tmp_path / "saved")


def test_the_models_own_layout_and_a_part_of_the_model(original, tmp_path, never_stacked):
    plain = AutoModelForCausalLM.from_pretrained(original)
    plain.save_pretrained(tmp_path / "plain", save_original_format=False)
    plain.model.save_pretrained(tmp_path / "plain part")
    with open_checkpoint(original).moe_offload as handle:
        handle.model.save_pretrained(tmp_path / "saved", save_original_format=False)
        handle.model.model.save_pretrained(tmp_path / "saved part")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(tmp_path / "saved")
    assert tensors(tmp_path / "saved part").keys() == tensors(tmp_path / "plain part").keys()
    for name in ("", " part"):
        want, found = tensors(tmp_path / f"plain{name}"), tensors(tmp_path / f"saved{name}")
        assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)


def test_dense_weights_are_those_of_the_model_now(original, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(original)
    with open_checkpoint(original).moe_offload as handle, torch.no_grad():
        for model in (plain, handle.model):
            model.model.layers[1].self_attn.q_proj.weight += 1
        handle.model.save_pretrained(tmp_path / "saved")
    plain.save_pretrained(tmp_path / "plain")
    assert_same(tmp_path / "plain", tmp_path / "saved")


def test_what_the_folder_had_before(original, tmp_path):
    """Shards and indexes of an older checkpoint go; everything else stays."""
    out = tmp_path / "out"
    older = build("mixtral", num_hidden_layers=1)
    older.save_pretrained(out, max_shard_size="20KB")
    older.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", out)  # what wins over an index where both are
    (out / "notes.txt").write_text("mine")
    with open_checkpoint(original).moe_offload as handle:
        handle.model.save_pretrained(out, max_shard_size="300KB")
    assert_same(original, out)
    names = {file.name for file in out.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert names - shards == {"notes.txt", "config.json", "generation_config.json", INDEX}


CHILD = """
import sys
from pathlib import Path
import moe_offload
from tests.fakes.memory_child import status
model = moe_offload.from_pretrained(sys.argv[1], "250MB", config={"reserve": "100MB"})
model.save_pretrained(sys.argv[2] + "/first", max_shard_size="20MB")  # what is imported and set up the first time
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model.save_pretrained(sys.argv[2] + "/second")
print(status("VmHWM") - before, sum(moe.nbytes for moe in model.moe_offload.moe_layers))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_while_saving_does_not_grow_with_the_experts(tmp_path):
    config = config_of(hidden=512, inner=512, layers=4, experts=64, vocab=4096)
    write_checkpoint(config, tmp_path / "original", experts_per_shard=64)
    command = [sys.executable, "-c", CHILD, tmp_path / "original", tmp_path]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    grown_bytes, expert_bytes = map(int, child.stdout.split())
    assert expert_bytes == 4 * 64 * 3 * 512 * 512 * 2  # a layer: 100 MB
    assert grown_bytes < 20e6, f"{grown_bytes / 1e6:.0f} MB"


# Failures: the folder is as it was, or not there.


@pytest.fixture
def older(tmp_path) -> Path:
    out = tmp_path / "out"
    build("mixtral", num_hidden_layers=1).save_pretrained(out)
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_refused(model, out: Path, error: type[BaseException], match: str | None = None, **options) -> None:
    """Saving to `out`, which is there, and to a new folder beside it fails, and leaves no trace."""
    before, others = snapshot(out), sorted(out.parent.iterdir())
    for folder in (out, out.parent / "new"):
        with pytest.raises(error, match=match):
            model.save_pretrained(folder, **options)
    assert snapshot(out) == before and sorted(out.parent.iterdir()) == others


def test_the_folder_that_rows_are_read_from_is_refused(original, tmp_path):
    before = snapshot(original)
    link = tmp_path / "link"
    link.symlink_to(original)
    with open_checkpoint(original).moe_offload as handle:
        state = handle.model.state_dict()
        for folder in (original, link):
            for options in ({}, {"state_dict": state}):
                with pytest.raises(SaveError, match="read from there"):
                    handle.model.save_pretrained(folder, **options)
        assert snapshot(original) == before
        handle.model.save_pretrained(original.parent / "beside")


def test_a_spill_file_in_the_same_folder_is_no_obstacle(tmp_path):
    model = offloaded(offload_folder=tmp_path)
    model.save_pretrained(tmp_path)
    assert tensors(tmp_path)
    model.moe_offload.close()


def test_places_that_cannot_be_written(original, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with open_checkpoint(original).moe_offload as handle:
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(SaveError, match="file"):
                handle.model.save_pretrained(place)
        monkeypatch.chdir(tmp_path)  # which nobody has named
        with pytest.raises(SaveError, match="is empty"):
            handle.model.save_pretrained("")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_known_before_writing(original, older, monkeypatch):
    usage = shutil.disk_usage(older)._replace(free=1000)
    with open_checkpoint(original).moe_offload as handle:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        assert_refused(handle.model, older, SaveError, r"It needs \d{6} bytes .*, 1000 bytes .* free")


@pytest.mark.parametrize("limit_bytes", [20_000, 200_000], ids=["in dense weights", "in experts"])
def test_disk_that_fills_while_writing(limit_bytes, original, older):
    with open_checkpoint(original).moe_offload as handle:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
        try:
            assert_refused(handle.model, older, SaveError, "(?i)file too large.*It needs")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)


def test_ctrl_c_in_the_middle(original, older, monkeypatch):
    real, asked = DiskStore.begin, []

    def begin(self, *request):
        asked.append(request)
        if len(asked) % 6 == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *request)

    with open_checkpoint(original).moe_offload as handle:
        monkeypatch.setattr(DiskStore, "begin", begin)
        assert_refused(handle.model, older, KeyboardInterrupt)
        monkeypatch.undo()
        handle.model.save_pretrained(older)
    assert_same(original, older)


def test_a_checkpoint_that_was_changed_meanwhile(original, older, tmp_path):
    copy = shutil.copytree(original, tmp_path / "copy")
    with open_checkpoint(copy).moe_offload as handle:
        os.truncate(copy / "model.safetensors", 100_000)
        assert_refused(handle.model, older, OffloadError, "model.safetensors")


def test_closed(original, older):
    model = open_checkpoint(original)
    model.moe_offload.close()
    assert_refused(model, older, ClosedError)


def test_a_kill_while_files_take_their_places_leaves_the_old_or_the_new_model(original, older, monkeypatch):
    """Another family, which generates otherwise; tests/checkpoint/test_new_folder.py does so at every step, with
    made-up files. transformers and moe_offload agree on what is there."""
    saved = json.loads((older / "generation_config.json").read_text())
    (older / "generation_config.json").write_text(json.dumps({**saved, "top_k": 7}))
    before, real, seen = shutil.copytree(older, older.parent / "before"), Path.replace, set()
    want = {"mixtral": load_file(older / "model.safetensors"), QWEN: tensors(original)}
    done: list[Path] = []

    def replace(self, target):
        done.append(target)
        if len(done) == moved:
            raise KeyboardInterrupt
        return real(self, target)

    with open_checkpoint(original).moe_offload as handle:
        for moved in (3, 5, 6, 9, 11):
            shutil.rmtree(older)
            shutil.copytree(before, older)
            done.clear()
            with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
                killed.setattr(Path, "replace", replace)
                killed.setattr(Moves, "take_back", lambda _: None)  # as a kill has it
                killed.setattr(shutil, "rmtree", lambda *_, **__: None)
                handle.model.save_pretrained(older)
            found = AutoModelForCausalLM.from_pretrained(older)
            kind = found.config.model_type
            seen.add(kind)
            assert (found.generation_config.top_k == 7) is (kind == "mixtral"), moved
            state = found.state_dict()
            with open_checkpoint(older).moe_offload as again:
                assert again.model.config.model_type == kind
                assert again.model.generation_config.to_dict() == found.generation_config.to_dict()
                ours = again.model.state_dict()
                assert all(torch.equal(ours[key], tensor) for key, tensor in state.items()), moved
            found.save_pretrained(older.parent / f"again {moved}")
            written = tensors(older.parent / f"again {moved}")
            assert written.keys() == want[kind].keys()
            assert all(torch.equal(written[key], tensor) for key, tensor in want[kind].items())
    assert len(seen) == 2


# Around it.


def test_saving_while_another_thread_generates(original, tmp_path):
    want = say(AutoModelForCausalLM.from_pretrained(original, experts_implementation="grouped_mm"))
    with open_checkpoint(original).moe_offload as handle:
        said = [say(handle.model)]
        thread = threading.Thread(target=lambda: said.extend(say(handle.model) for _ in range(5)))
        thread.start()
        for number in range(3):
            handle.model.save_pretrained(tmp_path / str(number))
        thread.join()
    assert len(said) == 6 and all(torch.equal(tokens, want) for tokens in said)
    for number in range(3):
        assert_same(original, tmp_path / str(number))


def test_close_waits_until_the_model_is_saved(original, tmp_path, monkeypatch):
    real, closing = DiskStore.begin, []

    def begin(self, *request):
        if not closing:
            closing.append(threading.Thread(target=handle.close))
            closing[0].start()
            closing[0].join(0.3)
        return real(self, *request)

    handle = open_checkpoint(original).moe_offload
    monkeypatch.setattr(DiskStore, "begin", begin)
    handle.model.save_pretrained(tmp_path / "saved")
    closing[0].join()
    assert handle.closed
    assert_same(original, tmp_path / "saved")


@pytest.mark.parametrize("option", [{"push_to_hub": True}, {"variant": "fp16"}, {"distributed_checkpoint": True}])
def test_arguments_that_are_refused(option, original, older):
    with open_checkpoint(original).moe_offload as handle:
        assert_refused(handle.model, older, ConfigError, next(iter(option)), **option)
        assert_refused(handle.model, older, ConfigError, "large", max_shard_size="large")
        handle.model.save_pretrained(older.parent / "new", is_main_process=False)
    assert not (older.parent / "new").exists()


def test_a_state_dict_of_ones_own(original, older, tmp_path):
    with open_checkpoint(original).moe_offload as handle:
        state = handle.model.state_dict()
        state["model.norm.weight"] += 1
        handle.model.save_pretrained(tmp_path / "saved", state_dict=state)
        want = tensors(original)
        want["model.norm.weight"] += 1
        assert_refused(handle.model, older, SaveError, "phantom", state_dict=dict(handle.model.named_parameters()))
    found = tensors(tmp_path / "saved")
    assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)


def test_push_to_hub_uploads_what_is_streamed(original, tmp_path, monkeypatch, never_stacked):
    import transformers.utils.hub as hub

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            Path(path).write_text("a card")

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    with open_checkpoint(original).moe_offload as handle:
        uploaded = tmp_path / "uploaded"
        monkeypatch.setattr(
            type(handle.model),
            "_upload_modified_files",
            lambda _, folder, *__, **___: shutil.copytree(folder, uploaded),
        )
        handle.model.push_to_hub("someone/model")
    assert_same(original, uploaded)


@pytest.mark.parametrize(
    ("steps", "shapes"),
    [
        ((), [(6, 4)]),
        ((Join(0),), [(2, 4), (6, 4)]),
        ((Join(1), Swap(0, 1)), [(4, 3), (4, 5)]),
        ((Swap(0, 1), Regroup(1, inverse=False)), [(6, 4)]),
        ((Regroup(0, inverse=True),), [(6, 4)]),
    ],
)
def test_steps_are_undone(steps, shapes):
    sources = [torch.randn(shape) for shape in shapes]
    found = restore_tensors(steps, convert_tensors(steps, list(sources)), shapes)
    assert len(found) == len(sources)
    assert all(torch.equal(part, source) for part, source in zip(found, sources, strict=True))
