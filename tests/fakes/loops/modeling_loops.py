"""One small decoder, and each way in which foreign code goes through a list of experts. `config.loop` says which.

Written for these tests: what is like published modelings is the form of the loop, nothing else.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_loops import LoopsConfig


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    """Ids and weights, as DeepSeek's gates give them."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.num_local_experts, config.hidden_size))
        self.k = config.num_experts_per_tok

    def forward(self, x):
        weights, ids = functional.linear(x, self.weight).softmax(-1).topk(self.k, -1)
        return ids, weights


class Block(nn.Module):
    """`[B, T, H] -> [B, T, H]`; subclasses say how the experts are gone through."""

    def __init__(self, config):
        super().__init__()
        self.gate = Gate(config)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_local_experts)])

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        ids, weights = self.gate(x)
        return self.run(x, ids, weights.to(x.dtype)).view(hidden.shape)


class Hits(Block):
    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = functional.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        for e in mask.sum((-1, -2)).nonzero().flatten():
            choice, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, choice, None])
        return out


class Sorted(Block):
    """Tokens in the order of their experts, in runs whose lengths go through numpy."""

    def run(self, x, ids, weights):
        order = ids.flatten().argsort(stable=True)
        lengths = torch.bincount(ids.flatten(), minlength=len(self.experts)).cpu().numpy()
        parts = x[order // ids.shape[1]].split(lengths.tolist())
        done = [self.experts[e](part) for e, part in enumerate(parts) if lengths[e]]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return (torch.cat(done)[back].view(*ids.shape, -1) * weights[..., None]).sum(1)


class OneHot(Block):
    """Every expert is called, those of no token with an input without rows."""

    def __init__(self, config):
        super().__init__(config)
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            out[token] += expert(x[token]) * weights[token, choice, None].to(x.dtype)
        return out.view(hidden.shape)


class Capacity(Block):
    """Every expert gets as many rows, most of them zero."""

    def run(self, x, ids, weights):
        capacity = len(x)
        dispatch = torch.zeros(len(self.experts), capacity, len(x), dtype=x.dtype)
        combine = torch.zeros_like(dispatch)
        taken = [0] * len(self.experts)
        for token in range(len(x)):
            for choice in range(ids.shape[1]):
                e = int(ids[token, choice])
                dispatch[e, taken[e], token] = 1
                combine[e, taken[e], token] = weights[token, choice]
                taken[e] += 1
        inputs = torch.einsum("ect,th->ech", dispatch, x)
        outputs = torch.stack([expert(inputs[e]) for e, expert in enumerate(self.experts)])
        return torch.einsum("ect,ech->th", combine, outputs)


class Identities(Hits):
    """Two of the experts do nothing, and have no weights."""

    def __init__(self, config):
        super().__init__(config)
        self.experts[1] = nn.Identity()
        self.experts.append(nn.Identity())
        self.gate.weight = nn.Parameter(torch.randn(len(self.experts), config.hidden_size))


class Shared(Hits):
    def __init__(self, config):
        super().__init__(config)
        self.shared_experts = Expert(config)

    def forward(self, hidden):
        return super().forward(hidden) + self.shared_experts(hidden)


class Named(nn.ModuleDict):
    def __init__(self, config):
        super().__init__({f"expert_{e}": Expert(config) for e in range(config.num_local_experts)})

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, self[f"expert_{e}"](x[token]) * weights[token, choice, None])
        return out


class Dict(Block):
    def __init__(self, config):
        super().__init__(config)
        self.experts = Named(config)

    def run(self, x, ids, weights):
        return self.experts(x, ids, weights)


LOOPS = {
    "hits": Hits,
    "sorted": Sorted,
    "one_hot": OneHot,
    "capacity": Capacity,
    "identities": Identities,
    "shared": Shared,
    "dict": Dict,
    "tied": Hits,
}


class Rotary(nn.Module):
    """Its frequencies are in no checkpoint: they are made where the module is."""

    def __init__(self, dim):
        super().__init__()
        frequencies = 1.0 / (100.0 ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x, positions):
        angles = (positions[..., None].float() * self.inv_freq).repeat(1, 1, 2)[:, None]
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.heads, self.index = config.num_attention_heads, index
        size = config.hidden_size
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.rotary = Rotary(size // self.heads)

    def forward(self, x, positions, cache):
        b, t, h = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        past = k.shape[2] - t
        mask = torch.ones(t, k.shape[2], dtype=torch.bool).tril(past)
        return self.out(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, t, h))


class DecoderLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.self_attn = Attention(config, index)
        self.mlp = LOOPS[config.loop](config)

    def forward(self, x, positions, cache):
        x = x + self.self_attn(self.norm1(x), positions, cache)
        return x + self.mlp(self.norm2(x))


class LoopsPreTrainedModel(PreTrainedModel):
    config_class = LoopsConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.3)


class LoopsModel(LoopsPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        if config.loop == "tied":
            for layer in self.layers[1:]:
                layer.mlp.experts = self.layers[0].mlp.experts
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, past_key_values=None):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past, past + input_ids.shape[1])[None]
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, positions, past_key_values)
        return self.norm(x)


class LoopsForCausalLM(LoopsPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LoopsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, use_cache=True, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden = self.model(input_ids, past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=past_key_values)
