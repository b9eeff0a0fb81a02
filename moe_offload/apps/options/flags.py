"""The flags that several commands take: one name, one meaning, one help text each (`tests/apps/cli/test_flags.py`).

`--save-THING FILE` writes a thing as a by-product of a run, as `Handle.save_THING` does in Python; `--out FILE` is
where a command whose result is a file puts it; `--json` prints the result as JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .numbers import number, one_of, whole

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or the name of a Hub repository.", show_default=False)]

# What a model may hold, and where.
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="All the model may hold: 8GB, 8GiB, 50% of free memory, a number of bytes; without it auto (90%).",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map", help='disk, cpu, auto, or a mapping: \'{"": cpu, "model.layers.*.mlp.experts": disk}\'.'
    ),
]
MaxMemory = Annotated[str | None, typer.Option("--max-memory", help="Limits per device: '{0: 8GB, cpu: 60GiB}'.")]
Context = Annotated[
    int | None,
    typer.Option("--context", help="Tokens of prompt and answer that the KV cache has room for.", **whole(1)),
]
ProfileIn = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        help="Which experts to expect: a workload that is remembered by this name, or a profile (x.json); off: none.",
    ),
]
PromptCacheOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache",
        metavar="memory|FOLDER",
        help="Keep what was read (its KV cache), in memory or this folder, too: near ties may then fall otherwise.",
    ),
]
Policy = Annotated[str | None, typer.Option("--policy", help="Which resident expert is evicted: lru, lfu, ...")]
Compile = Annotated[
    str | None,
    typer.Option("--compile", help="graph: the model's own kernels; inductor: compile them; without it auto."),
]
Compute = Annotated[
    str | None,
    typer.Option(
        "--compute",
        help="exact: the bits of plain transformers; fast, packed: few tokens sooner, rounded anew (docs/fast.md).",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config-file",
        help="Settings (YAML or JSON) for what no flag and no MOE_OFFLOAD_* variable says; without it "
        "$HF_HOME/moe_offload/default_config.yaml.",
    ),
]
Live = Annotated[bool | None, typer.Option("--live/--no-live", help="Let `moe-offload top` watch (it may).")]

# How a model is loaded: transformers' own words.
DTYPES = ("auto", "float32", "bfloat16", "float16")
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto is the checkpoint's own; float32, bfloat16, float16.", **one_of(*DTYPES))
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository; not of a folder.")
]
Token = Annotated[str | None, typer.Option("--token", help="Access token for the Hub; without it hf's own.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code that a checkpoint brings along, where it brings any."),
]
ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        help="eager, sdpa, flex_attention, flash_attention_2 or _3; without it as transformers chooses.",
        **one_of(*ATTENTIONS),
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads that compute; without it as torch chooses.", **whole(1, 4096)),
]

# How text is generated.
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="How many tokens to generate.", **whole(1))]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", help="Sample, the more evenly the higher; 0 is greedy.", **number(0, 100)),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Sample from the likeliest tokens of this share.", **number(0.001, 1))
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Sample from this many of the likeliest tokens; 0: all.", **whole(0))
]
Seed = Annotated[int | None, typer.Option("--seed", help="Sample the same text every time.", **whole(0, 2**63 - 1))]
System = Annotated[str | None, typer.Option("--system", help="What the model is told before the conversation.")]

# What is written.
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
SaveProfile = Annotated[
    Path | None, typer.Option("--save-profile", help="Save the activation profile of this run here (.json).")
]
SaveTrace = Annotated[
    Path | None, typer.Option("--save-trace", help="Save which experts were asked for here (.npz, for simulate).")
]
SaveTimeline = Annotated[
    Path | None, typer.Option("--save-timeline", help="Save what happened when here (.json, for ui.perfetto.dev).")
]
SaveReport = Annotated[
    Path | None, typer.Option("--save-report", help="Save what the run was like here (.json, for report).")
]
