"""trust_remote_code means what it means in transformers: the folder's own class, or a refusal by name."""

from __future__ import annotations

import json
import uuid

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload.apps.generate.tokenizer import load_tokenizer
from moe_offload.checkpoint.pretrained.arguments import Arguments
from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.plan.forecast import read_outline
from tests.checkpoint.test_file_entry import save_beyond
from tests.fakes.loop_models import LOOP_NAMES, SETTINGS, build, prompt, same, session
from tests.fakes.remote_folder import keep_code_apart, write_remote
from tests.fakes.tiny_checkpoints import build as build_tiny


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture(scope="module", autouse=True)
def apart():
    keep_code_apart()


@pytest.fixture
def folder(tmp_path):
    return write_remote(tmp_path / f"loops_{uuid.uuid4().hex}")


def budget_of(folder, residency=0.0):
    from moe_offload.plan.budget import budget_for
    from moe_offload.plan.weights import layer_shapes, sum_costs

    found = read_outline(folder, trust_remote_code=True)
    shapes = layer_shapes(found.moe_layers)
    return budget_for(residency, shapes, sum_costs(found.model, found.moe_layers, SETTINGS))


def load(folder, residency=0.0, **options):
    budget = budget_of(folder, residency)
    return moe_offload.from_pretrained(folder, budget, config=SETTINGS, trust_remote_code=True, **options)


def test_weights_begin_where_load_state_dict_has_them_not_where_the_file_has_them(folder):
    """float32: the bits of a product depend on where its matrix begins."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    save_beyond(tensors, file, 8)
    model = load(folder)
    assert {p.data_ptr() % 64 for name, p in model.named_parameters() if "expert" not in name} == {0}
    assert same(session(build("hits"), prompt(1, 5)), session(model, prompt(1, 5)))
    model.moe_offload.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loop", [name for name in LOOP_NAMES if name != "tied"])
def test_outputs_are_those_of_the_class_and_its_state_dict(loop, dtype, tmp_path):
    folder = write_remote(tmp_path / f"loops_{uuid.uuid4().hex}", loop, dtype)
    for batch, length in ((1, 16), (3, 33)):
        want = session(build(loop, dtype), prompt(batch, length))
        for residency in (0.0, 0.5, 1.0):
            model = load(folder, residency)
            assert type(model).__module__.startswith("transformers_modules.")
            assert same(want, session(model, prompt(batch, length)))
            model.moe_offload.close()


def test_experts_are_never_in_memory_and_buffers_are_real(folder):
    found = read_outline(folder, trust_remote_code=True)
    assert all(param.is_meta for param in found.model.parameters())
    want = dict(build().named_buffers())
    assert want and all(torch.equal(want[name], buffer) for name, buffer in found.model.named_buffers())


def test_generate_and_saving(folder, tmp_path):
    model = load(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(build().generate(prompt(), **options), model.generate(prompt(), **options))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_loops.py").exists()
    assert same(session(build(), prompt()), session(load(tmp_path / "again"), prompt()))


def test_a_packed_copy_runs_the_same(folder, tmp_path):
    moe_offload.pack_checkpoint(folder, tmp_path / "packed", trust_remote_code=True)
    assert same(session(build(), prompt()), session(load(tmp_path / "packed"), prompt()))


@pytest.mark.parametrize("open_it", ["from_pretrained", "make_plan", "forecast"])
def test_without_the_flag_it_is_refused_by_name(folder, open_it):
    with pytest.raises(UnsupportedModelError, match=r"'loops' exists only as code .*trust_remote_code=True"):
        getattr(moe_offload, open_it)(folder, "1GB")


@pytest.mark.parametrize("open_it", ["make_plan", "forecast"])
def test_with_it_it_is_planned(folder, open_it):
    assert getattr(moe_offload, open_it)(folder, "1GB", trust_remote_code=True) is not None


def test_the_folders_class_runs_and_not_the_librarys(tmp_path):
    """A class of a known model type that computes something else: the library's would give other tokens."""
    folder = tmp_path / "changed_qwen"
    build_tiny("per_expert").save_pretrained(folder)
    (folder / "modeling_changed.py").write_text(
        "from transformers import Qwen3MoeForCausalLM\n\n\n"
        "class Changed(Qwen3MoeForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n"
        "        out.logits = -out.logits\n"
        "        return out\n"
    )
    said = json.loads((folder / "config.json").read_text())
    said["auto_map"] = {"AutoModelForCausalLM": "modeling_changed.Changed"}
    (folder / "config.json").write_text(json.dumps(said))
    for trusted in (True, False):
        plain = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trusted, experts_implementation="grouped_mm"
        )
        ours = moe_offload.from_pretrained(
            folder, "1GB", trust_remote_code=trusted, experts_implementation="grouped_mm"
        )
        assert type(ours).__name__ == type(plain).__name__ == ("Changed" if trusted else "Qwen3MoeForCausalLM")
        assert same(session(plain.eval(), prompt()), session(ours, prompt()))


