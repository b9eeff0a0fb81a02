"""Where things lie that tests read: the repository, the bundled model, recorded traces beside a checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "polyglot-tiny"
MODEL_NAME = str(MODEL)  # as it is typed, and as it stands among the words of a command
TRACES = ROOT.parent / "shared" / "traces"  # not in the repository: who reads them skips where they are not
