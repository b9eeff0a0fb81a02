"""Graph passes that turn the MoE layers of a traced model into expert-cache lookups and streamed loads.

Imports torch and nothing else: what serves the rewritten graph is bound to it at run time (see `ops`).
Reading order: `find` (where experts are read), `slots` (decode), `waves` (prefill), `lookahead`, `instrument`,
`pipeline`.
"""

from .bank import Bank
from .core import Core
from .erase import erase_unserved
from .find import PATTERNS, Site, UnknownUse, Weight, find_sites
from .instrument import insert_observe
from .lookahead import insert_prefetch
from .pipeline import Pass, Report, observe_pipeline, offload_pipeline, run_passes
from .slots import rename_to_slots
from .waves import stream_in_waves

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
    "insert_observe",
    "insert_prefetch",
    "observe_pipeline",
    "offload_pipeline",
    "rename_to_slots",
    "run_passes",
    "stream_in_waves",
]
