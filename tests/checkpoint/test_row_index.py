"""Finding experts in checkpoint files: every layout, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from moe_offload.checkpoint.conversion import convert_tensors, one_expert_conversions
from moe_offload.checkpoint.headers import read_headers
from moe_offload.checkpoint.pretrained.weight_files import weight_files
from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.experts import find_experts
from moe_offload.memory.stores import DiskStore
from tests.fakes.tiny_checkpoints import MODELS, assert_holds, build, index_of, save, skeleton

EXPERTS = "model.layers.1.mlp.experts"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the one shard of `folder` after `change` has altered its tensors."""
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def write_shard(file: Path, header: Any, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


# Layouts.


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", MODELS)
def test_index_reproduces_every_expert(kind: str, shard: str, tmp_path: Path) -> None:
    model = build(kind)
    moe_layers, index = index_of(skeleton(kind), save(model, tmp_path, shard))
    assert (len(index.stamps) > 1) == (shard == "20KB")
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model)))


@pytest.mark.parametrize("kind", MODELS)
def test_keys_are_all_expert_tensors_and_no_other(kind: str, tmp_path: Path) -> None:
    _, index = index_of(skeleton(kind), save(build(kind), tmp_path))
    assert index.keys == {key for key in read_headers(weight_files(tmp_path).files) if ".experts." in key}


def test_dtype_of_the_checkpoint_is_cast_to_the_model_s(tmp_path: Path) -> None:
    model = build("renamed")
    moe_layers, index = index_of(skeleton("renamed", torch.bfloat16), save(model, tmp_path))
    assert not index.rows[0][0][0].direct
    assert_holds(
        DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model.to(torch.bfloat16)))
    )


def test_transposed_checkpoint_reads_as_transformers_loads_it(tmp_path: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({k: t.transpose(1, 2) for k, t in tensors.items() if ".experts." in k})

    model = build("transposed")
    edit(save(model, tmp_path), transpose)
    moe_layers, index = index_of(skeleton("transposed"), tmp_path)
    assert all(piece.conversions for piece in index.rows[0][0])
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(loaded)))


def test_already_stacked_checkpoint_of_a_per_expert_family(tmp_path: Path) -> None:
    model = build("per_expert")
    save_file(dict(model.state_dict()), save(model, tmp_path) / "model.safetensors")
    moe_layers, index = index_of(skeleton("per_expert"), tmp_path)
    assert f"{EXPERTS}.down_proj" in index.keys
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model)))


def test_one_checkpoint_list_split_over_two_banks(tmp_path: Path) -> None:
    """Ernie VL: experts 0..n/2-1 are the text's, the others the images', and narrower."""
    from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeConfig
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeForConditionalGeneration

    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": [16, 8],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    model = Ernie4_5_VLMoeForConditionalGeneration._from_config(config)
    with torch.device("meta"):
        meta = Ernie4_5_VLMoeForConditionalGeneration._from_config(config)
    moe_layers, index = index_of(meta, save(model, tmp_path))
    assert any(key.endswith("experts.7.up_proj.weight") for key in index.keys)
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model)))


