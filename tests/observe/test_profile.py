"""Profiles: what is saved is loaded, and nothing else is, whatever the file."""

from __future__ import annotations

import json
import os
import pickle
import resource
import stat
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.errors import OffloadError, ProfileError
from moe_offload.observe.profile import MAX_BYTES, Fingerprint, Profile, merge_profiles
from moe_offload.runtime.layer import LayerRuntime
from tests.fakes.offloaded import offloaded

SHAPE = {
    "model_type": "tiny_moe",
    "layers": 2,
    "experts": [4, 3],
    "top_k": [2, 1],
    "hidden": 8,
    "inner": [16, 12],
    "dtype": "float32",
}
FINGERPRINT = Fingerprint(**SHAPE)
PROFILE = Profile.of(FINGERPRINT, 10, [[7, 1, 7, 5], [0, 10, 0]], {"prompt": "ciao, è «italian»"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "italian.moeprof.json"


@pytest.fixture
def saved(path):
    """A good profile as a dict, to be spoilt."""
    PROFILE.save(path)
    return json.loads(path.read_text())


def refused(path, *needles):
    with pytest.raises(ProfileError) as error:
        Profile.load(path)
    message = str(error.value)
    assert repr(os.fspath(path)) in message
    assert len(message) < 1500
    for needle in needles:
        assert needle in message, message


# --- what a profile is ------------------------------------------------------------------------------------------------


def test_round_trip(path):
    assert PROFILE.save(path) == path
    assert Profile.load(path) == PROFILE
    assert Profile.load(os.fspath(path)) == PROFILE


def test_created_now_in_utc():
    assert time.strptime(PROFILE.created, "%Y-%m-%dT%H:%M:%SZ")[0] >= 2026


def test_hottest():
    assert PROFILE.hottest(0) == [0, 2, 3, 1]
    assert PROFILE.hottest(1) == [1, 0, 2]
    for layer in (-1, 2):
        with pytest.raises(ProfileError, match="layers 0 to 1"):
            PROFILE.hottest(layer)


@pytest.mark.parametrize(
    ("tokens", "counts", "found"),
    [
        (10, [[7, 1, 7, 5]], "counts of 1 layers for a model of 2"),
        (10, [[7, 1, 7, 5], [0, 10]], "layer 1 has 2 counts for 3 experts"),
        (9, [[7, 1, 7, 5], [0, 10, 0]], "layer 0 counts 20 uses, 9 tokens"),
        (10, [[-1, 1, 7, 5], [0, 10, 0]], "greater than or equal to 0"),
        (2**53 + 1, [[1, 1, 7, 5], [0, 10, 0]], "tokens"),
        (10, [[1.0, 1, 7, 5], [0, 10, 0]], "counts.0.0"),
        (True, [[0, 0, 0, 0], [0, 0, 0]], "tokens"),
    ],
)
def test_counts_that_make_no_profile(tokens, counts, found):
    with pytest.raises(ProfileError, match=found):
        Profile.of(FINGERPRINT, tokens, counts)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 3},
        {"top_k": [5, 1]},
        {"hidden": 2**20 + 1},
        {"top_k": [2]},
        {"inner": [1]},
        {"experts": [4, 0]},
        {"hidden": 0},
    ],
)
def test_a_fingerprint_that_contradicts_itself(changes):
    with pytest.raises(ValueError):
        Fingerprint(**{**SHAPE, **changes})


@pytest.mark.parametrize("changes", [{"top_k": [4, 3]}, {"hidden": 2**20}, {"hidden": 1}])
def test_a_fingerprint_at_its_bounds(changes):
    Fingerprint(**{**SHAPE, **changes})


def test_a_profile_of_just_the_size_that_may_be(path, monkeypatch):
    nbytes = len(PROFILE.save(path).read_bytes())
    monkeypatch.setattr("moe_offload.observe.profile.MAX_BYTES", nbytes)
    assert Profile.load(PROFILE.save(path)) == PROFILE
    monkeypatch.setattr("moe_offload.observe.profile.MAX_BYTES", nbytes - 1)
    with pytest.raises(ProfileError, match=f"{nbytes} bytes, the limit is {nbytes - 1}"):
        PROFILE.save(path)
    refused(path, "limit")


