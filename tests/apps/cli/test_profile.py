"""moe-offload profile record, inspect, merge, diff, as a person types them."""

from __future__ import annotations

import json
import threading

import pytest
from typer.testing import CliRunner

from moe_offload import Trace
from moe_offload.apps.cli import app
from moe_offload.files import whole_file
from moe_offload.observe.profile import Profile
from tests.paths import MODEL

TEXT = "ls elenca i file di una cartella. cp copia i file. " * 20


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """Recorded with and without offload: the same text, so the same counts; and another text."""
    folder = tmp_path_factory.mktemp("profiles")
    (folder / "it.txt").write_text(TEXT, encoding="utf-8")
    (folder / "en.txt").write_text("ls lists the files of a directory. cp copies files. " * 20, encoding="utf-8")
    made = {}
    for name, text, more in [
        ("plain", "it", ["--meta", "language=it"]),
        ("offloaded", "it", ["--budget", "6MB"]),
        ("english", "en", ["--max-tokens", "100"]),
    ]:
        made[name] = folder / f"{name}.json"
        done = run("record", MODEL, folder / f"{text}.txt", "--out", made[name], *more)
        assert done.exit_code == 0 and "saved to" in done.stdout, done.output
    return made


def test_record(profiles):
    plain, offloaded, english = (Profile.load(profiles[name]) for name in ("plain", "offloaded", "english"))
    assert plain.counts == offloaded.counts and plain.tokens == offloaded.tokens > 200
    assert plain.meta == {"language": "it"} and english.tokens == 100
    assert all(sum(layer) == plain.tokens * 4 for layer in plain.counts)


def test_record_of_several_texts(profiles, tmp_path):
    folder, out = profiles["plain"].parent, tmp_path / "both.json"
    done = run("record", MODEL, folder / "it.txt", folder / "en.txt", "--out", out)
    assert done.exit_code == 0 and Profile.load(out).tokens > Profile.load(profiles["plain"]).tokens, done.output


def test_inspect(profiles, tmp_path):
    done = run("inspect", profiles["plain"])
    assert done.exit_code == 0 and "top 25%" in done.stdout and "language: it" in done.stdout, done.output
    assert "pinned" not in done.stdout
    done = run("inspect", profiles["plain"], "--residency", "25%", "--json")
    found = json.loads(done.stdout)
    assert found["slots"] == [16] * 4 and 0.25 < found["pinned"] <= 1 and len(found["layers"]) == 4
    planned = run("inspect", profiles["plain"], "--model", MODEL, "--budget", "6MB")
    assert planned.exit_code == 0 and "slots a layer" in planned.stdout, planned.output
    trace = Trace.of([[[t % 5, 10 + t % 3, 20, 30]] * 4 for t in range(80)], num_experts=[64] * 4)
    path = trace.save(tmp_path / "t.npz")
    done = run("inspect", profiles["plain"], "--residency", "25%", "--trace", path)
    assert "from an empty cache" in done.stdout and "pre-warmed" in done.stdout, done.output


def test_merge_and_diff(profiles, tmp_path):
    out = tmp_path / "both.json"
    done = run("merge", profiles["plain"], profiles["english"], "--weights", "1,2", "--out", out)
    assert done.exit_code == 0, done.output
    a, b, both = (Profile.load(p) for p in (profiles["plain"], profiles["english"], out))
    assert both.counts[0][3] == a.counts[0][3] + 2 * b.counts[0][3] and both.tokens == a.tokens + 200
    same, other = (json.loads(run("diff", profiles["plain"], p, "--json").stdout) for p in (profiles["plain"], out))
    assert same["mean"] == 0 < other["mean"] < 1
    done = run("diff", profiles["plain"], profiles["english"])
    assert done.exit_code == 0 and "mean" in done.stdout and "0.000" not in done.stdout


def test_wrong_requests_are_one_line(profiles, tmp_path):
    plain = profiles["plain"]
    spoilt = json.loads(plain.read_text())
    spoilt["fingerprint"]["hidden"] += 1
    (tmp_path / "other.json").write_text(json.dumps(spoilt))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "out.json"
    for arguments, code, words in [
        (["inspect", tmp_path / "no.json"], 6, "No such file"),
        (["inspect", plain, "--residency", "0%"], 2, "no share"),
        (["inspect", plain, "--budget", "6MB"], 2, "together with --model"),
        (["inspect", plain, "--trace", "t.npz"], 2, "slots"),
        (["diff", plain, tmp_path / "other.json"], 6, "another model"),
        (["merge", plain, tmp_path / "other.json", "--out", out], 6, "another model"),
        (["merge", plain, plain, "--weights", "1", "--out", out], 6, "1 weights for 2"),
        (["merge", plain, plain, "--weights", "1,-1", "--out", out], 6, "none negative"),
        (["merge", plain, plain, "--weights", "1,nan", "--out", out], 6, "finite"),
        (["merge", plain, plain, "--weights", "1,x", "--out", out], 2, "one number"),
        (["merge", plain, "--out", tmp_path / "no" / "m.json"], 2, "does not exist"),
        (["record", MODEL, tmp_path / "no.txt", "--out", out], 6, "cannot be read"),
        (["record", MODEL, tmp_path / "bad.txt", "--out", out], 6, "UTF-8"),
        (["record", MODEL, tmp_path / "empty.txt", "--out", out], 6, "no text"),
        (["record", MODEL, tmp_path / "bad.txt", "--out", tmp_path / "no" / "p.json"], 2, "does not exist"),
        (["record", MODEL, tmp_path / "bad.txt", "--out", out, "--meta", "x"], 2, "key=value"),
        (["record", tmp_path / "nothing", tmp_path / "other.json", "--out", out], 4, "nothing"),
    ]:
        done = run(*arguments)
        assert done.exit_code == code and words in done.stderr, (arguments, done.output)
        assert len(done.stderr.strip().splitlines()) == 1 and not out.exists()


def test_a_full_disk_leaves_the_old_profile(profiles, tmp_path, monkeypatch):
    out = tmp_path / "it.json"
    assert run("merge", profiles["plain"], "--out", out).exit_code == 0
    before = out.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_file.os, "fsync", full)
    done = run("merge", profiles["english"], "--out", out)
    assert done.exit_code == 6 and "No space left" in done.stderr
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["it.json"]


def test_two_at_once_leave_one_whole_file(profiles, tmp_path):
    a, b, out = Profile.load(profiles["plain"]), Profile.load(profiles["english"]), tmp_path / "p.json"

    def save(profile):
        for _ in range(60):
            profile.save(out)

    a.save(out)
    threads = [threading.Thread(target=save, args=(p,)) for p in (a, b)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert Profile.load(out).counts in (a.counts, b.counts)
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
