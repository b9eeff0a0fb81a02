"""A tensor of a file is read as plain transformers has it: the same values, as far from a cache line, and no more."""

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import moe_offload
from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint.headers import read_headers
from moe_offload.checkpoint.pretrained.file_entry import FileEntries
from moe_offload.errors import CheckpointError

PARTS = [
    ...,
    slice(3, 9),
    (slice(3, 9), slice(None), slice(None)),
    (slice(None), slice(2, 5)),
    (slice(1, 20), slice(2, 5), slice(3, 4)),
    (slice(4, 5), slice(2, 5)),
    (slice(0, 0),),
    (..., slice(0, 6, 2)),
]


def save_beyond(tensors, path, beyond):
    """Save them where the data begins so many bytes `beyond` a multiple of 16: the length of the header says it."""
    for more in range(0, 16, 4):
        save_file(tensors, path, metadata={"format": "pt", "more": "x" * more})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 16 == beyond:
            return
    raise AssertionError("no header is that long")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("part", PARTS)
def test_values_and_place_are_those_of_a_mapped_file(tmp_path, dtype, part):
    file = tmp_path / "a.safetensors"
    save_beyond({"a": torch.randn(24, 8, 6).to(dtype), "b": torch.randn(7).to(dtype)}, file, 8)
    found = FileEntries(read_headers([file]))["a"]
    with safe_open(file, framework="pt") as mapped:
        expected = mapped.get_slice("a")
        assert found.get_shape() == expected.get_shape() and found.get_dtype() == expected.get_dtype()
        expected = expected[part]
        found = found[part]
        assert found.dtype == dtype and torch.equal(found.float(), expected.float())
        if (
            dtype == torch.float32
            and found.numel()
            and (part is ... or not isinstance(part, tuple) or part == PARTS[2])
        ):
            assert found.data_ptr() % 64 == expected.data_ptr() % 64 != 0


def test_a_number_and_nothing(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"one": torch.tensor(3.0), "none": torch.empty(0, 4)}, file)
    entries = FileEntries(read_headers([file]))
    assert entries["one"][...] == 3 and entries["none"][...].shape == (0, 4)
    with pytest.raises(TypeError, match="slices"):
        entries["one"][torch.tensor([0])]


@pytest.mark.parametrize(("part", "most"), [(slice(0, 100), 100 * 4000), ((slice(100, 101), slice(0, 10)), 4000)])
def test_what_is_not_asked_for_is_not_read(tmp_path, part, most):
    """The library's entries, opened as we open them, read all of it."""
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2000, 1000)}, file)
    headers = read_headers([file])
    entries = {"library": headers.opened[file].get_slice("a"), "ours": FileEntries(headers)["a"]}
    read = {}
    for name, entry in entries.items():
        before = bytes_read()
        entry[part]
        read[name] = bytes_read() - before
    assert read["ours"] <= most + 1000 < 8_000_000 <= read["library"]


def bytes_read():
    """By this process's system calls; what it reads of /proc is in it, a few hundred bytes."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_a_file_that_was_cut_or_replaced_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2000, 1000)}, file)
    headers = read_headers([file])
    entry = FileEntries(headers)["a"]
    os.truncate(file, 1_000_000)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: was truncated.*'a'"):
        entry[...]
    with pytest.raises(CheckpointError, match=r"a\.safetensors: was modified"):
        FileEntries(headers)["a"]


def test_a_token_in_float32_has_the_bits_of_plain_transformers(tmp_path):
    """Its dense products are of one row. On processors where MKL's sum depends on the place, it differed in half of all
    checkpoints."""
    build("glm4_moe", n_routed_experts=16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    save_beyond(tensors, file, 8)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    ours = moe_offload.from_pretrained(tmp_path, "40MB", config={"experts_implementation": "grouped_mm"})
    places = {name: weight.data_ptr() % 64 for name, weight in plain.named_parameters() if ".experts." not in name}
    assert places == {n: p.data_ptr() % 64 for n, p in ours.named_parameters() if n in places}
    assert len({place for place in places.values() if place % 16}) == 1
    ids = torch.tensor([[5]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    ours.moe_offload.close()
