"""A checkpoint whose experts were made small is one that plain transformers loads, and ours computes the same."""

import importlib.util
import json
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload import quantise
from moe_offload.apps.cli import main
from moe_offload.errors import CheckpointError, ConfigError, PackError, UnsupportedModelError
from moe_offload.quantise import quantise_checkpoint
from tests.fakes.tiny_checkpoints import build, save

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 3], [9, 2, 7, 1, 9, 4, 11, 60]])
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors reads this layout"
)
#: (kind of experts, its sizes, format). 48 and 96 have blocks of 16, 32 in common with 128.
CASES = [
    pytest.param("stacked", {"hidden_size": 64, "intermediate_size": 96}, "mxfp4", id="gpt_oss mxfp4"),
    pytest.param("per_expert", {"hidden_size": 64, "moe_intermediate_size": 96}, "fp8", id="qwen3_moe fp8"),
    pytest.param("renamed", {"hidden_size": 48, "intermediate_size": 96}, "fp8", id="mixtral fp8"),
    pytest.param("per_expert", {"hidden_size": 64, "moe_intermediate_size": 96}, "mxfp4", id="qwen3_moe mxfp4",
                 marks=needs_package),
    pytest.param("per_expert", {"hidden_size": 64, "moe_intermediate_size": 96}, "int4", id="qwen3_moe int4",
                 marks=needs_package),
    pytest.param("renamed", {"hidden_size": 64, "intermediate_size": 96}, "int4", id="mixtral int4",
                 marks=needs_package),
]  # fmt: skip


def original(folder, kind="per_expert", dtype=torch.bfloat16, **sizes):
    model = build(kind, **sizes)
    with torch.no_grad():  # numbers as in a model, or attention saturates and no two models differ
        for param in model.parameters():
            param.mul_(0.1)
    return save(model.to(dtype), folder)


