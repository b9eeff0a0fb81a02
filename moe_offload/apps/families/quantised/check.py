"""One format and one family: a tiny checkpoint in plain transformers and offloaded."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ....api import from_pretrained
from ....checkpoint.outline import outline_folder
from ....config.settings import OffloadConfig
from ....errors import OffloadError
from ....plan.budget import budget_for
from ....plan.weights import layer_shapes, sum_costs
from ..session import run_session
from .kinds import kind_of, write

SETTINGS = OffloadConfig(experts_implementation="grouped_mm", compile="graph", poison=True, kv_tokens=64, wave_rows=1)
SESSIONS: tuple[dict[str, Any], ...] = ({"batch": 1, "prompt": 17}, {"batch": 3, "prompt": 16})
RESIDENCIES = (0.0, 0.5)


@dataclass(frozen=True)
class QuantisedResult:
    """`status`: exact, refused, different, "no layout" (transformers has none) or "not tried" (a package is missing).

    `share` is the bytes of a row by those of the same row in bfloat16.
    """

    format: str
    family: str
    status: str
    reason: str = ""
    method: str = ""
    share: float = 0.0

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def check_quantised(format: str, family: str) -> QuantisedResult:
    """Every weight, and every logit of two prompts and 12 further tokens, at the floor and at half of the experts."""
    kind = kind_of(format, family)
    if kind is None:
        return QuantisedResult(format, family, "no layout")
    method = str(kind.config["quant_method"])
    if kind.needs and importlib.util.find_spec(kind.needs) is None:
        return QuantisedResult(format, family, "not tried", f"the package {kind.needs} is not installed", method)
    with tempfile.TemporaryDirectory() as name:
        folder = write(kind, Path(name) / "model")
        try:
            found = outline_folder(folder)
        except OffloadError as error:
            return QuantisedResult(format, family, "refused", str(error).replace(f"{folder}/", ""), method)
        [share, *_] = [_bytes(moe.layout) / _bytes(moe.unpacked) for moe in found.moe_layers]
        plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
        want = [run_session(plain, "lm", new_tokens=12, **session) for session in SESSIONS]
        state = plain.state_dict()  # after a forward, in which compressed-tensors unpacks dense weights
        for residency in RESIDENCIES:
            held = sum_costs(found.model, found.moe_layers, SETTINGS)
            budget = budget_for(residency, layer_shapes(found.moe_layers), held)
            ours: Any = from_pretrained(folder, budget, device_map="cpu", config=SETTINGS)
            with ours.moe_offload:
                wrong = _difference(ours, want, state)
            if wrong is not None:
                reason = f"{residency:.0%} resident: {wrong}"
                return QuantisedResult(format, family, "different", reason, method, share)
    return QuantisedResult(format, family, "exact", "", method, share)


def _difference(ours: Any, want: list[list[torch.Tensor]], state: dict[str, torch.Tensor]) -> str | None:
    if not all(moe.packed for moe in ours.moe_offload.moe_layers):
        return "its experts are not read as quantised"
    for session, logits in zip(SESSIONS, want, strict=True):
        found_logits = run_session(ours, "lm", new_tokens=12, **session)
        for step, (found, wanted) in enumerate(zip(found_logits, logits, strict=True)):
            if not torch.equal(found, wanted):
                return f"{session}, step {step}: logits differ by {float((found - wanted).abs().max()):.3g}"
    found_state = ours.state_dict()
    return next((f"{key} differs" for key in state if not torch.equal(state[key], found_state[key])), None)


def _bytes(layout: Any) -> int:
    return sum(field.nbytes for field in layout.fields)
