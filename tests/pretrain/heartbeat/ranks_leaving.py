"""One rank of a gloo group that is started without a launcher; test_leaving.py lets one of them fail.

    RANK=0 WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501 python ranks_leaving.py DIR none gloo

The second argument is what happens to this rank in step 5: "none", "error" (raised in mid-step; the process stays, as
with NCCL, whose group waits for its operations before it ends) or "stopped" (the rank ends as if it was asked to).
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.heartbeat.watch import Watch
from pretrain.outcome import Outcome
from pretrain.run_folder import claim_run_dir
from pretrain.startup import join_process_group

FAULT_STEP = 5
STEP_SECONDS = 0.1


def main(run_dir: Path, fault: str, waits: str) -> None:
    join_process_group()
    claim_run_dir(run_dir)
    try:
        with Watch(run_dir, distributed.rank(), distributed.world_size()) as watch:
            for step in range(100):
                watch.enter("forward", step)
                time.sleep(STEP_SECONDS)
                if fault == "stopped" and step == FAULT_STEP:
                    watch.finish(Outcome.STOPPED)
                    return
                if fault == "error" and step == FAULT_STEP:
                    raise ValueError("the error of the step")
                watch.enter("backward")
                wait_for_others(step, waits)
            watch.finish(Outcome.DONE)
    except ValueError:
        time.sleep(600)


def wait_for_others(step: int, waits: str) -> None:
    """Wait in C++ until all ranks are here.

    Args:
        step: Number of the step.
        waits: "gloo" for an all-reduce, which ends with an error if the process of a rank disappears; "store" for a
            wait that does not notice this, like that for a GPU; "none" not to wait.
    """
    if waits == "gloo":
        dist.all_reduce(torch.ones(10))
    elif waits == "store":
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{step}/{distributed.rank()}", "")
        keys = [f"{step}/{rank}" for rank in range(distributed.world_size())]
        store.wait(keys, timedelta(minutes=10))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
