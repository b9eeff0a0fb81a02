"""Checkpoints of real architectures with random weights, for machines that no model can be downloaded to.

They have the file layout, the shapes and the dtypes of the real thing, in as many layers as asked for; only the numbers
mean nothing. Experts may be quantised: their codes are random, their scales such that weights are as large as usual.

Their routers have favourites, as trained ones do, so that a cache has something to keep: one dimension of every
embedding is a constant, large beside what the layers add to it, and each router has random weights there; the rest of
its weights sees the token. A quarter of the experts then gets about four fifths of the choices.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.headers import TensorRange
from ...checkpoint.quantised.layouts import ExpertMatrix, Layout, choose_layout
from ...config.sizes import format_size
from ...errors import CheckpointError
from ...experts import MoELayer, find_experts
from ...files.staging import staging_folder
from .architectures import sizes_of

BLOCK = 16_777_213  # random numbers, repeated; a prime, so that no two experts begin at the same one
SCALE = 0.02
#: Standard deviations over experts of a router's logit: what the constant dimension gives, and what the token gives.
POPULARITY, TASTE = 0.75, 0.9
#: Root mean square of the weights that random codes stand for, with a scale of one.
SIZES = {"mxfp4": 2.93, "int4": 4.64, "fp8": 128.0}
EXPONENT = 120  # 2^(120 - 127) times 2.93 is about the size that is wanted


def default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moe_offload" / "synthetic"


def make_synthetic(name: str, layers: int | None = None, cache: Path | None = None, experts: str | None = None) -> Path:
    """The folder of a checkpoint of architecture `name` with `layers` of its layers (all by default), bf16, random.

    With `experts`, a format, those are quantised. It is written once, into `cache`
    (`~/.cache/moe_offload/synthetic`), and found there afterwards. Raises `ConfigError` for an architecture that is not
    in `ARCHITECTURES`, `UnsupportedModelError` for one that the format has no layout for, `CheckpointError` when the
    disk is too full.
    """
    class_name, sizes = sizes_of(name, layers)
    written = f"{name}_{sizes['num_hidden_layers']}-layers{'_' + experts if experts else ''}_skewed"
    folder = (cache or default_cache()) / written
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staging_folder(folder.parent, folder.name) as partial:
                _write(_skeleton(class_name, sizes), partial, experts)
                partial.rename(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot write the synthetic checkpoint: {error}") from error
    return folder


def _skeleton(class_name: str, sizes: dict[str, Any]) -> Any:
    import transformers

    config = getattr(transformers, class_name)(**sizes, dtype=torch.bfloat16, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _write(model: Any, folder: Path, experts: str | None) -> None:
    """One shard of dense weights and one per layer, never more than a layer in memory."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    moe_layers = find_experts(model)
    codes = {f"{moe.name}.{f.name}" for moe in moe_layers for f in moe.layout.fields if len(f.shape) == 2 and experts}
    need = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in codes)
    groups = list(_groups(model))
    shapes = [
        revert_weight_conversion(model, {name: model.get_parameter(name) for name in names if name in codes})
        for names in groups
    ]
    matrices = {
        key: ExpertMatrix(key, TensorRange(folder, 0, t.nbytes, tuple(t.shape), t.dtype))
        for found in shapes
        for key, t in found.items()
    }
    layout = choose_layout(experts, matrices, str(folder.parent)) if experts else None
    if layout is not None:
        need += sum(entry.nbytes for found in matrices.values() for entry in layout.entries(found))
        model.config.quantization_config = layout.configuration(model, moe_layers)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder.parent}: the checkpoint needs {format_size(need)}, and {format_size(free)} are free; "
            "ask for fewer --layers, or name another folder with --cache"
        )
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(SCALE).bfloat16()
    weight_map: dict[str, str] = {}
    for i, (names, quantised) in enumerate(zip(groups, shapes, strict=True), start=1):
        filled = {name: _fill(model.get_parameter(name), name, numbers) for name in names if name not in codes}
        _give_favourites(model, moe_layers, filled)
        tensors = {k: t.contiguous() for k, t in revert_weight_conversion(model, filled).items()}
        if layout is not None:
            for key in quantised:
                tensors |= _random_codes(layout, matrices[key])
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())  # what is measured later must not compete with writing this
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": need}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)
    model.generation_config.eos_token_id = None
    model.generation_config.save_pretrained(folder)


def _groups(model: Any) -> Iterator[list[str]]:
    names = [name for name, _ in model.named_parameters()]
    inner = {n for n in names if ".layers." in n}
    yield [n for n in names if n not in inner]
    for i in range(model.config.num_hidden_layers):
        yield [n for n in names if f".layers.{i}." in n]


def _fill(param: Tensor, name: str, numbers: Tensor) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(param.shape, dtype=param.dtype)
    filled = torch.empty(param.numel(), dtype=param.dtype)
    begin = zlib.crc32(name.encode())  # no two tensors alike
    for i in range(0, len(filled), BLOCK):
        part = filled[i : i + BLOCK]
        part.copy_(numbers.roll(-(begin % BLOCK))[: len(part)])
        begin += 1
    return filled.view(param.shape)


def _give_favourites(model: Any, moe_layers: Sequence[MoELayer], filled: Mapping[str, Tensor]) -> None:
    """Make dimension 0 a constant that routers, and nothing at the output, listen to. See the head of this file."""
    hidden = model.config.hidden_size
    constant = hidden**0.5 / 2
    seen = constant / (1 + constant**2 / hidden) ** 0.5  # behind a norm
    routers = {(moe.name.rpartition(".")[0], moe.num_experts) for moe in moe_layers}
    for name, values in filled.items():
        if model.get_parameter(name) is model.get_input_embeddings().weight:
            values.div_(SCALE)[:, 0] = constant
        elif model.get_parameter(name) is model.get_output_embeddings().weight:
            values[:, 0] = 0
        elif any(name.startswith(f"{block}.") and values.shape == (experts, hidden) for block, experts in routers):
            values.mul_(TASTE / SCALE / hidden**0.5)
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values[:, 0] = torch.randn(len(values), generator=seed) * (POPULARITY / seen)


def _random_codes(layout: Layout, matrix: ExpertMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix in a checkpoint; no two matrices alike."""
    codes, scales, *shape = layout.entries(matrix)
    generator = torch.Generator().manual_seed(zlib.crc32(matrix.key.encode()))
    raw = torch.randint(-(2**63), 2**63 - 1, (codes.nbytes // 8,), generator=generator).view(torch.uint8)
    if layout.kind == "fp8":
        raw[(raw & 0x7F) == 0x7F] = 0  # which means no number
    fill = EXPONENT if layout.kind == "mxfp4" else SCALE / SIZES[layout.kind]
    found = {
        codes.key: raw.view(codes.dtype).view(codes.shape),
        scales.key: torch.full(scales.shape, fill, dtype=scales.dtype),
    }
    return found | {entry.key: torch.tensor(matrix.shape) for entry in shape}
