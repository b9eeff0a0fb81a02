"""A packed checkpoint: the same rows and tokens, one read a row; and everything that can be wrong with one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moe_offload
from moe_offload.apps.cli import app
from moe_offload.apps.families.tiny import build as build_family
from moe_offload.checkpoint.folder import ABSENT
from moe_offload.checkpoint.headers import read_headers
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.checkpoint.packed import ROWS, is_packed, read_stored
from moe_offload.checkpoint.packed_format import parse_sources, sources_metadata
from moe_offload.errors import CheckpointError, ConfigError, OffloadError, PackError
from moe_offload.experts import find_experts
from moe_offload.memory.stores.disk import DiskStore
from moe_offload.memory.stores.row_reads import PAGE, plan_row
from moe_offload.pack import pack_checkpoint
from tests.fakes.offloaded import SETTINGS
from tests.fakes.tiny_checkpoints import MODELS, assert_holds, build, save
from tests.paths import MODEL

FIRST = f"{ROWS}-00001-of-00001.safetensors"
IDS = torch.arange(3, 15).view(1, -1)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack_checkpoint(MODEL, tmp_path / "packed")


def rows_file(folder: Path) -> Path:
    [file] = folder.glob(f"{ROWS}-*")
    return file


def edit_metadata(file: Path, change: Any) -> None:
    """Change the JSON of a file's metadata, and keep its bytes."""
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:begin])
    facts = json.loads(table["__metadata__"][ROWS])
    change(facts, table["__metadata__"])
    if ROWS in table["__metadata__"]:
        table["__metadata__"][ROWS] = json.dumps(facts)
    text = json.dumps(table).encode()
    text = text.ljust(-(-(8 + len(text)) // PAGE) * PAGE - 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])


# What is written.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_the_model_s_and_one_aligned_read_each(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(kind, dtype)
    out = pack_checkpoint(save(model, tmp_path / "original", "20KB"), tmp_path / "out", max_shard_size="15KB")
    assert is_packed(out) and len(list(out.glob(f"{ROWS}-*"))) > 1 and len(list(out.glob("model-*"))) > 1
    found = outline_folder(out)
    moe_layers, index = found.moe_layers, found.index
    for moe, rows in zip(moe_layers, index.rows, strict=True):
        for e, source in enumerate(rows):
            plan = plan_row(source, moe.layout.row_bytes, index.stamps)
            [part] = plan.parts
            [span] = part.spans
            assert (plan.convert, plan.scratch_bytes) == ((), 0)
            assert part.offset % PAGE == 0 and (span.in_row, span.start, span.stop) == (True, 0, moe.layout.row_bytes)
            first = index.rows[moe.index][0][0]
            assert part.offset == first.sources[0].offset - first.field.offset + e * moe.layout.row_bytes
    store = DiskStore([moe.layout for moe in moe_layers], index)
    assert_holds(store, index.pack(find_experts(model)))
    store.close()


def test_rows_of_several_megabytes_are_read_in_whole_pages(tmp_path: Path) -> None:
    model = build("per_expert", hidden_size=512, moe_intermediate_size=512, num_hidden_layers=1)  # 3 MB a row
    out = pack_checkpoint(save(model, tmp_path / "original"), tmp_path / "out", verify="all")
    found = outline_folder(out)
    [moe], index = found.moe_layers, found.index
    for source in index.rows[0]:
        plan = plan_row(source, moe.layout.row_bytes, index.stamps)
        assert len(plan.parts) == -(-moe.layout.row_bytes // (2 << 20)) and not plan.convert
        for part in plan.parts:
            [span] = part.spans
            assert part.offset % PAGE == span.start % PAGE == span.stop % PAGE == 0


def test_files_are_valid_safetensors_and_nothing_else_changes(packed: Path) -> None:
    moe_layers = outline_folder(MODEL).moe_layers
    with safe_open(rows_file(packed), framework="pt") as file:
        assert list(file.keys()) == [moe.name for moe in moe_layers]
        for moe in moe_layers:
            tensor = file.get_tensor(moe.name)
            assert tensor.dtype == torch.uint8
            assert tuple(tensor.shape) == (moe.num_experts, moe.layout.row_bytes)
    assert all(range_.offset % PAGE == 0 for range_ in read_headers([rows_file(packed)]).values())
    [dense] = packed.glob("model-*.safetensors")
    with safe_open(MODEL / "model.safetensors", framework="pt") as want, safe_open(dense, framework="pt") as found:
        assert set(found.keys()) == {key for key in want.keys() if ".experts." not in key}
        assert all(torch.equal(found.get_tensor(key), want.get_tensor(key)) for key in found.keys())
    for file in MODEL.iterdir():
        if file.suffix != ".safetensors":
            assert (packed / file.name).read_bytes() == file.read_bytes()
    assert "moe_offload.from_pretrained" in (packed / "PACKED.md").read_text()
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]


def test_plain_transformers_fails_rather_than_invents_experts(packed: Path) -> None:
    with pytest.raises(OSError, match="experts-are-packed-see-PACKED"):
        AutoModelForCausalLM.from_pretrained(packed)


# The model that is loaded from it.


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_same_tokens_within_a_tight_budget(family: str, tmp_path: Path) -> None:
    model = build_family(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "original")
    model.set_experts_implementation("grouped_mm")
    want = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    out = pack_checkpoint(tmp_path / "original", tmp_path / "out", verify="all")
    floor = moe_offload.make_plan(out, "1GB", config=SETTINGS).floor_bytes
    assert floor == moe_offload.make_plan(tmp_path / "original", "1GB", config=SETTINGS).floor_bytes
    budget = floor + 1000  # deepseek_v3 loads some of its dense weights in float32, which the plan does not know
    with moe_offload.from_pretrained(out, budget, config=SETTINGS).moe_offload as handle:
        assert torch.equal(handle.model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0), want)
        assert handle.stats().misses > 0


def test_bundled_model_and_its_state_dict(packed: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(MODEL)
    want = plain.generate(IDS, max_new_tokens=12, do_sample=False)
    with moe_offload.from_pretrained(packed, "6MB", config={"poison": True}).moe_offload as handle:
        assert torch.equal(handle.model.generate(IDS, max_new_tokens=12, do_sample=False), want)
        state = handle.model.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())


def test_experts_in_ram(packed: Path) -> None:
    want = AutoModelForCausalLM.from_pretrained(MODEL).generate(IDS, max_new_tokens=8, do_sample=False)
    with moe_offload.from_pretrained(packed, "6MB", device_map="cpu").moe_offload as handle:
        assert torch.equal(handle.model.generate(IDS, max_new_tokens=8, do_sample=False), want)


def test_tied_word_embeddings(tmp_path: Path) -> None:
    model = build_family("qwen3_moe", num_hidden_layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "original")
    out = pack_checkpoint(tmp_path / "original", tmp_path / "out")
    with moe_offload.from_pretrained(out, "1GB").moe_offload as handle:
        assert handle.model.lm_head.weight is handle.model.model.embed_tokens.weight
        assert torch.equal(handle.model(IDS).logits, model(IDS).logits)


# What is not packed, or not read.


def test_already_packed(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="packed checkpoint already"):
        pack_checkpoint(packed, tmp_path / "again")


def test_quantised_is_refused_as_from_pretrained_refuses_it(tmp_path: Path) -> None:
    original = Path(shutil.copytree(MODEL, tmp_path / "original"))
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (original / "config.json").write_text(json.dumps(config))
    with pytest.raises(moe_offload.UnsupportedModelError, match="quantised"):
        pack_checkpoint(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtype_other_than_packed(packed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)moe_offload_rows.*BF16.*F32.*moe-offload pack.*dtype"):
        moe_offload.from_pretrained(packed, "20MB", dtype="float32")


def _set(*path: Any) -> Any:
    *keys, last, value = path

    def change(facts: dict[str, Any], _: Any) -> None:
        for key in keys:
            facts = facts[key]
        facts[last] = value

    return change


LAYER = ("layers", "model.layers.1.mlp.experts")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("version", 1), "format version 1"),
        (_set("model_type", "mixtral"), "mixtral"),
        (_set(*LAYER, "recipe", "0" * 64), r"layers\.1.*made.*in another way"),
        (_set(*LAYER, "fields", 1, "offset", 64), r"layers\.1.*fields"),
        (_set(*LAYER, "row_bytes", 8192), r"layers\.1.*row_bytes 8192"),
        (_set(*LAYER, "experts", 32), r"layers\.1.*experts 32"),
        (_set(*LAYER, "surprise", 1), "surprise"),
        (_set(*LAYER, []), "packed with"),
        (_set("layers", []), "none of the 1 files"),
        (_set("layers", 7), "not a usable file"),
        (lambda facts, metadata: metadata.pop(ROWS), "not a usable file"),
        (lambda facts, metadata: metadata.pop("moe_offload_sources"), "not a usable file"),
        (lambda facts, metadata: metadata.update(moe_offload_sources='[["BF16", [-1], ["x"]]]'), "not a usable file"),
        (lambda facts, metadata: metadata.update(moe_offload_sources="[]"), "not this model's"),
    ],
)
def test_another_layout_is_refused(change: Any, says: str, packed: Path) -> None:
    edit_metadata(rows_file(packed), change)
    with pytest.raises(CheckpointError, match=f"(?s){FIRST}.*{says}.*(pack|Pack)"):
        moe_offload.from_pretrained(packed, "6MB")


