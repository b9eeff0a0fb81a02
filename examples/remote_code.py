"""A model whose code comes with its folder: its own class, and one expert in memory. python examples/remote_code.py"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where transformers copies such code: not among what you have

import torch

import moe_offload

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class TinyConfig(PretrainedConfig):
    model_type = "tiny_own_moe"
    vocab_size, hidden_size, num_experts, num_experts_per_tok, num_hidden_layers = 256, 64, 16, 2, 1

class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, size), nn.Linear(size, config.vocab_size)
        self.gate = nn.Linear(size, config.num_experts)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(size, 99), nn.SiLU(), nn.Linear(99, size))
                                      for _ in range(config.num_experts)])
        self.post_init()
    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids).cumsum(1)
        weights, ids = self.gate(x).softmax(-1).topk(self.config.num_experts_per_tok)
        out = x.clone()
        for e in ids.unique().tolist():
            *token, choice = torch.where(ids == e)
            out[tuple(token)] += self.experts[e](x[tuple(token)]) * weights[(*token, choice)][:, None]
        return CausalLMOutput(logits=self.head(out))
"""

folder = Path(tempfile.mkdtemp()) / "tiny_own_moe"
folder.mkdir()
(folder / "modeling_tiny.py").write_text(CODE)
sys.path.insert(0, str(folder))
from modeling_tiny import TinyConfig, TinyForCausalLM  # noqa: E402

plain = TinyForCausalLM(TinyConfig()).eval()
plain.save_pretrained(folder)
said = json.loads((folder / "config.json").read_text())
said["auto_map"] = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
(folder / "config.json").write_text(json.dumps(said))

model = moe_offload.from_pretrained(folder, budget="20MB", trust_remote_code=True, profile="off")
prompt = torch.tensor([[7, 21, 42]])
want, got = (one.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for one in (plain, model))
print(f"{model.moe_offload}\ntokens equal: {want.tolist() == got.tolist()}")
