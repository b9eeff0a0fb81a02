"""What runs when the model is called: trace, rewrite, compile, run, and try again when memory was short.

Only `graphs/` imports `passes`. May import runtime and below; never changes the user's model.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import OffloadError

ROOT = Path(__file__).parents[2]  # the folder that holds moe_offload/ and passes/: a clone, or site-packages


def refuse_foreign_passes() -> None:
    """Raise `OffloadError` unless `import passes` gives the package that was installed with this one.

    `passes` is a name that any project may use for a folder of its own, and Python takes the first on the path. Nothing
    is imported here, so whatever the other one is, it does not run.
    """
    spec = find_spec("passes")
    found = None if spec is None else spec.origin or ", ".join(spec.submodule_search_locations or ())
    if found is None or Path(found).parent != ROOT / "passes":
        raise OffloadError(
            f"moe_offload needs the package `passes` that is installed with it in {ROOT}, and `import passes` gives "
            f"{found or 'nothing'}. Rename that one, or put {ROOT} before its folder on the path (PYTHONPATH)"
        )


refuse_foreign_passes()