# --- which model it is of ---------------------------------------------------------------------------------------------


def test_check_accepts_the_same_shape():
    PROFILE.check(Fingerprint(**SHAPE))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "other"},
        {"experts": [4, 4]},
        {"top_k": [1, 1]},
        {"hidden": 9},
        {"inner": 16},
        {"dtype": "bfloat16"},
        {"layers": 1, "experts": [4], "top_k": [2], "inner": 16, "dtype": "bfloat16"},
    ],
)
def test_check_lists_everything_that_differs(changes):
    with pytest.raises(ProfileError) as error:
        PROFILE.check(Fingerprint(**{**SHAPE, **changes}))
    for name in SHAPE:
        assert (f"{name} {SHAPE[name]!r} in the profile" in str(error.value)) == (name in changes)


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_adds():
    merged = merge_profiles(
        [PROFILE, PROFILE, Profile.of(FINGERPRINT, 1, [[0, 1, 1, 0], [1, 0, 0]], {"prompt": "other"})]
    )
    assert merged.tokens == 21
    assert merged.counts == [[14, 3, 15, 10], [1, 20, 0]]
    assert merged.meta == {}
    assert merge_profiles([PROFILE]).counts == PROFILE.counts and merge_profiles([PROFILE]).meta == PROFILE.meta


def test_merge_weighs():
    other = Profile.of(FINGERPRINT, 10, [[0, 20, 0, 0], [10, 0, 0]])
    assert merge_profiles([PROFILE, other], [1, 0]).counts == PROFILE.counts
    assert merge_profiles([PROFILE, other], [0.5, 2]).counts == [[3, 40, 3, 2], [20, 5, 0]]
    assert merge_profiles([PROFILE, other], [0.5, 2]).tokens == 25
    assert merge_profiles([PROFILE], [0.25]).tokens == 3, "rounded up: no fewer tokens than the uses allow"


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), min_size=1, max_size=4))
def test_a_merge_is_always_consistent(parts):
    profiles = [Profile.of(FINGERPRINT, n, [[n, n, 0, 0], [0, n, 0]]) for _, n in parts]
    weights = [weight for weight, _ in parts]
    if any(weights):
        merge_profiles(profiles, weights)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")], [1, "x"], [1, None]])
def test_merge_refuses_bad_weights(weights):
    with pytest.raises(ProfileError, match="weights"):
        merge_profiles([PROFILE, PROFILE], weights)


