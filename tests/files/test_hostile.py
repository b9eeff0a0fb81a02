"""Files made to do harm: whatever is in them, one typed error, in the memory and time of a small file."""

from __future__ import annotations

import io
import os
import random
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from moe_offload.config import file as config_file
from moe_offload.errors import ConfigError, TraceError
from moe_offload.observe.trace import Trace
from tests.paths import ROOT

IDS = np.random.default_rng(0).permuted(np.tile(np.arange(8), (40, 3, 1)), axis=2)[..., :2]

YAML = [
    "budget: !!int ''", "budget: !!float ''", "budget: !!bool xyz", "budget: !!timestamp abc", "a: !!binary x",
    "a: !!set {b}", "a: 2001-99-99", "a: 0b_", "a: 0x_", "a: -0_", "a: 1:99:99", "a: .", "a: =", "<<: [a]", "? []\n: a",
    "a: !!python/object:os.system x", "a: 1e999999999", "a: 9999-12-31T23:59:59-99:99",
]  # fmt: skip


@pytest.mark.parametrize("text", YAML)
def test_yaml_that_only_looks_like_something(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    try:
        config_file.read_settings(tmp_path / "c.yaml")
    except ConfigError as error:
        assert "c.yaml" in str(error)


def member(name: str, data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def npy(head: str, data: bytes = b"") -> bytes:
    text = head.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


HEADERS = [
    "{'descr': (", "{[]: 1}", "{1: 2}", "{'descr': '<i8', 'fortran_order': False, 'shape': (True,1,1), }", " {",
    "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1,), }", "{'descr': 'V9', 'fortran_order': False, "
    "'shape': (1,), }", "{'descr': '<i3', 'fortran_order': False, 'shape': (1,), }", "\n    x", "'" * 60, "(" * 110,
    "{'descr': '<i8', 'fortran_order': False, 'shape': (1_0,), }",
    "{'descr': '<f1', 'fortran_order': False, 'shape': (), }",
]  # fmt: skip


@pytest.mark.parametrize("head", HEADERS)
def test_a_header_that_is_none(head, tmp_path):
    (tmp_path / "t.npz").write_bytes(member("experts.npy", npy(head, bytes(8))))
    with pytest.raises(TraceError, match="cannot be used"):
        Trace.load(tmp_path / "t.npz")


def test_members_packed_by_another_method(tmp_path):
    array = npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1,1,1), }", bytes(8))
    data = bytearray(member("experts.npy", array, zipfile.ZIP_LZMA))
    for at in range(40, 90):
        data[at] ^= 0x55
        (tmp_path / "t.npz").write_bytes(data)
        with pytest.raises(TraceError, match="cannot be used"):
            Trace.load(tmp_path / "t.npz")


BOMBS = """
import resource, sys, time
from moe_offload.observe.trace import Trace
from moe_offload.errors import TraceError
before = resource.getrusage(resource.RUSAGE_SELF)
try:
    Trace.load(sys.argv[1])
    print("loaded")
except TraceError as error:
    print(error)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_maxrss - before.ru_maxrss, after.ru_utime - before.ru_utime)
"""


@pytest.mark.parametrize("shape", [(2**28, 1, 1), (1, 2**22, 1), (1, 1, 2**22), (2**26, 1, 1)], ids=str)
def test_a_small_file_takes_little(shape, tmp_path):
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("experts.npy", "w") as file:
        file.write(npy(f"{{'descr': '|i1', 'fortran_order': False, 'shape': {shape}, }}"))
        for _ in range(max(1, int(np.prod(shape)) >> 22)):
            file.write(bytes(min(int(np.prod(shape)), 1 << 22)))
    assert path.stat().st_size < 1_200_000
    done = subprocess.run([sys.executable, "-c", BOMBS, path], cwd=ROOT, capture_output=True, text=True, check=True)
    said, used = done.stdout.strip().splitlines()
    grown_kib, user_s = map(float, used.split())
    assert "cannot be used" in said and grown_kib < 200 * 1024 and user_s < 20, done.stdout


@pytest.mark.parametrize("changes", [1, 4, 40])
def test_whatever_the_damage_one_kind_of_error(changes, tmp_path):
    """A damaged file is refused, or what is read from it is a trace."""
    good = tmp_path / "good.npz"
    Trace.of(IDS, [0, 20], weights_TLK=np.full(IDS.shape, 0.5, np.float16), meta={"a": "b"}).save(good)
    stored = io.BytesIO()
    np.savez(stored, experts=IDS, request_start=np.array([0, 20]))
    rand, path = random.Random(changes), tmp_path / "t.npz"
    for original in (good.read_bytes(), stored.getvalue()):
        for _ in range(int(os.environ.get("FUZZ_FILES", "150"))):
            data = bytearray(original)
            for _ in range(rand.randint(1, changes)):
                kind, at = rand.randrange(4), rand.randrange(len(data))
                if kind < 2:
                    data[at] ^= 1 << rand.randrange(8)
                elif kind == 2:
                    data[at : at + rand.randrange(9)] = rand.randbytes(rand.randrange(9))
                else:
                    data[at : at + 4] = rand.choice([0, 1, 2**31 - 1, 2**32 - 1]).to_bytes(4, "little")
            path.write_bytes(data[: rand.randrange(len(data))] if rand.random() < 0.1 else data)
            try:
                Trace.load(path)
            except TraceError as error:
                assert str(path) in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


def test_yaml_whatever_the_damage(tmp_path):
    rand, path = random.Random(0), tmp_path / "c.yaml"
    original = b"budget: 8GB\ndevice_map: {\"\": cpu, 'model.*.experts': disk}\npolicy: lru\nkv_tokens: 0x1F\n"
    pieces = b"!!int |!!float |&a |*a|[|{|? |- |<<: |0b|_|-1:9|'|>|\t|:|#|%|@".split(b"|")
    for _ in range(int(os.environ.get("FUZZ_FILES", "300"))):
        data = bytearray(original)
        for _ in range(rand.randint(1, 6)):
            at = rand.randrange(len(data))
            data[at : at + rand.randrange(5)] = rand.choice(pieces)
        path.write_bytes(data)
        try:
            config_file.read_settings(path)
        except ConfigError as error:
            assert "c.yaml" in str(error)
