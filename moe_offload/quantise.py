"""Make a quantised checkpoint of an ordinary one: experts are rounded to small codes, everything else is copied.

What is written is an ordinary checkpoint in a layout that plain transformers loads as well
(`checkpoint/quantised/layouts.py`), so that nothing else needs to know how it came about.

    outline of the original        -> which tensors are expert matrices
    layout                         -> names, shapes -> headers of the new files;  config.json + quantization_config
    outline of those headers alone -> transformers would take them (before anything large is written)
    one matrix after the other     -> read, quantised, written where its tensors belong
    rows of both checkpoints       -> compared: the error is that of rounding, and is told
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint.headers import Headers, TensorRange
from .checkpoint.new_folder import CONFIG, POINTER, SINGLE, check_new, folder_to_write, new_folder, write_index
from .checkpoint.outline import outline_folder, outline_stored
from .checkpoint.packed import Stored
from .checkpoint.pretrained.arguments import sort_arguments
from .checkpoint.pretrained.download import get_folder
from .checkpoint.quantised.layouts import KINDS, ExpertMatrix, Layout, choose_layout, find_matrices
from .checkpoint.quantised.quantizer import quantization_of
from .checkpoint.shards import Entry, Filling, Shard, file_name, split_entries
from .config.sizes import parse_size
from .errors import CheckpointChangedError, CheckpointError, ConfigError, PackError, UnsupportedModelError
from .memory.buffers import page_aligned
from .memory.stores.direct_io import DataFile
from .memory.stores.disk import DiskStore
from .memory.stores.row_reads import PART_BYTES
from .observe.progress import show_bar
from .pack import WEIGHTS, Source, open_source

logger = logging.getLogger("moe_offload")
#: The largest error of rows that are read back, relative to the original's: rounding makes 0.03 (FP8) to 0.13, a wrong
#: layout 1.4.
LARGEST_ERROR = 0.5


def quantise_checkpoint(
    path_or_id: str | Path, out: str | Path, experts: str, *, max_shard_size: int | str = "5GB", **hub: Any
) -> Path:
    """Write a copy of a checkpoint whose experts are quantised: a half to a quarter of the bytes. It is lossy.

    The copy is an ordinary quantised checkpoint: `from_pretrained` reads it, plain transformers does, and both give the
    same tokens, which are not those of the original. One expert matrix is in memory at a time.

    Args:
        path_or_id: The folder of an unquantised checkpoint, or a repository on the Hub.
        out: The folder to write, which must not be there yet.
        experts: The format: "mxfp4" (4.25 bits a weight), "int4" (4.5) or "fp8" (8). All are rounded to the nearest
            code; the first two have groups of 32, the last one blocks of 128 by 128, or smaller where those do not
            divide the experts.
        max_shard_size: The most bytes of one file, unless one tensor is larger: an int, or a size such as "5GB".
        **hub: As in `from_pretrained`: `revision`, `token`, `subfolder`, `variant` ...

    Returns:
        `out`, as a path.

    Raises:
        PackError: `out` exists, cannot be written, has no room (bytes needed and free are stated), or reads back
            differently. After this and every other error, Ctrl-C too, nothing is left of it.
        CheckpointError: There is no checkpoint, or it is damaged, incomplete, packed or quantised already.
        UnsupportedModelError: The model cannot be run exactly, the format has no layout for its experts, or the package
            that reads the format (compressed-tensors) is not installed.
        ConfigError: An argument means nothing.

    Example:

        ```python
        moe_offload.quantise_checkpoint("Qwen/Qwen3-30B-A3B", "qwen3-fp8", "fp8")
        model = moe_offload.from_pretrained("qwen3-fp8", budget="8GB")
        ```
    """
    if experts not in KINDS:
        raise ConfigError(f"experts={experts!r} is not accepted: it takes one of {', '.join(map(repr, KINDS))}")
    limit_bytes, out = parse_size(max_shard_size), folder_to_write(out, PackError)
    check_new(out)
    arguments = sort_arguments(None, hub)
    source = open_source(get_folder(path_or_id, arguments), arguments)
    if quantization_of(source.meta.config) is not None or any(source.index.packings):
        raise CheckpointError(f"{source.folder}: is quantised already. Give the checkpoint that it was made of")
    called = next((moe.name for moe in source.moe_layers if moe.called), None)
    if called is not None:
        raise UnsupportedModelError(
            f"{called}: its experts are called one by one by the model's own code, which reads no quantised weights. "
            "Keep the checkpoint as it is, or pack it without --experts"
        )
    plan = _plan(source, experts, limit_bytes)
    others = [file for file in source.folder.iterdir() if file.is_file() and not file.name.endswith(WEIGHTS)]
    size = sum(shard.nbytes for shard in plan.shards)
    with new_folder(out, size + sum(file.stat().st_size for file in others)) as folder:
        for file in others:
            shutil.copyfile(file, folder / file.name)
        (folder / CONFIG).write_text(_configuration(source, plan.layout), encoding="utf-8")
        with contextlib.closing(Filling(folder, plan.shards)) as files, show_bar("Quantising", size) as shown:
            outline_stored(folder, Stored(files.ranges))  # raises for what could not be loaded
            for where, data in _tensors(source, plan, files.ranges):
                files.write(where, data)
                shown.update(data.nbytes)
            files.check_complete()
            if len(plan.shards) > 1:
                write_index(folder, files.ranges, sum(param.numel() for param in source.meta.parameters()))
        error = _compare_rows(source, folder)
    logger.warning(
        "%s: its experts are rounded to %s, which is lossy: the weights that were read back differ from the original's "
        "by %.1f %% (root mean square)",
        out, experts, 100 * error,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Plan:
    """What becomes of each tensor, and the files that are written."""

    layout: Layout
    matrices: Mapping[str, ExpertMatrix]
    shards: tuple[Shard, ...]

    def entries(self, key: str, range_: TensorRange) -> list[Entry]:
        if key in self.matrices:
            return self.layout.entries(self.matrices[key])
        return [Entry.of(key, range_)]


def _plan(source: Source, kind: str, limit_bytes: int) -> _Plan:
    matrices = find_matrices(source.moe_layers, source.index, source.headers)
    layout = choose_layout(kind, matrices, str(source.folder))
    plan = _Plan(layout, matrices, ())
    in_order = sorted(source.headers.items(), key=lambda item: (item[1].file, item[1].offset))
    runs = split_entries([entry for key, range_ in in_order for entry in plan.entries(key, range_)], limit_bytes)
    shards = []
    for number, run in enumerate(runs, 1):
        shards.append(Shard.of(SINGLE if len(runs) == 1 else file_name("model", number, len(runs)), run))
    return replace(plan, shards=tuple(shards))


def _configuration(source: Source, layout: Layout) -> str:
    """config.json of the original, and what says how to read the new files."""
    said = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    said.pop(POINTER, None)  # the new weights have their usual names
    if not said.keys() & {"dtype", "torch_dtype"}:  # otherwise it would be that of the first tensor, a code maybe
        said["dtype"] = str(source.meta.dtype).removeprefix("torch.")
    said["quantization_config"] = layout.configuration(source.meta, source.moe_layers)
    return json.dumps(said, indent=2) + "\n"


def _tensors(source: Source, plan: _Plan, ranges: Headers) -> Iterator[tuple[TensorRange, memoryview]]:
    """The bytes of the new files, and where each goes; a view is good until the next one is asked for."""
    buffer = page_aligned(PART_BYTES).numpy().data
    with contextlib.ExitStack() as opened:
        files: dict[Path, DataFile] = {}
        for key, range_ in sorted(source.headers.items(), key=lambda item: (item[1].file, item[1].offset)):
            if range_.file not in files:
                files[range_.file] = opened.enter_context(contextlib.closing(DataFile(range_.file)))
            file = files[range_.file]
            if key in plan.matrices:
                yield from _quantised(plan, plan.matrices[key], ranges, file)
                continue
            for at in range(0, range_.nbytes, PART_BYTES):
                part = buffer[: min(PART_BYTES, range_.nbytes - at)]
                file.read(range_.offset + at, [part], key)
                yield replace(ranges[key], offset=ranges[key].offset + at), part
        for path, file in files.items():
            if source.headers.stamps[path].followed_by(file.stamp(), path) is None:
                raise CheckpointChangedError(f"{path}: was modified while it was read. Let it rest and try again")


def _quantised(
    plan: _Plan, matrix: ExpertMatrix, ranges: Headers, file: DataFile
) -> Iterator[tuple[TensorRange, memoryview]]:
    targets = [ranges[entry.key] for entry in plan.layout.entries(matrix)]
    for e in range(matrix.range.shape[0] if matrix.stacked else 1):
        w = _read_matrix(file, matrix.range[e] if matrix.stacked else matrix.range, matrix.key)
        tensors = plan.layout.quantise(w.t() if matrix.stacked else w)
        for target, tensor in zip(targets, tensors, strict=True):
            data = tensor.contiguous().view(torch.uint8).flatten().numpy().data
            yield (target[e] if matrix.stacked else target), data


def _read_matrix(file: DataFile, range_: TensorRange, key: str) -> Tensor:
    raw = page_aligned(range_.nbytes)
    for at in range(0, range_.nbytes, PART_BYTES):
        file.read(range_.offset + at, [raw[at : at + PART_BYTES].numpy().data], key)
    w = raw.view(range_.dtype).view(range_.shape)
    if not bool(torch.isfinite(w).all()):
        raise CheckpointError(f"{file.path}: {key!r} has numbers that are not finite, which no code stands for")
    return w


def _compare_rows(source: Source, folder: Path) -> float:
    """Read some rows of the new checkpoint as a loaded model would; the largest error relative to the original's."""
    made = outline_folder(folder)
    if made.index is None or not all(moe.packed for moe in made.moe_layers):
        raise PackError(f"{folder.parent}: the experts that were written are not found again; nothing was left there")
    worst = 0.0
    with (
        contextlib.closing(DiskStore([moe.layout for moe in source.moe_layers], source.index)) as old,
        contextlib.closing(DiskStore([moe.layout for moe in made.moe_layers], made.index)) as new,
    ):
        for before, after in zip(source.moe_layers, made.moe_layers, strict=True):
            was, row = page_aligned(before.layout.row_bytes), page_aligned(after.layout.row_bytes)
            fields = {field.name: field for field in before.layout.fields}
            for e in sorted({0, before.num_experts // 2, before.num_experts - 1}):
                old.read(before.index, e, was.numpy().data)
                new.read(after.index, e, row.numpy().data)
                for weight in after.packed:
                    want, found = (
                        fields[weight.name].view_in(was).float(),
                        torch.empty(weight.shape, dtype=weight.dtype, device="cpu"),
                    )
                    weight.unpack(row, found)
                    error = float((found.float() - want).norm() / want.norm().clamp(min=1e-30))
                    worst = max(worst, error)
                    if not error <= LARGEST_ERROR:
                        raise PackError(
                            f"{before.name} expert {e}: {weight.name} reads back {100 * error:.0f} % away from the "
                            "original, which is more than rounding makes. Nothing was left there; use another disk, or "
                            "another format"
                        )
    return worst