def test_merge_refuses_nothing_and_other_models():
    with pytest.raises(ProfileError, match="at least one"):
        merge_profiles([])
    other = Profile.of(Fingerprint(**{**SHAPE, "hidden": 9}), 0, [[0] * 4, [0] * 3])
    with pytest.raises(ProfileError, match="hidden 9 in the profile, 8"):
        merge_profiles([PROFILE, other])


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"version": 2}, "upgrade moe_offload"),
        ({"version": True}, "upgrade moe_offload"),
        ({"version": 1.0}, "upgrade moe_offload"),
        ({"version": "1"}, "upgrade moe_offload"),
        ({"version": None}, "upgrade moe_offload"),
        ({"format": "other"}, "format"),
        ({"format": None}, "format"),
        ({"created": "yesterday"}, "created"),
        ({"created": "2026-11-23T20:00:00+01:00"}, "created"),
        ({"created": "2026-1-3T20:00:00Z"}, "created"),
        ({"created": "x" * 10**6}, "created"),
        ({"created": 5}, "created"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": "10"}, "tokens"),
        ({"tokens": 10.0}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": 10**400}, "tokens"),
        ({"tokens": 9}, "layer 0 counts 20 uses"),
        ({"counts": None}, "counts"),
        ({"counts": []}, "counts of 0 layers"),
        ({"counts": [[7, 1, 7, 5], [0, 10, 0], [0]]}, "counts of 3 layers"),
        ({"counts": [[7, 1, 7, 5], [0, 10, 0, 0]]}, "layer 1 has 4 counts"),
        ({"counts": [[7, 1, 7, True], [0, 10, 0]]}, "counts.0.3"),
        ({"counts": [[7, 1, 7, 1.5], [0, 10, 0]]}, "counts.0.3"),
        ({"counts": [[7, 1, 7, -5], [0, 10, 0]]}, "counts.0.3"),
        ({"counts": [[7, 1, 7, 2**53 + 1], [0, 10, 0]]}, "counts.0.3"),
        ({"counts": [[7, 1, 7, "5"], [0, 10, 0]]}, "counts.0.3"),
        ({"counts": [[1] * 10**6, [0, 10, 0]]}, "layer 0 has 1000000 counts"),
        ({"counts": [[-1] * 10**6] * 1}, "counts.0.0"),
        ({"meta": {"a": 1}}, "meta.a"),
        ({"meta": {"a": "x" * 257}}, "meta.a"),
        ({"meta": {"k" * 257: "x"}}, "meta"),
        ({"meta": {str(i): "" for i in range(65)}}, "meta"),
        ({"meta": {"a": "\ud800"}}, "meta.a"),
        ({"fingerprint": {**SHAPE, "experts": [True, 3]}}, "fingerprint"),
        ({"fingerprint": {**SHAPE, "experts": [10**9, 3]}}, "fingerprint"),
        ({"fingerprint": {**SHAPE, "layers": 3}}, "fingerprint"),
        ({"fingerprint": {**SHAPE, "module": "os"}}, "fingerprint.module"),
        ({"fingerprint": {}}, "fingerprint.model_type"),
        ({"path": "/etc/passwd"}, "path"),
        ({"x" * 10**6: 1}, "xxx..."),
    ],
)
def test_spoilt_content(path, saved, changes, found):
    path.write_text(json.dumps({**saved, **changes}))
    refused(path, found)


@pytest.mark.parametrize("missing", ["created", "fingerprint", "tokens", "counts"])
def test_a_missing_field(path, saved, missing):
    del saved[missing]
    path.write_text(json.dumps(saved))
    refused(path, missing)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it is empty"),
        (b"null", "profile"),
        (b"[]", "profile"),
        (b"{}", "created"),
        (b'"moe_offload.profile"', "profile"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"\xff\xfe\xfd", "utf-8"),
        (b"{} {}", "Extra data"),
        (b'{"tokens": NaN}', "NaN is not JSON"),
        (b'{"tokens": -Infinity}', "-Infinity is not JSON"),
        (b'{"tokens": 1e999}', "tokens"),
        (b'{"tokens": ' + b"9" * 5000 + b"}", "digit"),
        (b'{"tokens": 1, "tokens": 2}', "'tokens' is there twice"),
        (b'{"meta": {"a": "1", "\\u0061": "2"}}', "'a' is there twice"),
        (b"[" * 10**5, "nested more than 6 deep"),
        (b'{"a":' * 10**5, "nested more than 6 deep"),
        (b'{"a\\"": [[[[[[1]]]]]]}', "nested more than 6 deep"),
        (b"[" * MAX_BYTES, "nested more than 6 deep"),
        (b"PK\x03\x04 a torch file", "never opened"),
        (b" " * (MAX_BYTES + 1), "the limit is"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_no_profile_at_all(path, data, found):
    path.write_bytes(data)
    refused(path, found)


def test_brackets_in_text_are_not_depth(path):
    profile = Profile.of(FINGERPRINT, 10, PROFILE.counts, {"a": '[[[[[[[[{{{{"[[[[\\'})
    profile.save(path)
    assert Profile.load(path) == profile


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_never_opened(path, tmp_path, protocol):
    canary = tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(canary), protocol))
    refused(path)
    assert not canary.exists()


