"""What the pages say: links lead somewhere, and each command and program in a fenced block is one that exists.

`tests/whole/test_docs.py` runs them. In a block, `MODEL` stands for a checkpoint; the word `unrun` after the language
says that a program needs something that a test does not have.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from moe_offload.apps.cli import app
from tests.house.test_rooms import ROOMS
from tests.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])
LONGEST_README = 120
LAUNCHERS = {"torchrun", "accelerate"}


class Block(NamedTuple):
    """A fenced block: its language, whether it can be run, and its lines."""

    language: str
    runs: bool
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, "unrun" not in info, text) for language, info, text in found]


def commands(page: Path) -> list[list[str]]:
    """Each command of the page's bash blocks as its words; `a && b` is two."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [command for command in words if command]


def named(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def refuse_unknown(command: list[str]) -> None:
    """Raise unless the command exists and takes these arguments."""
    while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):
        command = command[1:]
    program, *arguments = command
    if program in LAUNCHERS:  # torchrun ... -m moe_offload COMMAND
        words = arguments.index("-m")
        assert arguments[words + 1] == "moe_offload", f"{arguments[words + 1]} is not known here"
        program, arguments = "moe-offload", arguments[words + 2 :]
    if program == "moe-offload":
        found = typer.main.get_command(app)
        context = found.make_context("moe-offload", list(arguments))
        while hasattr(found, "commands"):
            name, found, arguments = found.resolve_command(context, arguments)
            context = found.make_context(name, list(arguments), parent=context)  # reads the flags, runs nothing
    elif program == "python" and arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
    elif program == "python":
        assert arguments[1] in {"pytest", "venv"}, f"python -m {arguments[1]} is not known here"
    elif program == "pip":
        extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        for extra in re.findall(r"[\w]+(?=[\w,]*\]$)", arguments[-1]):
            assert f"\n{extra} = [" in extras, f"there is no extra {extra}"
    else:
        assert program in {"git", "ruff", "mypy", "."}, f"{program} is not known here"


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_to_a_file(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", named([page for page in PAGES if commands(page)]))
def test_commands_exist(page):
    for command in commands(page):
        try:
            refuse_unknown(command)
        except Exception as error:
            pytest.fail(f"{shlex.join(command)}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize(
    "command",
    [
        "moe-offload fly MODEL",
        "moe-offload run MODEL --budgte 8GB",
        "moe-offload profile fly",
        "moe-offload profile diff a.json b.json --fly",
        "python examples/nothing.py",
        "pip install -e .[fly]",
        "fly MODEL",
        "torchrun --nproc-per-node 2 -m moe_offload fly MODEL",
        "torchrun --nproc-per-node 2 -m fly MODEL",
    ],
)
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises(Exception, match=r"[Nn]o such|not known|there is no"):
        refuse_unknown(shlex.split(command))


@pytest.mark.parametrize("page", named(PAGES))
def test_programs_are_python(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []


def test_the_readme_is_short_and_its_test_command_is_that_of_ci():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= LONGEST_README
    tests = next(shlex.join(command) for command in commands(ROOT / "README.md") if "pytest" in command)
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_files_and_names_in_contributing_exist():
    """`plan/budget.py`: `plan_slots` is a file of the package, and defines that name."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file, names in re.findall(r"`((?!utils)[\w/]+\.py)`((?:: `[\w.]+`)?)", text):
        found = [folder / file for folder in (ROOT, ROOT / "moe_offload") if (folder / file).is_file()]
        assert found, f"there is no {file}"
        for name in re.findall(r"\w+", names):
            defined = re.search(rf"^ *(def|class) {name}\b", found[0].read_text(encoding="utf-8"), re.MULTILINE)
            assert defined, f"{file} has no {name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_tables_name_every_room(page):
    folders = [room for room in ROOMS if (ROOT / "moe_offload" / room).is_dir()]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(folders) > 10 and not [room for room in folders if f"{room}/`" not in text]


def test_nothing_is_installed_by_name():
    """Nothing is published, and whoever takes the name on an index would be installed instead."""
    texts = [*ROOT.rglob("*.md"), *ROOT.glob("moe_offload/**/*.py"), *ROOT.glob("passes/*.py")]
    wrong = re.compile(r"moe[-_]offload\[|pip install moe[-_]offload")
    assert [str(text.relative_to(ROOT)) for text in texts if wrong.search(text.read_text(encoding="utf-8"))] == []


def test_no_page_names_a_path_of_the_machine_it_was_written_on():
    assert [
        page.name for page in PAGES if re.search(r"\.\./shared|/work/|/tmp/", page.read_text(encoding="utf-8"))
    ] == []


def test_pages_are_found():
    assert len(PAGES) > 10 and len(commands(ROOT / "README.md")) == 4