@pytest.mark.parametrize("ops", [[Concatenate(dim=1)], [Interleave(dim=1)]])
def test_other_conversions_of_stacked_tensors(ops: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 stores gate and up as two stacks, Inkling as one with alternating rows."""
    model = build("per_expert")
    state = dict(model.state_dict())
    sources = ["experts.gate", "experts.up"] if isinstance(ops[0], Concatenate) else ["experts.gate_and_up"]
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        fused, stem = state.pop(name), name.removesuffix("experts.gate_up_proj")
        gate, up = fused.chunk(2, dim=1)
        parts = [gate, up] if len(sources) == 2 else [torch.stack([gate, up], dim=2).reshape(fused.shape)]
        state |= {stem + source: part.contiguous() for source, part in zip(sources, parts, strict=True)}
    save_file(state, save(model, tmp_path) / "model.safetensors")
    mapping = [WeightConverter(sources, "experts.gate_up_proj", operations=ops)]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _, **__: mapping)
    moe_layers, index = index_of(skeleton("per_expert"), tmp_path)
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model)))


CHAINS: list[tuple[list[Any], list[tuple[int, ...]], tuple[int, ...]]] = [
    ([MergeModulelist(0), Concatenate(1)], [(3, 4), (5, 4)], (8, 4)),
    ([MergeModulelist(0), Concatenate(-1)], [(3, 4), (3, 2)], (3, 6)),
    ([MergeModulelist(0), Concatenate(1), Transpose(1, 2)], [(3, 4), (3, 4)], (4, 6)),
    ([MergeModulelist(0), Transpose(-1, -2)], [(3, 4)], (4, 3)),
    ([MergeModulelist(0), Interleave(1)], [(6, 4)], (6, 4)),
    ([MergeModulelist(0), Interleave(1, inverse=True)], [(6, 4)], (6, 4)),
    ([MergeModulelist(0), Interleave(2), Transpose(1, 2)], [(3, 4)], (4, 3)),
]


@pytest.mark.parametrize(("ops", "shapes", "wanted"), CHAINS)
def test_one_expert_form_equals_transformers_on_the_stack(ops: Any, shapes: Any, wanted: Any) -> None:
    experts, patterns = 3, [f"s{i}" for i in range(len(shapes))]
    tensors = [[torch.randn(shape) for shape in shapes] for _ in range(experts)]
    stacked: Any = {pattern: [tensors[e][i] for e in range(experts)] for i, pattern in enumerate(patterns)}
    for op in ops:
        stacked = op.convert(stacked, source_patterns=patterns, target_patterns=["t"])
    [want] = stacked.values()
    steps = one_expert_conversions(ops, shapes, wanted, "p")
    for e in range(experts):
        assert torch.equal(convert_tensors(steps, tensors[e]), want[e])


@pytest.mark.parametrize("op", [Chunk(1), Concatenate(0), MergeModulelist(1), Transpose(0, 1)])
def test_operation_without_a_one_expert_form_is_refused(op: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"experts.up_proj: .*{type(op).__name__}"):
        one_expert_conversions(
            [op], [(4, 4), (4, 4)] if isinstance(op, Concatenate) else [(4, 4)], (4, 4), "experts.up_proj"
        )


# Checkpoints that do not fit the model.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}.2.down_proj.weight"), rf"{EXPERTS}: expert 2 has no down_proj in the checkpoint"),
        (lambda t: t.pop(f"{EXPERTS}.3.up_proj.weight"), rf"{EXPERTS}: expert 3 has no up_proj"),
        (lambda t: [t.pop(f"{EXPERTS}.{e}.gate_proj.weight") for e in (0, 3)], "experts 0, 3 have no gate_proj"),
        (lambda t: [t.pop(f"{EXPERTS}.{e}.up_proj.weight") for e in range(4)], "experts 0, 1, 2, 3 have no up_proj"),
        (lambda t: [t.pop(f"{EXPERTS}.{e}.down_proj.weight") for e in range(4)], "none of its 4 experts has down_proj"),
        (lambda t: t.update({f"{EXPERTS}.4.up_proj.weight": torch.zeros(24, 32)}), "up_proj of 5 experts, the model"),
        (
            lambda t: t.update({f"{EXPERTS}.1.up_proj.weight": torch.zeros(23, 32)}),
            r"expert 1 has gate_up_proj .*\[23, 32",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.1.up_proj.weight": torch.zeros(24, 31)}),
            r"expert 1 has gate_up_proj .*\[24, 31",
        ),
        (lambda t: t.update({f"{EXPERTS}.down_proj": torch.zeros(4, 32, 24)}), "in two forms"),
    ],
)
def test_experts_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    edit(save(build("per_expert"), tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        index_of(skeleton("per_expert"), tmp_path)


@pytest.mark.parametrize("experts", [3, 5])
def test_stack_of_another_number_of_experts(experts: int, tmp_path: Path) -> None:
    save(build("stacked"), tmp_path)
    with pytest.raises(CheckpointError, match=rf"layers.0.mlp.experts: expected one tensor .* of {experts} experts"):
        index_of(skeleton("stacked", num_local_experts=experts), tmp_path)


# Files.


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*\.bin files \(pickle\) are not read"):
        weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        weight_files(tmp_path / "nowhere")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    save(build("per_expert"), tmp_path, "20KB")
    shard = sorted(tmp_path.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: .*Download the missing shard"):
        weight_files(tmp_path)


def test_links_to_blobs_are_followed_and_dangling_ones_named(tmp_path: Path) -> None:
    """The layout of the Hugging Face cache."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    model = build("per_expert")
    save(model, tmp_path / "real")
    blobs.mkdir()
    (tmp_path / "real" / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (snapshot / "model-1.safetensors").symlink_to(Path("../../blobs/123"))
    moe_layers, index = index_of(skeleton("per_expert"), snapshot)
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model)))
    (blobs / "123").unlink()
    with pytest.raises(CheckpointError, match=r"model-1.safetensors: .*a link whose target is gone"):
        weight_files(snapshot)