def test_truncation_at_every_byte(path):
    PROFILE.save(path)
    data = path.read_bytes()
    for end in range(len(data) - 1):  # the last byte is the line feed
        path.write_bytes(data[:end])
        refused(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bits(path, changes):
    """Any damage is refused, or leaves a file that is a consistent profile: nothing else comes out of `load`."""
    PROFILE.save(path)
    data = bytearray(path.read_bytes())
    for at, flip in changes:
        data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        profile = Profile.load(path)
    except ProfileError:
        return
    of = profile.fingerprint
    assert [len(layer) for layer in profile.counts] == of.experts
    assert all(sum(layer) <= profile.tokens * k for layer, k in zip(profile.counts, of.top_k, strict=True))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_random_bytes(path, data):
    path.write_bytes(data)
    refused(path)


# --- hostile paths ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_a_fifo_does_not_block(path):
    os.mkfifo(path)
    refused(path, "not a regular file")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_not_read(device):
    refused(device, "not a regular file")


def test_a_folder_a_missing_file_and_an_impossible_name(tmp_path):
    refused(tmp_path, "not a regular file")
    refused(tmp_path / "missing.json", "No such file")
    refused("nul\x00.json", "null byte")


@pytest.mark.timeout(20)
def test_a_huge_sparse_file(path):
    with path.open("wb") as file:
        file.truncate(2**30)
    refused(path, "1073741824 bytes")


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_file_descriptor_is_lost(path, tmp_path):
    path.write_bytes(b"nonsense")
    before = open_descriptors()
    for _ in range(20):
        for bad in (path, tmp_path, tmp_path / "missing.json"):
            refused(bad)
        PROFILE.save(tmp_path / "good.json")
    assert open_descriptors() == before


# --- saving -----------------------------------------------------------------------------------------------------------


def temporaries(folder):
    return list(folder.glob(".moe_offload-*"))


def test_saved_for_the_owner_only(path):
    PROFILE.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert temporaries(path.parent) == []


def test_a_symlink_is_replaced_not_followed(path, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path.symlink_to(precious)
    PROFILE.save(path)
    assert precious.read_text() == "precious"
    assert not path.is_symlink() and Profile.load(path) == PROFILE


def test_a_dangling_symlink_is_replaced(path):
    path.symlink_to("nowhere")
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE


def test_a_device_is_not_replaced(path):
    # The device itself is not put at risk by this test: a link to it is refused for the same reason.
    path.symlink_to("/dev/full")
    with pytest.raises(ProfileError, match="other than a regular file"):
        PROFILE.save(path)
    assert path.is_symlink()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ProfileError, match=r"No such file or directory \(errno 2\)"):
        PROFILE.save(tmp_path / "missing" / "p.json")


def test_a_write_that_fails_leaves_the_old_file(path):
    """A full disk, played by the limit on the size of a file."""
    PROFILE.save(path)
    larger = Profile.of(FINGERPRINT, 10, PROFILE.counts, {str(i): "x" * 256 for i in range(64)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OffloadError, match=r"File too large \(errno 27\).*unchanged"):
            larger.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Profile.load(path) == PROFILE
    assert temporaries(path.parent) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file(path, monkeypatch, step, failure):
    PROFILE.save(path)

    def fail(*args):
        raise failure

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ProfileError):
        merge_profiles([PROFILE, PROFILE]).save(path)
    assert Profile.load(path) == PROFILE
    assert temporaries(path.parent) == []


def test_only_stale_temporaries_are_swept(path):
    old, new = path.parent / ".moe_offload-old.tmp", path.parent / ".moe_offload-new.tmp"
    for file in (old, new):
        file.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    PROFILE.save(path)
    assert temporaries(path.parent) == [new]


def test_what_could_not_be_loaded_is_not_saved(path):
    experts = 2**20
    shape = Fingerprint(**{**SHAPE, "experts": [experts, experts]})
    with pytest.raises(ProfileError, match="the limit is"):
        Profile.of(shape, 0, [[0] * experts] * 2).save(path)
    assert not path.exists()


def test_a_profile_taken_while_another_thread_runs_the_model_is_one_moment_s(monkeypatch):
    """Tokens that were read before the uses allow fewer of them, so between the two nothing may be counted."""
    model = offloaded(layers=2)
    real = LayerRuntime.counters.fget

    def counters(layer):
        found = real(layer)
        snapshot = found.snapshot()
        layer.cache.counters.count_event({0: 100, 1: 100}, 100)  # what the other thread has done meanwhile
        return snapshot

    monkeypatch.setattr(LayerRuntime, "counters", property(counters))
    for _ in range(3):
        model.moe_offload.profile()
    model.moe_offload.close()