def same_as_plain(folder, packed=None):
    """Logits of prompt and answer, and the answer, of ours and of plain transformers."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ours = moe_offload.from_pretrained(packed or folder, "8GB")
    with torch.no_grad(), ours.moe_offload:
        assert torch.equal(ours(IDS).logits, plain(IDS).logits)
        asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(IDS, **asked), plain.generate(IDS, **asked))


@pytest.mark.parametrize(("kind", "sizes", "experts"), CASES)
def test_plain_transformers_loads_it_and_computes_what_ours_does(kind, sizes, experts, tmp_path, caplog):
    was = original(tmp_path / "was", kind, **sizes)
    made = quantise_checkpoint(was, tmp_path / "made", experts)
    assert "lossy" in caplog.text and experts in caplog.text
    same_as_plain(made)
    sizes_of = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (was, made)]
    assert sizes_of[1] < sizes_of[0]
    assert not list(tmp_path.glob(".*"))


def test_ordinary_packing_takes_it(tmp_path):
    made = quantise_checkpoint(
        original(tmp_path / "was", hidden_size=64, moe_intermediate_size=96), tmp_path / "made", "fp8"
    )
    same_as_plain(made, moe_offload.pack_checkpoint(made, tmp_path / "packed"))


def test_dense_weights_are_copied_and_several_files_are_indexed(tmp_path):
    was = original(tmp_path / "was", "stacked", hidden_size=64, intermediate_size=96)
    made = quantise_checkpoint(was, tmp_path / "made", "mxfp4", max_shard_size="60KB")
    files = sorted(made.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    before, after = load_file(was / "model.safetensors"), {}
    for file in files:
        with safe_open(file, "pt") as opened:
            after |= {key: opened.get_tensor(key) for key in opened.keys()}
            assert all(index[key] == file.name for key in opened.keys())
    for key, tensor in before.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert key not in after and f"{key}_blocks" in after
        else:
            assert torch.equal(after[key], tensor), key
    same_as_plain(made)


def test_a_checkpoint_in_float32_is_made_small_too(tmp_path):
    was = original(tmp_path / "was", dtype=torch.float32, hidden_size=64, moe_intermediate_size=96)
    same_as_plain(quantise_checkpoint(was, tmp_path / "made", "fp8"))


@pytest.mark.parametrize(
    ("kind", "sizes", "experts", "error", "words"),
    [
        ("stacked", {"hidden_size": 64, "intermediate_size": 96}, "int4", UnsupportedModelError, "no int4 layout"),
        ("stacked", {"hidden_size": 64, "intermediate_size": 96}, "fp8", UnsupportedModelError, "no fp8 layout"),
        ("per_expert", {"moe_intermediate_size": 24}, "mxfp4", UnsupportedModelError, "no whole groups of 32"),
        ("per_expert", {"moe_intermediate_size": 24}, "fp8", UnsupportedModelError, "too small to be worth a scale"),
        ("per_expert", {}, "int3", ConfigError, "'mxfp4', 'int4', 'fp8'"),
    ],
)
def test_what_has_no_layout_is_refused(kind, sizes, experts, error, words, tmp_path):
    was = original(tmp_path / "was", kind, **sizes)
    with pytest.raises(error, match=words):
        quantise_checkpoint(was, tmp_path / "made", experts)
    assert [file.name for file in tmp_path.iterdir()] == ["was"]


def test_what_is_quantised_already_is_refused(tmp_path):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96}
    made = quantise_checkpoint(original(tmp_path / "was", **sizes), tmp_path / "made", "fp8")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantise_checkpoint(made, tmp_path / "again", "fp8")


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path):
    was = original(tmp_path / "was", hidden_size=64, moe_intermediate_size=96)
    tensors = load_file(was / "model.safetensors")
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[key][3, 4] = float("nan")
    save_file(tensors, was / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{key}.*not finite"):
        quantise_checkpoint(was, tmp_path / "made", "fp8")
    assert [file.name for file in tmp_path.iterdir()] == ["was"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_what_was_stopped(stop, tmp_path, monkeypatch):
    was = original(tmp_path / "was", hidden_size=64, moe_intermediate_size=96)
    matrices = []

    def some(self, w_OI):
        matrices.append(w_OI)
        if len(matrices) > 5:
            raise stop
        return quantise_one(self, w_OI)

    quantise_one = quantise.Layout.quantise
    monkeypatch.setattr(quantise.Layout, "quantise", some)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else PackError):
        quantise_checkpoint(was, tmp_path / "made", "fp8")
    assert [file.name for file in tmp_path.iterdir()] == ["was"]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    was = original(tmp_path / "was", hidden_size=64, moe_intermediate_size=96)
    quantise_one = quantise.Layout.quantise
    monkeypatch.setattr(quantise.Layout, "quantise", lambda *given: [t.flip(0) for t in quantise_one(*given)])
    with pytest.raises(PackError, match="more than rounding makes"):
        quantise_checkpoint(was, tmp_path / "made", "fp8")
    assert [file.name for file in tmp_path.iterdir()] == ["was"]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["moe-offload", "pack", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return ended.value.code or 0, capsys.readouterr()


def test_the_command_measures_before_and_after(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The ls command lists the files of a folder. " * 20)
    model = "examples/polyglot-tiny"
    asked = ("--experts", "fp8", "--measure", text, "--budget", "20MB")
    code, told = run(monkeypatch, capsys, model, tmp_path / "made", *asked)
    assert code == 0, told.err
    path, before, after = told.out.splitlines()
    assert path == str(tmp_path / "made") and before.startswith("before: perplexity") and after.startswith("fp8: perp")
    assert "tokens, " in before and before != after


def test_a_budget_too_small_to_measure_with_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("The ls command lists the files of a folder.")
    asked = ("--experts", "fp8", "--measure", tmp_path / "text.txt", "--budget", "1MB")
    code, told = run(monkeypatch, capsys, "examples/polyglot-tiny", tmp_path / "made", *asked)
    assert code == 3 and "below the floor" in told.err and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure", "text.txt"], "--measure needs --experts"),
        (["--experts", "fp8", "--measure", "absent.txt"], "no such file"),
        (["--experts", "fp8", "--measure", "tests"], "not a file"),
        (["--experts", "fp8", "--budget", "8GB"], "--budget is what"),
        (["--experts", "fp8", "--verify", "all"], "--verify is for"),
        (["--experts", "fp3"], "fp3"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(words, said, tmp_path, monkeypatch, capsys):
    code, told = run(monkeypatch, capsys, "examples/polyglot-tiny", tmp_path / "made", *words)
    assert code == 2 and said in told.err and not (tmp_path / "made").exists()