@pytest.mark.parametrize("name", ["../outside.safetensors", "a/../../b.safetensors", "/etc/passwd", "", ".", 7, None])
def test_index_cannot_point_outside_the_folder(name: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "outside.safetensors", {})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not a name inside the checkpoint folder; refused"):
        weight_files(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}', "\xff", "[" * 9999]
)
def test_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: expected JSON"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_git_lfs_pointer(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"{name}: is a Git-LFS pointer.*git lfs pull"):
        weight_files(tmp_path)


def test_key_in_two_shards(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 'x' is also in a\.safetensors"):
        read_headers(files)


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 5000,
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": {"dtype": "F32", "shape": [2],'
        b' "data_offsets": [0, 8]}}',
        entry(dtype="F128"),
        entry(dtype=7),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=[2.0]),
        entry(shape=[1 << 40, 1 << 40]),
        entry(data_offsets=[0, 16]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[1 << 62, (1 << 62) + 8]),
        entry(data_offsets=[0]),
        {"x": 1},
        {"x": {}},
    ],
)
def test_malformed_header_is_a_checkpoint_error(header: Any, tmp_path: Path) -> None:
    file = write_shard(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: not a usable safetensors file"):
        read_headers([file])


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_shard_is_named(size: int, tmp_path: Path) -> None:
    [file] = weight_files(save(build("per_expert"), tmp_path)).files
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a usable safetensors file"):
        read_headers([file])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_mutated_header_is_refused_or_stays_inside_the_file(at: int, value: int, cut: int, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({f"t{i}": torch.zeros(3, i + 1) for i in range(4)}, file)
    data = bytearray(file.read_bytes())
    data[at % len(data)] = value
    file.write_bytes(data[: len(data) - cut])
    try:
        headers = read_headers([file])
    except CheckpointError as error:
        assert "m.safetensors" in str(error)
    else:
        assert all(0 <= r.offset and r.offset + r.nbytes <= len(data) - cut for r in headers.values())


def test_expert_beyond_two_gigabytes_in_a_sparse_file(tmp_path: Path) -> None:
    """Offsets are 64 bits wide all the way to the read."""
    pad = 5 << 30
    header = {"pad": {"dtype": "U8", "shape": [pad], "data_offsets": [0, pad]}}
    model, end = build("stacked"), pad
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    for key, tensor in state.items():
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    file = write_shard(tmp_path / "model.safetensors", header, b"")
    with file.open("r+b") as stream:
        start = stream.seek(0, 2)
        for key, tensor in state.items():
            stream.seek(start + header[key]["data_offsets"][0])
            stream.write(tensor.numpy().tobytes())
    moe_layers, index = index_of(skeleton("stacked"), tmp_path)
    assert_holds(DiskStore([moe.layout for moe in moe_layers], index), index.pack(find_experts(model)))


def test_more_experts_configured_than_stored(tmp_path: Path) -> None:
    save(build("per_expert"), tmp_path)
    with pytest.raises(CheckpointError, match="experts 4, 5 have no gate_proj"):
        index_of(skeleton("per_expert", num_experts=6), tmp_path)
