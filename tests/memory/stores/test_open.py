"""Experts on the meta device are read from the folder that the configuration names; where it has several, from none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from moe_offload import CheckpointError
from moe_offload.experts import is_experts
from tests.fakes.offloaded import IDS, offload, resident


def without_experts(model, folder: Path, **where):
    """`model`, as if its dense weights were loaded from `folder`."""
    model = copy.deepcopy(model)
    model.config.name_or_path = AutoConfig.from_pretrained(folder, **where).name_or_path
    for module in filter(is_experts, model.modules()):
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(param.detach().to("meta"), requires_grad=False))
    return model


def test_from_the_folder_that_the_configuration_names(tmp_path):
    plain = resident()
    plain.save_pretrained(tmp_path)
    model = offload(without_experts(plain, tmp_path))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model.moe_offload.close()


@pytest.mark.parametrize("where", [{"subfolder": "tuned"}, {"subfolder": "a/b"}, {"variant": "fp16"}])
def test_several_checkpoints_in_one_folder_are_refused(tmp_path, where):
    meant, other = resident(seed=1), resident(seed=0)
    other.save_pretrained(tmp_path)
    meant.save_pretrained(tmp_path / where.get("subfolder", ""), variant=where.get("variant"))
    model = without_experts(meant, tmp_path, **where)
    with pytest.raises(CheckpointError, match=where.get("variant") or where["subfolder"]):
        offload(model)
    assert not hasattr(model, "moe_offload")
