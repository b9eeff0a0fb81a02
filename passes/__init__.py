"""Graph passes that turn the MoE layers of a traced model into expert-cache lookups and streamed loads.

Imports torch and nothing else: what serves the rewritten graph is bound to it at run time (see `ops`).
Reading order: `find` (where experts are read), `slots` (decode), `waves` (prefill), `lookahead`, `instrument`,
`pipeline`.
"""

from .bank import Bank
from .core import Core
from .erase import erase_unserved
from .find import PATTERNS, Site, UnknownUse, Weight, find_sites
from .instrument import instrument
from .lookahead import lookahead
from .pipeline import Pass, Report, observe_pipeline, offload_pipeline, run
from .slots import slots
from .waves import waves

__all__ = [
    "PATTERNS",
    "Bank",
    "Core",
    "Pass",
    "Report",
    "Site",
    "UnknownUse",
    "Weight",
    "erase_unserved",
    "find_sites",
    "instrument",
    "lookahead",
    "observe_pipeline",
    "offload_pipeline",
    "run",
    "slots",
    "waves",
]
