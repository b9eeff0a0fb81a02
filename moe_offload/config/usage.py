"""Where usage is remembered, and under which name: what `profile` says when it names no file.

"auto"                         the workload "default"
"auto:italian", "italian"      a workload of that name
"off"                          nothing is remembered, and the slots start empty
"italian.json", "./italian"    a profile; nothing is remembered
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from .file import default_path

AUTO, OFF = "auto", "off"
DEFAULT_WORKLOAD = "default"
PREFIX = AUTO + ":"
FOLDER_NAME = "profiles"

_WORD = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a name of a file on any system, and no path


def is_workload(name: str) -> bool:
    """Whether a workload may be called so."""
    return _WORD.fullmatch(name) is not None and name not in (AUTO, OFF)


def workload_of(profile: str) -> str | None:
    """The workload whose usage `profile` asks to remember; None where it names a file, or nothing at all."""
    if profile == AUTO:
        return DEFAULT_WORKLOAD
    name = profile.removeprefix(PREFIX)
    return name if is_workload(name) else None


def profile_path(profile: str) -> str | None:
    """The file that `profile` names; None where it names a workload, or nothing at all."""
    return None if profile == OFF or workload_of(profile) is not None else profile


def measured_with(profile: str) -> str:
    """What takes the place of `profile` where something is measured or recorded: that leaves no usage behind, and does
    not depend on what ran before."""
    return profile_path(profile) or OFF


def profile_problem(profile: object) -> str | None:
    """What is wrong with a value of the setting `profile`, in words; None if nothing is."""
    if profile is False:
        return "YAML reads an off without quotes as False: write profile: 'off'"
    if not isinstance(profile, str) or not profile:
        return "it is empty" if profile == "" else "it is no text"
    if profile.startswith(PREFIX) and workload_of(profile) is None:
        return "a workload's name is 1 to 64 letters, digits, - and _, and neither 'auto' nor 'off'"
    return None


def plain_profile(profile: object) -> object:
    """A path as the text that names a file, also where it has but one word: Path("italian") is no workload."""
    if not isinstance(profile, os.PathLike):
        return profile
    text = str(os.fspath(profile))
    return text if profile_path(text) is not None else f"{os.curdir}{os.sep}{text}"


def usage_folder() -> Path | None:
    """`$HF_HOME/moe_offload/profiles`, made if it is not there; None where nothing may be written."""
    folder = default_path().parent / FOLDER_NAME
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None
