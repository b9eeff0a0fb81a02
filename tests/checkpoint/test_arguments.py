"""The table of from_pretrained's keywords is complete for the installed transformers, and refuses by name."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_offload.checkpoint.pretrained.arguments import ARGUMENTS, NOTHING, REFUSED, sort_arguments
from moe_offload.errors import ConfigError, OffloadError, UnsupportedModelError

SOURCES = {
    "PreTrainedModel": PreTrainedModel.from_pretrained,
    "AutoModel": AutoModelForCausalLM.from_pretrained,
}

#: What transformers does because of the path, by the function that it calls with it: where the same is done here.
PATH_USERS = {
    "resolve_revision": "pretrained/download.py: the second download is of the first one's commit",
    "find_adapter_config_file": "pretrained/dense.py:find_adapter",
    "maybe_load_adapters": "pretrained/dense.py:find_adapter",
    "from_pretrained": "of a configuration, pretrained/skeleton.py; of the class, pretrained/dense.py",
    "resolve_trust_remote_code": "pretrained/remote_code.py",
    "get_class_from_dynamic_module": "pretrained/remote_code.py",
    "get_distributed_checkpoint_dir": "pretrained/weight_files.py:refuse_distributed",
    "_get_resolved_checkpoint_files": "pretrained/weight_files.py",
    "cached_file": "of extra files, pretrained/weight_files.py",
    "LoadStateDictConfig": "kept for messages; the name is given to the configuration, pretrained/dense.py",
    "adjust_generation_fn": "pretrained/dense.py:read_generation_defaults; custom_generate, pretrained/remote_code.py",
    "exists": "of the adapter's folder, pretrained/dense.py:find_adapter",
    "join": "of the adapter's folder, pretrained/dense.py:find_adapter",
}


def tree(function) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def keywords_of(function) -> set[str]:
    """Every keyword that a from_pretrained has in its signature, takes out of its kwargs, or documents."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds}
    for node in ast.walk(tree(function)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("pop", "get"):
            if "kwargs" in ast.unparse(node.func.value) and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and "kwargs" in ast.unparse(node):
            found.add(node.left.value)
        if isinstance(node, ast.List) and node.elts and all(isinstance(e, ast.Constant) for e in node.elts):
            found |= {e.value for e in node.elts}
    documented = re.findall(r"^ *(\w+) ?\(`", inspect.getdoc(function) or "", flags=re.M)
    return found | set(documented) - {"kwargs", "model_args"}


@pytest.mark.parametrize("name", SOURCES)
def test_every_keyword_of_transformers_is_in_the_table(name):
    found = keywords_of(SOURCES[name])
    assert {"revision", "subfolder", "dtype", "trust_remote_code"} <= found, "the source is read as it is meant to be"
    unknown = {keyword for keyword in found if keyword not in ARGUMENTS and keyword != "default"}
    assert not unknown, f"transformers takes {sorted(unknown)}: say in ARGUMENTS what becomes of each"


@pytest.mark.parametrize("name", SOURCES)
def test_everything_that_is_done_because_of_the_path_is_done_here(name):
    users = set()
    for node in ast.walk(tree(SOURCES[name])):
        if isinstance(node, ast.Call):
            said = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(value, ast.Name) and value.id == "pretrained_model_name_or_path" for value in said):
                users.add(ast.unparse(node.func).rpartition(".")[2])
    assert len(users) >= 4 and users <= set(PATH_USERS), f"what of {users - set(PATH_USERS)}?"


def test_a_keyword_that_nobody_knows_would_be_found():
    def from_pretrained(path, new_one=None, **kwargs):
        if "another" in kwargs:
            kwargs.pop("third", None)

    assert {"new_one", "another", "third"} <= keywords_of(from_pretrained)


@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.fate == REFUSED])
def test_what_is_refused_is_refused_by_name(name):
    with pytest.raises(OffloadError, match=rf"from_pretrained\({name}=.*\S{{4}}") as error:
        sort_arguments(None, {name: "x"})
    asks_for_quantization = name in ("quantization_config", "load_in_4bit", "load_in_8bit")
    assert type(error.value) is (UnsupportedModelError if asks_for_quantization else ConfigError)
    sort_arguments(None, {name: None})
    sort_arguments(None, {name: False})


def test_what_has_no_effect_says_why():
    silent = [name for name, argument in ARGUMENTS.items() if argument.fate == NOTHING and not argument.why]
    assert not silent


def test_arguments_are_sorted():
    said = sort_arguments(None, {"torch_dtype": "float32", "revision": "v1", "subfolder": "a/", "use_cache": False})
    assert (said.dtype, said.hub, said.subfolder, said.overrides) == (
        "float32",
        {"revision": "v1"},
        "a",
        {"use_cache": False},
    )
    assert sort_arguments("auto", {"torch_dtype": "float32"}).dtype == "auto", "dtype wins, as in transformers"
    assert sort_arguments(None, {}).dtype == "auto"
    assert sort_arguments(None, {"use_safetensors": True, "weights_only": False, "low_cpu_mem_usage": True}) == (
        sort_arguments(None, {})
    )


@pytest.mark.parametrize("wrong", [{"use_safetensors": False}, {"subfolder": "../other"}, {"subfolder": "/etc"}])
def test_values_that_ask_for_what_is_not_done(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        sort_arguments(None, wrong)
