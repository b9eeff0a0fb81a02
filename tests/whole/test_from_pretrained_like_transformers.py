"""from_pretrained serves the weights, class, dtype and defaults that plain transformers would, or refuses by name.

`state_dict()` of an offloaded model gives its real rows, so weights are compared without computing anything.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import moe_offload
from moe_offload.apps.families.tiny import build
from moe_offload.checkpoint import headers
from tests.fakes.peft_of_transformers import need_peft_of_transformers

BUDGET = "20MB"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    build("qwen3_moe", seed=0, num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m"))


@pytest.fixture(scope="module")
def other():
    """Another model of the same shape."""
    return build("qwen3_moe", seed=7, num_hidden_layers=1)


def edit(file: Path, **changes) -> None:
    said = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def rewrite(folder: Path, change) -> dict[str, torch.Tensor]:
    """`change` the tensors of the folder's one file; returns what it holds now."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "not.used"}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def assert_same(folder: Path, **kwargs):
    """Weights bit for bit, class, configuration, generation defaults and mode; returns both models."""
    want = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    got = moe_offload.from_pretrained(folder, BUDGET, **kwargs)
    assert type(got) is type(want) and got.training == want.training and got.dtype == want.dtype
    state, real = want.state_dict(), got.state_dict()
    assert set(state) == set(real)
    for key, tensor in state.items():
        assert real[key].dtype == tensor.dtype and torch.equal(real[key], tensor), key
    assert got.config.to_dict() == want.config.to_dict()
    assert got.config.name_or_path == want.config.name_or_path
    assert got.config._attn_implementation == want.config._attn_implementation
    if want.can_generate():
        assert got.generation_config.to_dict() == want.generation_config.to_dict()
        assert got.generation_config._from_model_config == want.generation_config._from_model_config
    got.moe_offload.close()
    return want, got


def test_subfolder(folder, other):
    other.save_pretrained(folder / "checkpoint-500" / "inner")
    assert_same(folder, subfolder="checkpoint-500/inner")
    (folder / "config.json").unlink()
    assert_same(folder, subfolder="checkpoint-500/inner")
    with pytest.raises(moe_offload.CheckpointError, match=r"no config\.json"):
        moe_offload.from_pretrained(folder, BUDGET)


@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "shards"])
def test_variant(folder, other, shard):
    other.save_pretrained(folder, variant="fp16", max_shard_size=shard)
    assert_same(folder, variant="fp16")
    assert_same(folder)
    with pytest.raises(moe_offload.CheckpointError, match=r"expected model\.fp8\.safetensors"):
        moe_offload.from_pretrained(folder, BUDGET, variant="fp8")


@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "shards"])
def test_transformers_weights(folder, other, shard):
    other.save_pretrained(folder, variant="x", max_shard_size=shard)
    name = "model.x.safetensors" if shard == "1GB" else "other.safetensors.index.json"
    if shard != "1GB":
        (folder / "model.safetensors.index.x.json").rename(folder / name)
    edit(folder / "config.json", transformers_weights=name)
    assert_same(folder)
    assert moe_offload.make_plan(folder, BUDGET).slots
    edit(folder / "config.json", transformers_weights="../m/model.safetensors")
    with pytest.raises(moe_offload.CheckpointError, match="not a name inside"):
        moe_offload.from_pretrained(folder, BUDGET)
    edit(folder / "config.json", transformers_weights="weights.bin")
    with pytest.raises(moe_offload.CheckpointError, match=r"weights\.bin.*neither"):
        moe_offload.make_plan(folder, BUDGET)


@pytest.mark.parametrize(
    "said",
    [
        {"torch_dtype": torch.bfloat16},
        {"torch_dtype": "float16"},
        {"dtype": "bfloat16", "torch_dtype": "float32"},
        {"dtype": {"": torch.bfloat16}},
        {"dtype": "auto"},
    ],
    ids=str,
)
def test_dtype(original, said):
    assert_same(original, **said)


