"""One of two processes whose head is cut over the vocabulary: makes the checks that test_head_parallel.py lists.

A check that fails on one rank alone leaves the other in a collective operation, so the run ends there.

    head_parallel_worker.py RANK FOLDER     writes FOLDER/RANK.json: {check: traceback, or null when it passed}
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import conftest  # switches Triton's interpreter on
import head_parallel_checks  # noqa: F401
import head_parallel_models  # noqa: F401  both register their checks
import torch
import torch.distributed as dist
from head_parallel_common import CHECKS, RANKS

SECONDS = 300  # a guard against hanging: alone on a core they take 25


def run() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    store = dist.distributed_c10d._get_default_store()
    for name, check in CHECKS.items():
        torch.manual_seed(20251013)
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        store.set(f"{name}/{dist.get_rank()}", "passed" if found[name] is None else "failed")
        if len({store.get(f"{name}/{r}") for r in range(RANKS)}) > 1:  # waits for the other rank
            break
    return found


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # transformers reads them
    torch.empty, torch.empty_like = conftest._poisoned(torch.empty), conftest._poisoned(torch.empty_like)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    (folder / f"{rank}.json").write_text(json.dumps(run()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
