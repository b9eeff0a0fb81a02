"""KV caches on disk: whole or not at all, of this model alone, and no more than was said."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

import moe_offload
from moe_offload.apps.prompt_cache.folder import PromptFolder
from moe_offload.apps.prompt_cache.model import identify_model
from moe_offload.apps.prompt_cache.open import check_folder
from moe_offload.errors import ConfigError
from tests.paths import MODEL

IDS = list(range(5, 45))


def new_cache():
    return DynamicCache()


def filled(tokens=40, layers=2):
    generator, cache = torch.Generator().manual_seed(0), new_cache()
    for i in range(layers):
        cache.update(*(torch.randn(1, 2, tokens, 4, generator=generator).bfloat16() for _ in range(2)), i)
    return cache


def made(cache):
    """An empty cache with the layers of `cache`."""
    found = new_cache()
    for i in range(len(cache.layers)):
        found.update(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4), i)
    return found


@pytest.fixture
def folder(tmp_path):
    return lambda **options: PromptFolder(tmp_path, "one", lambda: made(filled()), **options)


def files(tmp_path):
    return sorted(tmp_path.glob("*/*.safetensors"))


def test_it_is_there_for_the_next_process(folder, tmp_path):
    folder().save(IDS, filled())
    (file,) = files(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    ids, cache = folder().find([*IDS, 1, 2, 3], 16)
    assert ids == IDS
    for found, kept in zip(cache.layers, filled().layers, strict=True):
        assert torch.equal(found.keys, kept.keys) and torch.equal(found.values, kept.values)
    assert folder().find(IDS[:10], 16) is None and folder().find([1, *IDS], 16) is None


def test_of_another_model_it_is_not_there(folder, tmp_path):
    folder().save(IDS, filled())
    assert PromptFolder(tmp_path, "two", new_cache).find(IDS, 1) is None


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_file_is_as_if_it_were_not_there(folder, tmp_path, caplog, damage):
    folder().save(IDS, filled())
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    data = {"cut": data[:-8], "changed": data, "empty": b"", "other": b"not tensors at all"}[damage]
    file.write_bytes(data)
    assert folder().find(IDS, 16) is None
    assert caplog.text.count("is not used") == 1 and file.name in caplog.text
    folder().save(IDS, filled())
    assert folder().find(IDS, 16) is not None


def test_layers_that_the_model_does_not_have_are_not_used(folder, tmp_path, caplog):
    folder().save(IDS, filled(layers=3))
    assert folder().find(IDS, 16) is None and "other layers" in caplog.text


def test_what_goes_on_replaces_what_it_goes_on_from(folder, tmp_path):
    kept = folder()
    kept.save(IDS[:20], filled(20))
    kept.save(IDS, filled())
    kept.save([9, *IDS], filled(41))
    assert len(files(tmp_path)) == 2


def test_the_least_recently_used_gives_way(folder, tmp_path):
    folder().save(IDS, filled())
    (first,) = files(tmp_path)
    size = first.stat().st_size
    kept = folder(most_bytes=int(2.5 * size))
    kept.save([1, *IDS[1:]], filled())
    folder(most_bytes=10**9).find(IDS, 16)  # used again
    kept.save([2, *IDS[1:]], filled())
    assert len(files(tmp_path)) == 2 and first in files(tmp_path)
    folder(most_bytes=size // 2).save([3, *IDS[1:]], filled())
    assert len(files(tmp_path)) == 2, "what is larger than all there may be is not written"


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--prompt-cache"):
        check_folder(str(tmp_path / "file" / "in it"))
    for said in ("", " ", "/proc"):  # the current folder, and one in which nobody may make another
        with pytest.raises(ConfigError, match="--prompt-cache"):
            check_folder(said)
    check_folder("memory")


@pytest.mark.parametrize("what", ["floats", "a number", "a folder", "a pipe"])
def test_what_has_no_tokens_is_as_if_it_were_not_there(folder, tmp_path, caplog, what):
    folder().save(IDS, filled())
    other = tmp_path / "one" / "other.safetensors"
    if what == "a folder":
        other.mkdir()
    elif what == "a pipe":
        os.mkfifo(other)
    else:
        ids = torch.tensor(5) if what == "a number" else torch.tensor([*IDS, 1], dtype=torch.float32)
        save_file({"ids": ids}, other)
    ids, _ = folder().find([*IDS, 1, 2], 16)
    assert ids == IDS and caplog.text.count("other.safetensors is not used") == 1


def test_every_change_of_a_model_makes_it_another():
    def identity(change=lambda model: None, compute="exact", **options):
        model = moe_offload.from_pretrained(MODEL, "20MB", config={"profile": "off"}, **options)
        with model.moe_offload:
            change(model)
            return identify_model(model, compute)

    def retrain(model):
        model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1

    known = identity()
    assert identity() == known
    assert len({known, identity(retrain), identity(compute="fast"), identity(dtype="float32")}) == 4
