"""A store of few bytes whose every part a test can hold up, or let fail."""

from __future__ import annotations

from moe_offload.memory.stores.row_read import RowRead

ROW = 64
PARTS = 4
NOTHING = (0, 0, 0, 0)


class ScriptedStore:
    """Expert e is ROW bytes of e, read in PARTS parts. `on_part(expert, part)` comes before each; `log` has them."""

    def __init__(self, on_part=lambda expert, part: None):
        self.on_part, self.log = on_part, []

    def begin(self, layer, expert, row):
        size = ROW // PARTS

        def fill(part):
            self.log.append((expert, part))
            self.on_part(expert, part)
            row[part * size : (part + 1) * size] = bytes([expert]) * size

        return RowRead([lambda p=p: fill(p) for p in range(PARTS)], lambda: ROW)


def row():
    return memoryview(bytearray(b"\xff" * ROW))