def test_transformers_that_converts_otherwise_is_noticed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names, shapes and dtypes, but gate and up the other way round."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = conversion_mapping.get_model_conversion_mapping

    def swapped(model: Any, **_: Any) -> Any:
        return [
            WeightConverter(entry.source_patterns[::-1], entry.target_patterns, entry.operations)
            if isinstance(entry, WeightConverter) and len(entry.source_patterns) == 2
            else entry
            for entry in mapping(model)
        ]

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", swapped)
    with pytest.raises(CheckpointError, match="in another way"):
        moe_offload.from_pretrained(packed, "6MB")


@pytest.mark.parametrize("size", [0, 7, 5000, -4096, -1])
def test_truncated_rows(size: int, packed: Path) -> None:
    file = rows_file(packed)
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(CheckpointError, match=FIRST):
        moe_offload.from_pretrained(packed, "6MB")


def test_truncated_while_running(packed: Path) -> None:
    model = moe_offload.from_pretrained(packed, "6MB")
    os.truncate(rows_file(packed), 100_000)
    with pytest.raises((moe_offload.ExpertReadError, moe_offload.CheckpointChangedError), match=FIRST):
        model.generate(IDS, max_new_tokens=8, do_sample=False)
    model.moe_offload.close()


def test_missing_files_are_named(tmp_path: Path) -> None:
    out = pack_checkpoint(MODEL, tmp_path / "out", max_shard_size="3MB")
    files = sorted(out.glob(f"{ROWS}-*"))
    assert len(files) == 4
    files[2].unlink()
    with pytest.raises(CheckpointError, match="Copy the missing files"):
        moe_offload.from_pretrained(out, "6MB")
    for file in (files[0], files[1], files[3]):
        file.unlink()
    with pytest.raises(CheckpointError, match="found none of them"):
        moe_offload.from_pretrained(out, "6MB")


