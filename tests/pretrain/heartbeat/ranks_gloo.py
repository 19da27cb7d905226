"""One rank of a gloo group that is started without a launcher; test_gloo.py lets one of them fail or hang.

    RANK=0 WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501 python ranks_gloo.py DIR none gloo

The second argument is what happens to this rank: "none"; "error", raised in mid-step (the process stays, as with NCCL,
whose group waits for its operations before it ends); "stopped", it ends as if it was asked to; "hook" or "optimizer":
it hangs in a hook of the backward pass or in the optimizer's step. The third one is how the ranks wait for each other.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import distributed
from pretrain.heartbeat.watch import Watch
from pretrain.outcome import Outcome
from pretrain.run_folder import claim_run_dir
from pretrain.startup import join_process_group

FAULT_STEP, HANG_STEP = 5, 15  # a rank that hangs is found soon once its first steps are timed
STEPS = 100
STEP_SECONDS = 0.1


def main(run_dir: Path, fault: str, waits: str) -> None:
    join_process_group()
    claim_run_dir(run_dir)
    try:
        with Watch(run_dir, distributed.rank(), distributed.world_size()) as watch:
            watch.finish(train(watch, fault, waits))
    except ValueError:
        time.sleep(600)


def train(watch: Watch, fault: str, waits: str) -> Outcome:
    weight = torch.ones(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    for step in range(STEPS):
        watch.enter("forward", step)
        time.sleep(STEP_SECONDS)
        loss = weight.square().sum()
        if fault == "stopped" and step == FAULT_STEP:
            return Outcome.STOPPED
        if fault == "error" and step == FAULT_STEP:
            raise ValueError("the error of the step")
        if fault == "hook" and step == HANG_STEP:
            weight.register_hook(hang)
        if fault == "optimizer" and step == HANG_STEP:
            optimizer.register_step_pre_hook(hang)
        watch.enter("backward")
        loss.backward()
        wait_for_others(weight.grad, step, waits)
        watch.enter("step")
        optimizer.step()
    return Outcome.DONE


def hang(*_: object) -> None:
    time.sleep(600)


def wait_for_others(gradient: Tensor | None, step: int, waits: str) -> None:
    """Wait in C++ until all ranks are here.

    Args:
        gradient: Gradient of the step.
        step: Number of the step.
        waits: "gloo" for an all-reduce, which ends with an error if the process of a rank disappears; "store" for a
            wait that does not notice this, like that for a GPU; "none" not to wait.
    """
    if waits == "gloo":
        dist.all_reduce(gradient)
    elif waits == "store":
        store = dist.FileStore(sys.argv[1] + ".store", distributed.world_size())  # ends with no rank
        store.set(f"{step}/{distributed.rank()}", "")
        keys = [f"{step}/{rank}" for rank in range(distributed.world_size())]
        store.wait(keys, timedelta(minutes=10))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
