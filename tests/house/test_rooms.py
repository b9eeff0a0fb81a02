"""Rooms import one way, files in no circle, and no room is crowded."""

from graphlib import CycleError, TopologicalSorter

import pytest

from tests.house.imports import ROOT, import_graph, modules, room_of

#: Lowest first: a room (a folder, or a file beside the folders) imports from rooms before it in this list, and itself.
ROOMS = "errors files cache config packed experts checkpoint observe memory plan ranks runtime forward handle patch"
ROOMS = [*ROOMS.split(), *"pack quantise record api apps __main__ __init__".split()]
MOST_FILES = 11  # in one folder, its __init__ not counted
GRAPH = import_graph()


def test_no_arrow_runs_up():
    arrows = [(a, b) for a, found in GRAPH.items() for b in found if a.startswith("moe_offload") and b in GRAPH]
    within = [(a, b) for a, b in arrows if not b.startswith("passes") and (room_of(a), b) != ("apps", "moe_offload")]
    up = [f"{a} imports {b}" for a, b in within if ROOMS.index(room_of(b)) > ROOMS.index(room_of(a))]
    assert len(within) > 500 and not up, up


def test_no_circle():
    """Between files, so neither between rooms nor inside one."""
    try:
        TopologicalSorter({module: found & set(GRAPH) for module, found in GRAPH.items()}).prepare()
    except CycleError as circle:
        pytest.fail(f"these import each other: {' -> '.join(circle.args[1])}")


def test_no_room_is_crowded():
    folders = {path.parent for module, path in modules().items() if module.startswith("moe_offload")}
    files = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) - 1 for folder in folders}
    assert not {folder: n for folder, n in files.items() if n > MOST_FILES}