def test_sources_come_back() -> None:
    headers = read_headers([MODEL / "model.safetensors"])
    found = parse_sources(sources_metadata(headers, headers))
    assert {key: (r.shape, r.dtype) for key, r in found.items()} == {k: (r.shape, r.dtype) for k, r in headers.items()}
    assert ABSENT not in {range_.file.name for range_ in found.values()}


def test_headers_of_an_ordinary_folder_are_its_own() -> None:
    assert read_stored(MODEL).headers == read_headers([MODEL / "model.safetensors"])


# Writing fails.


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_existing_out_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert pack_checkpoint(MODEL, tmp_path / "out") == tmp_path / "out"  # an empty one is taken
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(PackError, match="not empty"):
        pack_checkpoint(MODEL, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(PackError, match="file or a link"):
        pack_checkpoint(MODEL, tmp_path / "out" / "config.json")
    with pytest.raises(PackError, match="does not exist"):
        pack_checkpoint(MODEL, tmp_path / "nowhere" / "out")


@pytest.mark.parametrize(("option", "value"), [("verify", "some"), ("max_shard_size", "large"), ("max_shard_size", 0)])
def test_options_that_mean_nothing(option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(value)):
        pack_checkpoint(MODEL, tmp_path / "out", **{option: value})
    assert_nothing_left(tmp_path)


def test_full_disk_is_known_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PackError, match=r"It needs 11\d{6} bytes .*, 1000000 bytes .* free") as caught:
        pack_checkpoint(MODEL, tmp_path / "out")
    assert "Nothing was left" in str(caught.value)
    assert_nothing_left(tmp_path)


