"""Which modules of a model hold experts, in which form, and how one expert lies in its row.

    layout.py      a row, and the fields in it
    layer.py       `MoELayer`: the experts of one layer, whatever form they have, and where each parameter is
    table.py       `FORMS`, a function a form: interface.py, modules.py ...
    share.py       which of a layer's experts this process has, where several share them
    none.py        what is said of a model in which none of them finds anything

Recognising is not serving: nothing here changes a model (that is `patch/` and `forward/`), or knows files.
"""

from .interface import is_experts
from .layer import MoELayer, Place
from .layout import FIELD_ALIGN, PLACED, ROW_ALIGN, Begins, Field, PackedWeight, RowCodes, RowLayout, round_up
from .modules import members_of
from .share import Share, local_part
from .table import FORMS, find_experts

__all__ = [
    "FIELD_ALIGN",
    "FORMS",
    "PLACED",
    "ROW_ALIGN",
    "Begins",
    "Field",
    "MoELayer",
    "PackedWeight",
    "Place",
    "RowCodes",
    "RowLayout",
    "Share",
    "find_experts",
    "is_experts",
    "local_part",
    "members_of",
    "round_up",
]
