"""Graph passes that turn the MoE layers of a traced model into expert-cache lookups and streamed loads.

Imports torch and nothing else: what serves the rewritten graph is bound to it at run time (see `ops`).

    find        where a graph reads stacked expert weights
    sentinels   drop_sentinels    the guards against ids that mean "not mine" go
    lookahead   insert_prefetch   the next layer's router is asked early
    slots       rename_to_slots   decode: W[ids] becomes bank[slots]
    ahead       load_ahead        where the device decides, it loads what was guessed beside this layer
    unsorted    leave_unsorted    few pairs on a GPU: their sort goes
    gated       gate_in_products  few pairs on a GPU: gate and up become one product
    top         choose_with_slots where the device decides, it chooses the experts as well
    fast        speed_up_products few pairs, where asked for: kernels that may round otherwise
    waves       stream_in_waves   prefill: the experts code becomes one `stream` op
    masked      one product over all experts, most of them handed zeros: a core of those that are not
    core_graph  the experts code of a site, found and copied out for `waves`; core: as it is called
    packed      unpack_reads      weights that lie packed in a row are unpacked by what reads them
    instrument  insert_observe    count ids, change nothing else
    row_wise    whether an experts code may run in pieces
    pipeline    which of them run, in which order

Each pass is a plain function `(graph, *, sites, ...) -> sites it rewrote`: what `find` has found comes in, the graph is
changed in place. Its module shows the graph before and after.
"""

from .ahead import load_ahead
from .bank import Bank
from .core import Core
from .erase import erase_unserved
from .fast import speed_up_products
from .find import PATTERNS, find_sites
from .gated import gate_in_products
from .instrument import insert_observe
from .lookahead import insert_prefetch
from .pipeline import Pass, Report, observe_pipeline, offload_pipeline, run_passes
from .sites import Site, UnknownUse, Weight
from .slots import rename_to_slots
from .top import choose_with_slots
from .unsorted import leave_unsorted
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
    "choose_with_slots",
    "erase_unserved",
    "find_sites",
    "gate_in_products",
    "insert_observe",
    "insert_prefetch",
    "leave_unsorted",
    "load_ahead",
    "observe_pipeline",
    "offload_pipeline",
    "rename_to_slots",
    "run_passes",
    "speed_up_products",
    "stream_in_waves",
]