def test_disk_that_fills_while_writing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))
    try:
        with pytest.raises(PackError, match=rf"errno {errno.EFBIG}.*It needs"):
            pack_checkpoint(MODEL, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left"), OffloadError("unreadable")]
)
@pytest.mark.parametrize("row", [0, 100, 255])
def test_failure_in_the_middle_leaves_nothing(
    error: Any, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = DiskStore.read, iter(range(1000))

    def failing(*arguments: Any) -> int:
        if next(calls) == row:
            raise error
        return read(*arguments)

    monkeypatch.setattr(DiskStore, "read", failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OffloadError):
        pack_checkpoint(MODEL, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_rows_that_read_back_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_offload.pack as pack

    write = pack.write_shard

    def losing(file: Path, *arguments: Any) -> None:
        write(file, *arguments)
        if file.name.startswith(ROWS):
            with file.open("r+b") as stream:
                stream.seek(-36864, os.SEEK_END)  # the last row
                stream.write(bytes(36864))

    monkeypatch.setattr(pack, "write_shard", losing)
    with pytest.raises(PackError, match="expert 63: gate_up_proj reads back"):
        pack_checkpoint(MODEL, tmp_path / "out")
    assert_nothing_left(tmp_path)
    assert pack_checkpoint(MODEL, tmp_path / "out", verify="none").is_dir()


def test_original_modified_while_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_offload.pack as pack

    original = Path(shutil.copytree(MODEL, tmp_path / "original"))
    dense_parts = pack.dense_parts

    def touched(*arguments: Any) -> Any:
        for part in dense_parts(*arguments):
            os.utime(original / "model.safetensors")
            yield part

    monkeypatch.setattr(pack, "dense_parts", touched)
    with pytest.raises(moe_offload.CheckpointChangedError, match="while it was packed"):
        pack_checkpoint(original, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


# The command line.


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_command(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    packed = run("pack", str(MODEL), out, "--verify", "all")
    assert (packed.exit_code, packed.stdout) == (0, out + "\n"), packed.output
    ours, original = (run("plan", model, "--budget", "6MB").stdout.splitlines() for model in (out, str(MODEL)))
    assert ours[1:] == original[1:], "all but the name"
    options = ["--budget", "6MB", "--prompt", "Il comando", "--max-new-tokens", "8"]
    result = run("run", out, *options)
    assert (result.exit_code, result.stdout) == (0, run("run", str(MODEL), *options).stdout), result.output
    assert "usage" in run("pack", "--help").stdout.lower()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["./nowhere", "out"], 4, "nowhere"),
        ([str(MODEL), "taken"], 6, "not empty"),
        ([str(MODEL), "no/such/out"], 6, "does not exist"),
        ([str(MODEL), "out", "--max-shard-size", "big"], 2, "big"),
    ],
)
def test_command_that_cannot_work(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    result = run("pack", *arguments)
    assert result.exit_code == code and says in result.stderr and "Traceback" not in result.output, result.output
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("moe-offload:")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_ctrl_c(tmp_path: Path) -> None:
    """A real signal to a real process, in the middle of writing."""
    program = (
        "import sys, time\nfrom moe_offload.apps.cli import main\n"
        "from moe_offload.memory.stores.disk import DiskStore\n"
        "read = DiskStore.read\n"
        "def slow(*a):\n    time.sleep(0.05)\n    return read(*a)\n"
        "DiskStore.read = slow\nmain()\n"
    )
    command = [sys.executable, "-c", program, "pack", str(MODEL), str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob(f".moe_offload-out-*/{ROWS}-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=240)
    assert child.returncode == 130 and "interrupted" in errors and "Traceback" not in errors, errors
    assert_nothing_left(tmp_path)