def test_code_that_is_not_there_or_fails_is_said(folder):
    (folder / "modeling_loops.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(UnsupportedModelError, match="no_such_package_at_all"):
        load(folder)
    (folder / "modeling_loops.py").write_text(
        "from transformers import PreTrainedModel\n\n\nclass LoopsForCausalLM(PreTrainedModel):\n"
        "    def __init__(self, config):\n        raise ZeroDivisionError('on purpose')\n"
    )
    with pytest.raises(UnsupportedModelError, match=r"its own code .*ZeroDivisionError: on purpose"):
        load(folder)
    (folder / "modeling_loops.py").unlink()
    with pytest.raises((CheckpointError, UnsupportedModelError), match="modeling_loops"):
        load(folder)


@pytest.mark.parametrize("where", ["the modeling", "the configuration", "the model's __init__"])
def test_code_that_ends_the_process_is_an_error(folder, where):
    file = "configuration_loops.py" if where == "the configuration" else "modeling_loops.py"
    code = (folder / file).read_text()
    if where == "the model's __init__":
        code = code.replace("        self.model = LoopsModel(config)\n", "        import sys\n        sys.exit(3)\n", 1)
    else:
        code += "\nimport sys\nsys.exit('no licence')\n"
    (folder / file).write_text(code)
    with pytest.raises(UnsupportedModelError, match=r"its (own code|configuration).*SystemExit"):
        moe_offload.make_plan(folder, "1GB", trust_remote_code=True)


def test_a_tokenizer_that_ends_the_process_is_an_error(folder):
    (folder / "tokenization_loops.py").write_text("raise SystemExit(3)\n")
    said = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_loops.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(folder), trust_remote_code=True)


def test_a_tokenizer_with_code_of_its_own_is_loaded(folder):
    (folder / "tokenization_loops.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom tokenizers import Tokenizer\n"
        "from tokenizers.models import WordLevel\nfrom tokenizers.pre_tokenizers import Whitespace\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n"
        "    def __init__(self, **kwargs):\n"
        "        words = Tokenizer(WordLevel({'a': 0, 'b': 1}, unk_token='a'))\n"
        "        words.pre_tokenizer = Whitespace()\n"
        "        super().__init__(tokenizer_object=words)\n"
    )
    said = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_loops.Own"] * 2}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert load_tokenizer(str(folder), trust_remote_code=True)("b a b")["input_ids"] == [1, 0, 1]
    with pytest.raises(CheckpointError):
        load_tokenizer(str(folder))


def test_a_class_that_is_no_model_is_refused_by_name(tmp_path):
    names = {"AutoConfig": "configuration_loops.LoopsConfig", "AutoModelForCausalLM": "modeling_loops.Hits"}
    write_remote(tmp_path, auto_map=names)
    with pytest.raises(CheckpointError, match=r"modeling_loops\.Hits.*no PreTrainedModel"):
        moe_offload.from_pretrained(tmp_path, budget="1GB", trust_remote_code=True)


def test_a_checkpoint_that_lacks_a_dense_tensor_is_refused(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(folder)


def test_a_head_that_the_configuration_ties_is_the_embeddings(folder):
    """The file has it once; older classes tie nothing themselves. One that does not say which it is, needs no tie."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    model = load(folder)
    assert model.lm_head.weight is model.model.embed.weight
    plain = build()
    plain.lm_head.weight = plain.model.embed.weight
    assert same(session(plain, prompt()), session(model, prompt()))


def test_a_class_that_does_not_name_its_embeddings_is_loaded(folder):
    code = (folder / "modeling_loops.py").read_text()
    (folder / "modeling_loops.py").write_text(
        code
        + "\n\ndef unknown(_):\n    raise NotImplementedError\n\n\nLoopsForCausalLM.get_input_embeddings = unknown\n"
    )
    assert same(session(build(), prompt()), session(load(folder), prompt()))


def test_a_quantised_folder_with_code_is_refused(folder):
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        moe_offload.from_pretrained(folder, "1GB", trust_remote_code=True)


def test_the_revision_of_the_code_is_handed_on(folder, monkeypatch):
    seen = []

    def get_class(reference, place, **kwargs):
        seen.append((reference, kwargs["code_revision"]))
        raise OSError("nothing is fetched here")

    monkeypatch.setattr("transformers.models.auto.configuration_auto.get_class_from_dynamic_module", get_class)
    with pytest.raises(CheckpointError):
        moe_offload.make_plan(folder, "1GB", trust_remote_code=True, code_revision="v2")
    assert seen == [("configuration_loops.LoopsConfig", "v2")]
    assert Arguments().code_revision is None
