"""A packed matrix is worth what plain transformers makes of it: every code, every scale, every dtype, bit for bit."""

import pytest
import torch

from moe_offload.errors import CheckpointError
from moe_offload.packed import FORMATS, FP8, MXFP4, Int4
from tests.packed.matrices import CASES, E8M0, case, codes_fp8, fp8, int4, mxfp4, same_bits

WAYS = ["unpack", "unpack_torch"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_plain_transformers(name, dtype, way):
    found = case(name)
    out = torch.full(found.format.shape(found.tensors), 7.0, dtype=dtype)
    getattr(found.format, way)(found.tensors, out)
    assert same_bits(out, found.plain(found.tensors, dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_rows_are_rows_of_the_whole(name, way):
    """Strips of `row_unit` rows, into a matrix with a margin that stays as it was."""
    found = case(name)
    whole = found.plain(found.tensors, torch.bfloat16)
    outputs, inputs = whole.shape
    wide = torch.full((outputs, inputs + 24), 7.0, dtype=torch.bfloat16)
    for begin in range(0, outputs, found.format.row_unit):
        end = min(begin + found.format.row_unit, outputs)
        getattr(found.format, way)(found.format.rows(found.tensors, begin, end), wide[begin:end, :inputs])
    assert same_bits(wide[:, :inputs], whole) and bool((wide[:, inputs:] == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("aligned", [False, True])
def test_turned_it_is_the_transpose(name, dtype, aligned):
    """Into a matrix with a margin that stays as it was, its rows whole cache lines or not."""
    found = case(name)
    whole = found.plain(found.tensors, dtype)
    margin = 32 - whole.shape[0] % 32 + (0 if aligned else 3)
    wide = torch.full((whole.shape[1], whole.shape[0] + margin), 7.0, dtype=dtype)
    found.format.unpack_turned(found.tensors, wide[:, : whole.shape[0]])
    assert same_bits(wide[:, : whole.shape[0]], whole.t()) and bool((wide[:, whole.shape[0] :] == 7.0).all())


@pytest.mark.parametrize("name", CASES)
def test_rows_are_views(name):
    found = case(name)
    for part, tensor in zip(found.format.rows(found.tensors, 0, found.format.row_unit), found.tensors, strict=True):
        assert part.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_a_fit_needs_no_bytes(name):
    found = case(name)
    assert found.format.fit([tensor.to("meta") for tensor in found.tensors]) == found.format
    assert found.format.find_fault(found.tensors) is None


def spoiled(tensor, place, value):
    """A copy with other bytes at one place."""
    copy = tensor.clone()
    copy.view({1: torch.uint8, 2: torch.uint16, 4: torch.float32}[tensor.element_size()])[place] = value
    return copy


@pytest.mark.parametrize(
    ("tensors", "index", "place", "value", "words"),
    [
        (mxfp4(40, 3), 1, (39, 2), 255, "the scale of row 39, group 2 is 255"),
        (fp8(256, 256, torch.ones(2, 2)), 0, (255, 255), 0x7F, "row 255, column 255"),
        (fp8(256, 256, torch.ones(2, 2)), 0, (3, 0), 0xFF, "row 3, column 0"),
        (fp8(256, 256, torch.ones(2, 2)), 1, (1, 1), float("nan"), "[1, 1] is nan"),
        (fp8(256, 256, torch.ones(2, 2)), 1, (0, 1), float("-inf"), "[0, 1] is -inf"),
        (fp8(16, 16, torch.tensor(1.0)), 1, (), float("inf"), "[] is inf"),
        (fp8(64, 64, torch.ones(2, 2, dtype=torch.bfloat16).to(E8M0)), 1, (1, 0), 255, "[1, 0] is"),
        (fp8(64, 64, torch.full((64, 2), 127, dtype=torch.uint8)), 1, (63, 1), 255, "[63, 1] is"),
        (int4(40, 64, 2, torch.float32), 1, (7, 1), float("inf"), "row 7, group 1 is inf"),
        (int4(40, 64, 2, torch.bfloat16), 1, (7, 1), 0x7FC0, "row 7, group 1 is nan"),
    ],
)
def test_what_is_no_number_is_found(tensors, index, place, value, words):
    changed = list(tensors)
    changed[index] = spoiled(tensors[index], place, value)
    kind = MXFP4 if tensors[0].dim() == 3 else Int4 if tensors[0].dtype == torch.int32 else FP8
    assert kind.fit(changed).find_fault(tensors) is None
    assert words in kind.fit(changed).find_fault(changed)


U8, I32, E4 = torch.uint8, torch.int32, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "scale_shape", "scale_dtype"),
    [
        ("mxfp4", (8, 2, 16), U8, (8, 3), U8),
        ("mxfp4", (8, 2, 16), U8, (7, 2), U8),
        ("mxfp4", (8, 2, 16), U8, (8,), U8),
        ("mxfp4", (8, 4, 8), U8, (8, 2), U8),
        ("mxfp4", (8, 30), U8, (8, 2), U8),
        ("mxfp4", (8, 0), U8, (8, 0), U8),
        ("mxfp4", (64,), U8, (4,), U8),
        ("mxfp4", (8, 2, 16), I32, (8, 2), U8),
        ("mxfp4", (8, 2, 16), U8, (8, 2), torch.float32),
        ("fp8", (576, 256), E4, (5, 2), torch.float32),
        ("fp8", (256, 200), E4, (2, 3), torch.float32),
        ("fp8", (256, 256), E4, (256,), torch.float32),
        ("fp8", (256, 256), E4, (0, 2), torch.float32),
        ("fp8", (2, 2, 2), E4, (1,), torch.float32),
        ("fp8", (256, 256), U8, (2, 2), torch.float32),
        ("fp8", (256, 256), E4, (2, 2), I32),
        ("int4", (8, 8), I32, (8, 3), torch.bfloat16),
        ("int4", (8, 8), I32, (7, 2), torch.bfloat16),
        ("int4", (8, 8), I32, (8,), torch.bfloat16),
        ("int4", (8, 8), I32, (8, 16), torch.bfloat16),
        ("int4", (8, 8), I32, (8, 0), torch.bfloat16),
        ("int4", (8, 8), U8, (8, 2), torch.bfloat16),
        ("int4", (8, 8), I32, (8, 2), U8),
    ],
)
def test_what_does_not_belong_together_is_refused(kind, shape, dtype, scale_shape, scale_dtype):
    tensors = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(scale_shape, dtype=scale_dtype, device="meta")
    with pytest.raises(CheckpointError, match=r"codes of .* scale"):
        FORMATS[kind].fit(tensors)


def test_a_scale_goes_for_as_many_rows_as_plain_transformers_gives_it():
    """192 rows and two scales are blocks of 96 there, whatever the format says; here too."""
    tensors = codes_fp8(192, 8), torch.tensor([[1.0], [2.0]])
    assert FP8.fit(tensors).row_unit == 96