def test_dtype_where_the_configuration_says_none(folder, tmp_path):
    edit(folder / "config.json", dtype=None)
    assert_same(folder)
    rewrite(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert_same(folder)
    mixed = rewrite(folder, lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].half()}))
    assert_same(folder)
    halves = {name: sorted(mixed)[i::2] for i, name in enumerate(("a.safetensors", "b.safetensors"))}
    for name, keys in halves.items():
        save_file({key: mixed[key] for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"dtype": "float32"}, "weight_map": {k: n for n, keys in halves.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(folder)


def test_parameters_that_stay_in_float32_are_planned_for(tmp_path):
    """deepseek_v3 keeps its router's correction in float32 whatever the dtype."""
    build("deepseek_v3").save_pretrained(tmp_path)
    planned = moe_offload.make_plan(tmp_path, BUDGET, dtype="bfloat16").costs.dense_bytes
    model = moe_offload.from_pretrained(tmp_path, BUDGET, dtype="bfloat16")
    kept = [p.dtype for name, p in model.named_parameters() if "e_score" in name]
    moe_layers = {id(p) for moe in model.moe_offload.moe_layers for p in moe.params.values()}
    tensors = [*model.parameters(), *model.buffers()]
    assert planned == sum(t.numel() * t.element_size() for t in tensors if id(t) not in moe_layers)
    assert model.moe_offload.plan.costs.dense_bytes == planned and kept is not None


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "argument"])
def test_generation_defaults(folder, where):
    said = {"max_length": 77, "temperature": 0.3, "do_sample": True}
    if where == "argument":
        assert_same(folder, generation_config=GenerationConfig(**said))
        return
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / where, **said) if where == "config.json" else (folder / where).write_text(json.dumps(said))
    want, _ = assert_same(folder)
    assert want.generation_config.max_length == 77


@pytest.mark.parametrize(
    "said",
    [
        {"num_experts_per_tok": 1},
        {"output_router_logits": True, "use_cache": False},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"attn_implementation": "eager"},
        {"num_labels": 3},
    ],
    ids=lambda said: next(iter(said)),
)
def test_configuration_overrides(original, said):
    assert_same(original, **said)


def test_an_override_is_planned_with(original):
    model = moe_offload.from_pretrained(original, BUDGET, num_experts_per_tok=1)
    assert {layer.least for layer in model.moe_offload.plan.layers} == {1}
    with pytest.raises(moe_offload.ConfigError, match=r"num_expert_per_tok=.*neither a parameter nor a field"):
        moe_offload.from_pretrained(original, BUDGET, num_expert_per_tok=1)


def test_what_transformers_cannot_build_is_refused_in_its_words(original, folder, monkeypatch):
    """Where a package is missing, or a part that the model does not have."""
    with pytest.raises(moe_offload.ConfigError, match="'flash_attention_2': transformers cannot build 'qwen3_moe'"):
        moe_offload.from_pretrained(original, "1GB", attn_implementation="flash_attention_2")

    def without_package(*_, **__):
        raise ImportError("it needs mamba_ssm\nInstall it")

    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "_from_config", without_package)
    with pytest.raises(moe_offload.UnsupportedModelError, match="cannot build a 'qwen3_moe': it needs mamba_ssm Inst"):
        moe_offload.from_pretrained(original, "1GB")
    monkeypatch.undo()
    edit(folder / "config.json", model_type="alien")
    with pytest.raises(moe_offload.UnsupportedModelError, match=r"model type 'alien', which the installed"):
        moe_offload.from_pretrained(folder, "1GB")


def test_experts_implementation(original):
    for name in ("grouped_mm", "batched_mm"):
        handle = moe_offload.from_pretrained(original, BUDGET, experts_implementation=name).moe_offload
        assert handle.implementation == name
    with pytest.raises(moe_offload.ConfigError, match="experts_implementation='eager' is not accepted"):
        moe_offload.from_pretrained(original, BUDGET, experts_implementation="eager")


