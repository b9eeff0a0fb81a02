"""Flags and commands of llama.cpp, ollama, vLLM and transformers, and what to use here instead."""

from __future__ import annotations

from collections.abc import Collection

#: Our flag, and what other tools call it.
_FLAGS = {
    "--context": ("-c", "--ctx-size", "--max-model-len", "--num-ctx", "--context-length", "--max-seq-len"),
    "--max-new-tokens": ("-n", "--n-predict", "--predict", "--num-predict", "--max-tokens", "--max-length"),
    "--budget": (
        *("-ngl", "--n-gpu-layers", "--gpu-layers", "--n-cpu-moe", "-ncmoe", "--cpu-moe", "--mlock", "--no-mmap"),
        *("--cpu-offload-gb", "--gpu-memory-utilization", "--memory"),
    ),
    "--prefill-chunk-size": ("-b", "--batch-size", "-ub", "--ubatch-size", "--max-num-batched-tokens"),
    "--compile": ("--enforce-eager",),
    "--threads": ("-t",),
    "--temperature": ("--temp", "--do-sample"),
    "--seed": ("-s",),
    "--file": ("-f",),
    "--prompt": ("-p",),
    "--system": ("-sys", "--system-prompt"),
    "--dtype": ("--torch-dtype",),
    "--served-model-name": ("-a", "--alias", "--name"),
}
_OURS = {theirs: ours for ours, names in _FLAGS.items() for theirs in names}
_TOLD = {
    **dict.fromkeys(
        ("-m", "--model", "--model-path", "-hf", "--hf-repo"), "the model is named without a flag, after the command"
    ),
    **dict.fromkeys(
        ("-q", "--quantization", "--load-in-4bit", "--load-in-8bit", "--kv-cache-dtype"),
        "nothing is quantised here: a model computes in its checkpoint's dtype, or in --dtype",
    ),
    **dict.fromkeys(("-i", "--interactive", "-cnv", "--conversation"), "moe-offload chat holds a conversation"),
    "--stream": "text comes as it is generated, without a flag",
}
_COMMANDS = {
    **dict.fromkeys(("pull", "download"), "a model of the Hub is downloaded by the first command that runs it"),
    **dict.fromkeys(("list", "ls"), "hf cache ls lists what has been downloaded"),
    "rm": "hf cache rm removes what has been downloaded",
    "ps": "moe-offload top shows the models that run",
    **dict.fromkeys(("generate", "complete", "completion"), "moe-offload run generates text"),
    "show": "moe-offload plan says what a model is made of",
    "help": "moe-offload --help, and moe-offload COMMAND --help",
    "version": "moe-offload --version",
}


def flag_elsewhere(name: str, typed: Collection[str], known: Collection[str]) -> str | None:
    """What does the same as the flag `name` in a command that has the flags `known`; None if nothing is known.

    `typed` is the whole command line: of `-ngl` the parser names `-n` alone.
    """
    words = {word.split("=")[0].replace("_", "-") for word in typed}
    if not name.startswith("--"):
        long = [word for word in words if len(word) > 2 and word.startswith(name) and (word in _OURS or word in _TOLD)]
        name = long[0] if long else name
    if name in _TOLD:
        return f"{name}: {_TOLD[name]}"
    ours = _OURS.get(name)
    return f"{name}: the flag for that is {ours}" if ours in known else None


def command_elsewhere(name: str) -> str | None:
    """What does the same as the command `name` of another tool; None if nothing is known."""
    return _COMMANDS.get(name)
