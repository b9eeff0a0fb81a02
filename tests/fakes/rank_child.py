"""One rank of a few that live as long as the tests: `python -m tests.fakes.rank_child RANK WORLD`.

It reads a line of JSON for each check, `{"check": "tests.ranks.checks:name", "port": ..., "given": {...}}`, runs the
check, which may form a process group with the others at that port, leaves the group, and answers with a line of JSON.
So importing torch is paid once, and a check that breaks its group breaks no other.
"""

import importlib
import json
import os
import sys
import traceback


def main() -> None:
    rank, world = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # whatever prints, prints elsewhere
    os.dup2(2, 1)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ["MASTER_PORT"] = str(asked["port"])
        module, _, name = asked["check"].partition(":")
        try:
            answer = {"value": getattr(importlib.import_module(module), name)(int(rank), int(world), **asked["given"])}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
        if dist.is_initialized():
            dist.destroy_process_group()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
