"""What is installed: a wheel in another folder, and a clone whose folder has the package's own name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT

NEEDED = ["pyproject.toml", "README.md", "LICENSE", "moe_offload", "passes"]  # to build what is installed
WHERE = "import moe_offload; print(moe_offload.optimize and moe_offload.__file__)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a build reads, in a folder called moe_offload."""
    folder = tmp_path_factory.mktemp("beside") / "moe_offload"
    folder.mkdir()
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def python(program: str, cwd: Path, site: Path | None = None) -> str:
    """What `program` prints in a fresh interpreter, with `cwd` first on its path, then `site` and what its .pth files
    name, then what we depend on. Installations that this environment has of us are left out."""
    path = f"site.addsitedir({str(site)!r}); " if site is not None else ""
    start = f"import site, sys; {path}sys.path.append({sysconfig.get_path('purelib')!r})\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", start + program],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(clone: Path, kind: str, into: Path) -> Path:
    """The unpacked `kind` ("wheel" or "editable") of `clone`: what an installer would put into site-packages."""
    python(f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})", cwd=clone)
    with zipfile.ZipFile(next(into.glob("*.whl"))) as wheel:
        wheel.extractall(into)
    return into


def test_a_wheel_runs_in_another_folder(clone, tmp_path):
    site = built(clone, "wheel", tmp_path / "site")
    here = tmp_path / "empty"
    here.mkdir()
    help = "import runpy; sys.argv = ['moe-offload', '--help']; runpy.run_module('moe_offload', run_name='__main__')"
    assert "estimate" in python(help, here, site)
    assert python(WHERE, here, site).strip() == str(site / "moe_offload" / "__init__.py")
    metadata = next(site.glob("*.dist-info"))
    assert "moe-offload = moe_offload.__main__:main" in (metadata / "entry_points.txt").read_text()
    assert (metadata / "top_level.txt").read_text().split() == ["moe_offload", "passes"]


def test_a_wheel_has_every_file_of_the_packages(clone, tmp_path):
    site = built(clone, "wheel", tmp_path / "site")
    for package in ("moe_offload", "passes"):
        files = {path.relative_to(clone) for path in (clone / package).rglob("*") if path.is_file()}
        missing = sorted(str(file) for file in files if "__pycache__" not in file.parts and not (site / file).is_file())
        assert missing == []


def test_a_script_beside_a_clone_of_the_same_name_finds_the_package(clone, tmp_path):
    """Python sees the clone's folder first, as a package without code; a later entry of the path that has code wins."""
    site = built(clone, "editable", tmp_path / "site")
    assert python(WHERE, clone.parent, site).strip() == str(clone / "moe_offload" / "__init__.py")
