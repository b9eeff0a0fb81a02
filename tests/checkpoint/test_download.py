"""What is fetched of a repository on the Hub: the files that are read, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from moe_offload.checkpoint.packed import ABSENT
from moe_offload.checkpoint.pretrained.arguments import Arguments
from moe_offload.checkpoint.pretrained.download import download_checkpoint
from moe_offload.errors import ConfigError

SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = json.dumps({"weight_map": {str(n): name for n, name in enumerate(SHARDS)}})
SMALL = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors.index.json": INDEX}
LARGE = dict.fromkeys([*SHARDS, "original/model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"], "")
WASTE = {"checkpoint-500/model.safetensors": "", "original/config.json": "{}", "pytorch_model.bin": ""}

PLAIN = Arguments()


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """`fetched(files, arguments)`: the names that a download of a repository of these files brings."""

    def of(files: dict[str, str], arguments: Arguments = PLAIN) -> set[str]:
        folder, revisions = tmp_path / "snapshots" / "abc123", []

        def snapshot_download(name, *, allow_patterns, ignore_patterns=None, revision=None):
            revisions.append(revision)
            chosen = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            for file in chosen:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(files[file])
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert download_checkpoint("someone/model", arguments) == folder
        assert revisions[0] is None and set(revisions[1:]) == {"abc123"}, "all of one commit"
        return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}

    return of


def test_shards_and_nothing_beside_them(fetched):
    assert fetched({**SMALL, **LARGE, **WASTE}) == {*SMALL, *SHARDS}


def test_a_single_file_comes_before_an_index(fetched):
    assert fetched({**SMALL, **LARGE, "model.safetensors": ""}) == {*SMALL, "model.safetensors"}


def test_a_variant_a_subfolder_and_the_file_that_the_configuration_names(fetched):
    assert fetched({**SMALL, **LARGE}, Arguments(variant="fp16")) == {*SMALL, "model.fp16.safetensors"}
    inner = {"a/config.json": "{}", "a/model.safetensors": "", "a/b/config.json": "{}"}
    assert {n for n in fetched({**SMALL, **inner}, Arguments(subfolder="a")) if "/" in n} == {*inner} - {
        "a/b/config.json"
    }
    named = {"config.json": json.dumps({"transformers_weights": "consolidated.safetensors"})}
    assert "consolidated.safetensors" in fetched({**SMALL, **LARGE, **named})


def test_a_packed_repository(fetched):
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": ABSENT}})
    rows = "moe_offload_rows-00001-of-00001.safetensors"
    files = {**SMALL, **LARGE, "model.safetensors.index.json": index, rows: ""}
    assert fetched(files) == {*SMALL, SHARDS[0], rows}


def test_an_adapter_comes_along(fetched):
    adapter = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}
    assert fetched({**SMALL, **LARGE, **adapter}) == {*SMALL, *SHARDS, *adapter}


def test_code_beside_the_weights_comes_with_them_where_it_is_trusted(fetched):
    code = {"config.json": json.dumps({"auto_map": {"AutoConfig": "code.Config"}}), "code.py": "", "sub/other.py": ""}
    files = {**SMALL, **code, "model.safetensors": ""}
    assert "code.py" not in fetched(files)
    assert "code.py" in fetched(files, Arguments(trust_remote_code=True))


def test_another_revision_of_the_code_beside_the_weights_is_refused(fetched):
    code = {"config.json": json.dumps({"auto_map": {"AutoConfig": "code.Config"}}), "code.py": ""}
    with pytest.raises(ConfigError, match=r"code_revision='v2' .*code\.Config"):
        fetched({**SMALL, **code, "model.safetensors": ""}, Arguments(trust_remote_code=True, code_revision="v2"))