def test_arguments_without_effect(original):
    assert_same(
        original, low_cpu_mem_usage=True, weights_only=False, use_safetensors=True, disable_mmap=True, revision="main"
    )


def test_a_configuration_as_config_is_refused_in_a_line(original):
    with pytest.raises(moe_offload.ConfigError, match=r"<Qwen3MoeConfig>.*are keywords") as error:
        moe_offload.from_pretrained(original, BUDGET, config=AutoConfig.from_pretrained(original))
    assert len(str(error.value)) < 400


# Which class.


@pytest.mark.parametrize(
    "names", [None, ["NobodysModelForCausalLM"], ["BertModel"], ["AutoModelForCausalLM"], ["torch"]], ids=str
)
def test_a_class_that_is_not_this_configuration_s_is_not_taken(folder, names):
    edit(folder / "config.json", architectures=names)
    assert_same(folder)


def test_a_class_that_the_user_registered_comes_first(original):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as mapping

    class Mine(Qwen3MoeForCausalLM):
        pass

    AutoModelForCausalLM.register(Qwen3MoeConfig, Mine, exist_ok=True)
    try:
        assert type(moe_offload.from_pretrained(original, BUDGET)) is Mine
    finally:
        mapping._extra_content.pop(Qwen3MoeConfig)


def remote(folder: Path, *entries: str, **changes) -> None:
    edit(folder / "config.json", auto_map={entry: f"code.{entry}" for entry in entries}, **changes)


def test_code_of_a_checkpoint_is_run_with_the_word_only(folder):
    remote(folder, "AutoConfig", "AutoModelForCausalLM")
    assert_same(folder)  # without the flag plain transformers takes its own class
    with pytest.raises(moe_offload.CheckpointError, match=r"code\.py"):  # which is not there
        moe_offload.from_pretrained(folder, BUDGET, trust_remote_code=True)
    remote(folder, "AutoTokenizer")
    assert_same(folder, trust_remote_code=True)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model): pass")
    with pytest.raises(moe_offload.UnsupportedModelError, match="custom_generate"):
        moe_offload.from_pretrained(folder, BUDGET, trust_remote_code=True)
    assert_same(folder)


@pytest.mark.parametrize("open_it", ["from_pretrained", "make_plan", "forecast"])
def test_a_model_type_that_exists_only_as_code_is_refused_by_name(folder, open_it):
    remote(folder, "AutoConfig", "AutoModelForCausalLM", model_type="nobody_moe")
    with pytest.raises(moe_offload.UnsupportedModelError, match="'nobody_moe' exists only as code"):
        getattr(moe_offload, open_it)(folder, BUDGET)


# Quantised, wherever it says so.


