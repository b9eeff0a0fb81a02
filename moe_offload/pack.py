"""Write a packed checkpoint: dense tensors copied, experts as the rows that slots hold. `packed.py` reads it.

Everything streams: one row, or one part of a dense tensor, is in memory at a time. All of it goes to a folder next to
the wanted one, which gets its name at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .checkpoint.folder import ABSENT, INDEX
from .checkpoint.headers import BEGINS, Headers
from .checkpoint.new_folder import check_new, folder_to_write, new_folder
from .checkpoint.outline import outline_folder
from .checkpoint.packed import ROWS, SOURCES, Stored, index_stored, is_packed, read_stored
from .checkpoint.packed_format import describe_layer, parse_sources, rows_metadata, sources_metadata
from .checkpoint.pretrained.arguments import Arguments, sort_arguments
from .checkpoint.pretrained.download import get_folder
from .checkpoint.row_index import RowIndex, index_rows
from .checkpoint.shards import Entry, Shard, file_name, make_header, split_entries, write_shard
from .config.sizes import parse_size
from .errors import CheckpointChangedError, CheckpointError, ConfigError, PackError
from .experts import PLACED, MoELayer
from .memory.buffers import page_aligned
from .memory.stores import Store
from .memory.stores.direct_io import DataFile
from .memory.stores.disk import DiskStore
from .memory.stores.row_reads import PART_BYTES
from .observe.progress import show_bar

VERIFY = ("none", "sample", "all")
#: What is not copied from the original folder: weights, in whatever form, and their indexes.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class Source:
    """The checkpoint to be packed: its model on the meta device, its experts, and where everything of it lies."""

    folder: Path
    meta: Any
    moe_layers: Sequence[MoELayer]
    headers: Headers
    index: RowIndex


def pack_checkpoint(
    path_or_id: str | Path, out: str | Path, *, max_shard_size: int | str = "5GB", verify: str = "sample", **hub: Any
) -> Path:
    """Write a packed copy of a checkpoint, from which an expert is one aligned read without conversion.

    `from_pretrained` and `make_plan` take the copy like any checkpoint; plain transformers cannot load it, and fails.
    One row is in memory at a time.

    Args:
        path_or_id: The folder of a checkpoint, or a repository on the Hub.
        out: The folder to write, which must not be there yet. It takes about the size of the original.
        max_shard_size: The most bytes of one file: an int, or a size such as "5GB".
        verify: How many rows are read again and compared: "sample" (three a layer), "all" or "none".
        **hub: As in `from_pretrained`: `revision`, `token`, `subfolder`, `variant` ...

    Returns:
        `out`, as a path.

    Raises:
        PackError: `out` exists, cannot be written, has no room (bytes needed and free are stated), or reads back
            differently. After this and every other error, Ctrl-C too, nothing is left of it.
        CheckpointError: There is no checkpoint, or it is damaged, incomplete, packed already, or of another model.
        UnsupportedModelError: The model cannot be run exactly.
        ConfigError: An argument means nothing.

    Example:

        ```python
        moe_offload.pack_checkpoint("Qwen/Qwen3-30B-A3B", "qwen3-packed")
        model = moe_offload.from_pretrained("qwen3-packed", budget="8GB")
        ```
    """
    if verify not in VERIFY:
        raise ConfigError(f"verify={verify!r} is not accepted: it takes one of {', '.join(map(repr, VERIFY))}")
    limit_bytes, out = parse_size(max_shard_size), folder_to_write(out, PackError)
    check_new(out)
    arguments = sort_arguments(None, hub)
    source = open_source(get_folder(path_or_id, arguments), arguments)
    dense, experts = _dense_shards(source, limit_bytes), _expert_shards(source, limit_bytes)
    others = [file for file in source.folder.iterdir() if file.is_file() and not file.name.endswith(WEIGHTS)]
    size = sum(shard.nbytes for shard in (*dense, *experts))
    with new_folder(out, size + sum(file.stat().st_size for file in others)) as folder:
        for file in others:
            shutil.copyfile(file, folder / file.name)
        (folder / INDEX).write_text(_index_text(source, dense))
        (folder / "PACKED.md").write_text(README)
        with show_bar("Packing", size) as shown:
            for shard in dense:
                write_shard(folder / shard.name, shard, dense_parts(shard, source.headers), shown.update)
            with contextlib.closing(_store(source.moe_layers, source.index)) as store:
                for shard in experts:
                    write_shard(folder / shard.name, shard, expert_rows(shard, source.moe_layers, store), shown.update)
                if verify != "none":
                    _verify(source, store, folder, all_rows=verify == "all")
    return out


def open_source(folder: Path, arguments: Arguments) -> Source:
    """What is to be written anew. Raises `CheckpointError` for what is packed already, or cannot be copied."""
    place = folder / arguments.subfolder
    if is_packed(place):
        raise CheckpointError(f"{place}: is a packed checkpoint already. Copy it, or give the original one")
    found = outline_folder(folder, arguments)
    stored, index = cast(Stored, found.stored), cast(RowIndex, found.index)
    for key, (dtype, file) in stored.headers.unreadable.items():
        raise CheckpointError(
            f"{file}: {key!r} is of dtype {dtype}, which torch {torch.__version__} does not have, so it cannot be "
            "copied. The model does not use it: remove it from the checkpoint, or do without packing"
        )
    return Source(place, found.model, found.moe_layers, stored.headers, index)


def _store(moe_layers: Sequence[MoELayer], index: RowIndex) -> DiskStore:
    return DiskStore([moe.layout for moe in moe_layers], index)


def _dense_shards(source: Source, limit_bytes: int) -> list[Shard]:
    """Dense tensors as they are, in the order of their files; within a file the widest elements first (alignment)."""
    found = [(key, range_) for key, range_ in source.headers.items() if key not in source.index.keys]
    found.sort(key=lambda item: (item[1].file, item[1].offset))
    runs = split_entries([Entry.of(key, range_) for key, range_ in found], limit_bytes)
    shards = []
    for number, run in enumerate(runs, 1):
        entries = tuple(sorted(run, key=lambda entry: -entry.dtype.itemsize))
        begins = {entry.key: source.headers[entry.key].begin for entry in entries if entry.dtype in PLACED}
        metadata = {"format": "pt", BEGINS: json.dumps(begins)} if begins else {"format": "pt"}
        shards.append(Shard(file_name("model", number, len(runs)), entries, make_header(entries, metadata)))
    return shards


def _expert_shards(source: Source, limit_bytes: int) -> list[Shard]:
    """One tensor of rows per layer."""
    sources = sources_metadata(source.headers, source.index.keys)
    recipes = index_rows(source.meta, source.moe_layers, parse_sources(sources)).rows
    layers = {moe.name: describe_layer(moe, recipes[moe.index]) for moe in source.moe_layers}
    entries = [
        Entry(moe.name, torch.uint8, (moe.num_experts, moe.layout.row_bytes), moe.nbytes) for moe in source.moe_layers
    ]
    runs = split_entries(entries, limit_bytes)
    shards = []
    for number, run in enumerate(runs, 1):
        described = {entry.key: layers[entry.key] for entry in run}
        metadata = {"format": "pt", ROWS: rows_metadata(source.meta.config.model_type, described)}
        if number == 1:
            metadata[SOURCES] = sources
        shards.append(Shard(file_name(ROWS, number, len(runs)), run, make_header(run, metadata)))
    return shards


def _verify(source: Source, store: Store, folder: Path, *, all_rows: bool) -> None:
    """Read rows as a loaded model would, and compare them with the original's."""
    with contextlib.closing(
        _store(source.moe_layers, index_stored(source.meta, source.moe_layers, read_stored(folder)))
    ) as packed:
        for moe in source.moe_layers:
            experts = range(moe.num_experts)
            want, found = page_aligned(moe.layout.row_bytes), page_aligned(moe.layout.row_bytes)
            for e in experts if all_rows else sorted({experts[0], experts[len(experts) // 2], experts[-1]}):
                store.read(moe.index, e, want.numpy().data)
                packed.read(moe.index, e, found.numpy().data)
                for field in moe.layout.fields:
                    span = slice(field.offset, field.offset + field.nbytes)
                    if not torch.equal(want[span], found[span]):
                        raise PackError(
                            f"{moe.name} expert {e}: {field.name} reads back from {folder.parent} otherwise than it "
                            "was written; the disk loses data. Nothing was left there; pack to another disk"
                        )


def _index_text(source: Source, dense: Sequence[Shard]) -> str:
    files = {entry.key: shard.name for shard in dense for entry in shard.entries}
    size = sum(entry.nbytes for shard in dense for entry in shard.entries)
    files |= {moe.name: ABSENT for moe in source.moe_layers}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2) + "\n"


README = """\
# A packed checkpoint

The experts of this Mixture-of-Experts model are in `moe_offload_rows-*.safetensors`, one tensor per layer, each row of
it all weights of one expert, in the order in which moe_offload computes with them. The rest is as in the original.

Where moe_offload is installed (from a clone of its repository):

    model = moe_offload.from_pretrained("this folder", budget="8GB")
    moe-offload run "this folder" --budget 8GB --prompt "..."

transformers cannot load this folder by itself: `AutoModelForCausalLM.from_pretrained` stops at a file that the index
names and that is not there. Use the original checkpoint for that. Nothing is quantised or otherwise changed here, and
the folder was made from the original by `moe-offload pack ORIGINAL FOLDER`; should a later transformers lay the experts
out otherwise, loading says so, and the original is to be packed again.
"""


def dense_parts(shard: Shard, headers: Headers) -> Iterator[memoryview]:
    """The bytes of a shard's dense tensors, part by part; each view is good until the next one is asked for.

    Raises `ExpertReadError` or `CheckpointChangedError` when the original cannot be read, or is no longer the one that
    `headers` were read from.
    """
    part = page_aligned(PART_BYTES).numpy().data
    with contextlib.ExitStack() as opened:
        files: dict[Path, DataFile] = {}
        for entry in shard.entries:
            range_ = headers[entry.key]
            if range_.file not in files:
                files[range_.file] = opened.enter_context(contextlib.closing(DataFile(range_.file)))
            for at in range(0, range_.nbytes, PART_BYTES):
                chunk = part[: min(PART_BYTES, range_.nbytes - at)]
                files[range_.file].read(range_.offset + at, [chunk], entry.key)
                yield chunk
        for path, file in files.items():
            if headers.stamps[path].followed_by(file.stamp(), path) is None:
                raise CheckpointChangedError(f"{path}: was modified while it was packed. Let it rest and pack again")


def expert_rows(shard: Shard, moe_layers: Sequence[MoELayer], store: Store) -> Iterator[memoryview]:
    """The rows of a shard's layers; each view is good until the next one is asked for. Padding is zero."""
    keys = {entry.key for entry in shard.entries}
    for moe in (moe for moe in moe_layers if moe.name in keys):
        row = page_aligned(moe.layout.row_bytes)
        ends = [(field.offset, field.offset + field.nbytes) for field in moe.layout.fields]
        gaps = zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(row)], strict=True)
        padding = [row[start:stop] for start, stop in gaps]
        for e in range(moe.num_experts):
            store.read(moe.index, e, row.numpy().data)
            for span in padding:
                span.zero_()
            yield row.numpy().data
