"""One name, one meaning: every flag of every command is in this table, with what it takes."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from moe_offload.apps.cli import app
from tests.apps.cli.test_cli import COMMANDS, MODEL

SWITCH, TEXT, FILE, NUMBER, WORD, MANY = "switch", "text", "file", "number", "word", "several texts"

#: Flag -> (what it takes, how its help begins). In every command that has it, but for `DIFFERENT`.
FLAGS: dict[str, tuple[str, str]] = {
    "--attn-implementation": (WORD, "eager, sdpa"),
    "--budget": (TEXT, "All the model may hold"),
    "--cache": (FILE, "Where synthetic"),
    "--chat": (SWITCH, "The prompt is a message"),
    "--compile": (TEXT, "graph: the model's own kernels; inductor: compile them"),
    "--compute": (TEXT, "exact: the bits of plain transformers; fast"),
    "--config-file": (FILE, "Settings (YAML or JSON)"),
    "--decide": (TEXT, "host, device or auto"),
    "--dynamic": (TEXT, "yes or no, as in torch.compile"),
    "--experts-implementation": (TEXT, "grouped_mm, batched_mm or auto"),
    "--fullgraph": (TEXT, "yes or no, as in torch.compile"),
    "--half-life": (TEXT, "Tokens after which a use counts half"),
    "--lookahead": (TEXT, "yes or no: ask each router"),
    "--overlap": (TEXT, "yes or no: compute resident experts"),
    "--poison": (TEXT, "yes or no: fill free slots"),
    "--prewarm": (TEXT, "yes or no: load the expected experts"),
    "--reserve": (TEXT, "Kept free of experts"),
    "--sequences": (TEXT, "KV caches"),
    "--untested": (TEXT, "yes or no: compute on a GPU"),
    "--wave-rows": (TEXT, "Experts of scratch"),
    "--context": (NUMBER, "Tokens of prompt and answer that the KV cache has room for"),
    "--device": (WORD, "Where models compute"),
    "--device-map": (TEXT, "disk, cpu, auto, or a mapping"),
    "--dtype": (WORD, "auto is the checkpoint's own"),
    "--experts": (WORD, "mxfp4, int4 or fp8"),
    "--explain": (SWITCH, "Add which rule"),
    "--file": (FILE, "Read the prompt from this UTF-8 file"),
    "--host": (TEXT, "Address to listen on"),
    "--interval": (NUMBER, "Seconds between looks"),
    "--jobs": (NUMBER, "Processes to spread"),
    "--into": (FILE, "With --quantised: write the table"),
    "--json": (SWITCH, "Print"),
    "--layers": (NUMBER, "Layers of a synthetic"),
    "--lock-memory": (TEXT, "yes, no or auto: keep slots"),
    "--live": (SWITCH, "Let `moe-offload top` watch"),
    "--markdown": (SWITCH, "Print the table as the documentation"),
    "--matrix": (SWITCH, "Every implementation"),
    "--max-memory": (TEXT, "Limits per device"),
    "--max-new-tokens": (NUMBER, "How many tokens to generate"),
    "--max-shard-size": (TEXT, "Largest file"),
    "--max-tokens": (NUMBER, "Stop after so many tokens"),
    "--measure": (FILE, "With --experts: perplexity"),
    "--meta": (MANY, "key=value"),
    "--metrics-port": (NUMBER, "Serve Prometheus metrics"),
    "--model": (TEXT, "With --budget: the checkpoint"),
    "--served-model-name": (TEXT, "What clients call the model"),
    "--api-key": (TEXT, "What clients must send"),
    "--max-waiting": (NUMBER, "Requests that may wait"),
    "--parallel": (NUMBER, "Requests to compute together"),
    "--new-tokens": (NUMBER, "Tokens decoded after the first"),
    "--foreign": (FILE, "Instead: run the code"),
    "--offload-folder": (TEXT, "Where experts are spilled"),
    "--once": (SWITCH, "Look once"),
    "--out": (FILE, "The "),
    "--packed": (SWITCH, "Ours reads a copy"),
    "--policies": (TEXT, "By commas"),
    "--policy": (TEXT, "Which resident expert is evicted"),
    "--pooled": (SWITCH, "One cache for all layers"),
    "--port": (NUMBER, "Port"),
    "--prefill-chunk-size": (NUMBER, "Tokens of the prompt to read at a time"),
    "--profile": (TEXT, "Which experts to expect"),
    "--prompt": (TEXT, "Text to continue"),
    "--prompt-cache": (TEXT, "Keep what was read"),
    "--prompt-tokens": (NUMBER, "Tokens of each prompt"),
    "--quantised": (SWITCH, "Every format of quantised experts"),
    "--ranks": (NUMBER, "Processes that share"),
    "--rank-timeout": (TEXT, "Seconds that one process of several"),
    "--requests": (NUMBER, "Requests measured"),
    "--residency": (TEXT, "Share of the experts that is resident"),
    "--revision": (TEXT, "Branch, tag or commit"),
    "--routing": (FILE, "Replay the expert ids"),
    "--save-charts": (FILE, "Save"),
    "--save-plot": (FILE, "Save"),
    "--save-profile": (FILE, "Save"),
    "--save-report": (FILE, "Save"),
    "--save-timeline": (FILE, "Save"),
    "--save-trace": (FILE, "Save"),
    "--seed": (NUMBER, "Sample the same text"),
    "--show": (SWITCH, "Write nothing"),
    "--sides": (TEXT, "What to compare"),
    "--start": (TEXT, "warm: the cache"),
    "--system": (TEXT, "What the model is told"),
    "--temperature": (NUMBER, "Sample, the more evenly"),
    "--threads": (NUMBER, "Threads that compute"),
    "--token": (TEXT, "Access token for the Hub"),
    "--top-k": (NUMBER, "Sample from this many"),
    "--top-p": (NUMBER, "Sample from the likeliest"),
    "--trace": (FILE, "Replay this trace"),
    "--trust-remote-code": (SWITCH, "Run the code that a checkpoint brings"),
    "--verify": (WORD, "Rows to read back"),
    "--version": (SWITCH, "Show the version"),
    "--weights": (TEXT, "One each, by commas"),
    "--yes": (SWITCH, "Ask nothing"),
}
#: What a command says in other words, because there it is a setting that is written to a file.
DIFFERENT = {
    ("config", "--context"): TEXT,
    ("config", "--live"): TEXT,
    ("bench", "--residency"): MANY,
    ("families", "--compile"): WORD,
}
USES = [
    (words, parameter)
    for words, command in COMMANDS.items()
    for parameter in command.params
    if parameter.param_type_name == "option"
]


def takes(parameter: Any) -> str:
    """What follows the flag on the command line."""
    if parameter.is_flag:
        return SWITCH
    if parameter.multiple:
        return MANY
    metavars = {"N": NUMBER, "NAME": WORD}
    described = str(getattr(parameter, "type_descriptor", None) or parameter.type)  # by the version of typer
    return metavars.get(parameter.metavar) or (FILE if "path" in described.lower() else TEXT)


@pytest.mark.parametrize(("words", "parameter"), USES, ids=lambda given: getattr(given, "name", None) or given)
def test_a_flag_means_the_same_everywhere(words, parameter):
    name = max((opt for opt in parameter.opts), key=len)
    assert name in FLAGS, f"{words} {name}: add it to the table, or use the name that is there for it"
    kind, begins = FLAGS[name]
    assert takes(parameter) == DIFFERENT.get((words, name), kind), f"{words} {name}"
    assert begins.lower() in parameter.help.lower(), f"{words} {name}: {parameter.help}"


def test_the_table_has_no_flag_that_nobody_takes():
    assert set(FLAGS) == {max(parameter.opts, key=len) for _, parameter in USES}


def test_run_chat_and_serve_take_a_model_in_the_same_words():
    def flags(words: str) -> set[str]:
        return {name for parameter in COMMANDS[words].params for name in parameter.opts}

    sampling = {"--temperature", "--top-p", "--top-k", "--seed", "--max-new-tokens", "--system"}
    shared = flags("run") & flags("chat")
    assert sampling < shared
    assert {"--budget", "--context", "--dtype", "--threads", "--revision", "--attn-implementation"} < shared
    assert shared - sampling <= flags("serve")


@pytest.mark.parametrize("spelling", ["--config_file", "--config-file"])
def test_both_spellings_are_read_and_one_is_shown(spelling, tmp_path):
    (tmp_path / "settings.yaml").write_text("budget: 6MB\n")
    result = CliRunner().invoke(app, ["plan", MODEL, spelling, str(tmp_path / "settings.yaml")])
    assert result.exit_code == 0 and "budget 6.00 MB" in result.stdout, result.output
    assert "--config_file" not in CliRunner().invoke(app, ["plan", "--help"]).stdout