@pytest.mark.parametrize("inside", [(), ("text_config",)], ids=["top", "text_config"])
@pytest.mark.parametrize("open_it", ["from_pretrained", "make_plan", "forecast", "pack_checkpoint", "config object"])
def test_quantised_is_refused_the_same_way_everywhere(folder, tmp_path, inside, open_it, monkeypatch):
    said = json.loads((folder / "config.json").read_text())
    part = said
    for name in inside:
        part = part.setdefault(name, {})
    part["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "model.safetensors").write_bytes(b"not read")
    second = tmp_path / "out" if open_it == "pack_checkpoint" else BUDGET
    call = getattr(moe_offload, open_it, moe_offload.from_pretrained)
    if open_it == "config object":  # where the configuration comes from the Hub, nobody has looked at the file
        monkeypatch.setattr("moe_offload.checkpoint.pretrained.download.is_folder", lambda *_: True)
    where = ".".join((*inside, "quantization_config")).replace(".", r"\.")
    with pytest.raises(moe_offload.UnsupportedModelError, match=rf"quantised \(gptq; {where} in .*bfloat16"):
        call(folder, second)


def test_null_is_not_quantised(folder):
    edit(folder / "config.json")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": None}))
    assert_same(folder)


# Adapters.


@pytest.fixture
def with_adapter(folder: Path) -> Path:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(folder)
    return folder


def test_an_adapter_in_the_folder_is_applied(with_adapter):
    need_peft_of_transformers()
    ids = torch.arange(3, 15).view(1, -1)
    want = AutoModelForCausalLM.from_pretrained(with_adapter, adapter_name="mine")
    got = moe_offload.from_pretrained(with_adapter, BUDGET, adapter_name="mine")
    assert got.active_adapters() == want.active_adapters() == ["mine"]
    with torch.no_grad():
        assert torch.equal(got(ids).logits, want(ids).logits)
    got.moe_offload.close()


def test_a_folder_that_is_only_an_adapter_says_so(with_adapter):
    (with_adapter / "config.json").unlink()
    with pytest.raises(moe_offload.CheckpointError, match=r"an adapter only .*load_adapter\("):
        moe_offload.from_pretrained(with_adapter, BUDGET)


# Files that are not what is read.


def test_gguf_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(moe_offload.CheckpointError, match="GGUF files are not read"):
            moe_offload.from_pretrained(path, BUDGET)


def test_a_distributed_checkpoint_is_named(folder):
    (folder / "model.safetensors").rename(folder / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(moe_offload.CheckpointError, match="distributed checkpoint"):
        moe_offload.from_pretrained(folder, BUDGET)


def add_unknown_dtype(folder: Path, key: str) -> None:
    """A tensor of a dtype that safetensors has and torch lacks, under `key`."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    end = len(data) - 8 - size
    table[key] = {"dtype": "F4", "shape": [16], "data_offsets": [end, end + 8]}
    text = json.dumps(table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :] + bytes(8))


def test_a_tensor_of_unknown_dtype_matters_only_where_it_is_needed(folder, tmp_path):
    add_unknown_dtype(folder, "not.used")
    assert_same(folder)
    with pytest.raises(moe_offload.CheckpointError, match=r"'not\.used' is of dtype F4.*remove it"):
        moe_offload.pack_checkpoint(folder, tmp_path / "packed")
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    add_unknown_dtype(folder, "model.norm.weight")
    with pytest.raises(moe_offload.UnsupportedModelError, match=r"'model\.norm\.weight'.*dtype F4.*torch"):
        moe_offload.from_pretrained(folder, BUDGET)


# Done once.


def test_each_header_is_read_once(folder, other, monkeypatch, tmp_path):
    """A checkpoint in shards, and its packed copy."""
    sharded = tmp_path / "sharded"
    other.save_pretrained(sharded, max_shard_size="40KB")
    packed = moe_offload.pack_checkpoint(sharded, tmp_path / "packed")
    read, opened, arranged = [], [], []
    monkeypatch.setattr(headers, "_read_header", counted(read, headers._read_header))
    monkeypatch.setattr(headers, "safe_open", counted(opened, headers.safe_open))
    monkeypatch.setattr(
        "moe_offload.plan.prepare.arrange_layers", counted(arranged, moe_offload.plan.prepare.arrange_layers)
    )
    for place in (sharded, packed):
        moe_offload.from_pretrained(place, BUDGET).moe_offload.close()
        files = sorted(place.glob("*.safetensors"))
        assert len(files) > 1 and sorted(read) == sorted(opened) == files and len(arranged) == 1
        read.clear(), opened.clear(), arranged.clear()


def counted(seen: list, function):
    def call(first, *args, **kwargs):
        seen.append(first)
        return function(first, *args, **kwargs)

    return call


def test_a_budget_beyond_the_machine_s_memory_is_said_once(original, caplog):
    moe_offload.from_pretrained(original, "900TB").moe_offload.close()
    assert [record for record in caplog.records if "more than this machine's memory" in record.message][1:] == []
    assert "900.00 TB is more than this machine's memory" in caplog.text


def test_accelerate_s_hooks_are_named(original):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(AutoModelForCausalLM.from_pretrained(original))
    with pytest.raises(moe_offload.UnsupportedModelError, match=r"dispatched by accelerate.*hook.*remove_hook"):
        moe_offload.optimize(model, BUDGET)
