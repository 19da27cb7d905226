"""Three hundred faults in checkpoints: what is loaded after each, beside DeepSpeed's own checkpoints and torch's dcp.

    python benchmarks/torn.py                           # one rank on the CPU, two to three minutes

A run has an older checkpoint and a newer one. Of the newer one:

- killed: its save, in a process of its own, gets SIGKILL at a random moment between its begin and its end;
- disk full: in its save the kernel refuses all writes beyond a random byte of a file;
- cut, bit flipped, missing: one of its files is harmed, at a random place;
- manifest torn: from a random byte on, zeros stand in what describes the rest: our `manifest.json`, DeepSpeed's
  `latest` or its file of the model, dcp's `.metadata`.

Then a process whose weights and moments are all NaN loads the run: ours and DeepSpeed by themselves, dcp the newest
folder. "Right" is the newest state that was completely saved, bit for bit: weights, fp32 masters and moments. After a
disturbed save that is the newer one if the save returned or had done its last act (the folder's name, `latest`,
`.metadata`), else the older one. After harm it is the older one; DeepSpeed and dcp may also load the newer one whole,
since their files have bytes that hold nothing. "Refused" is an error, or a dead process, and leaves it to a person.
"Wrong" is whatever else was loaded, without an error.
"""

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process would wait for the threads of its parent

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pretrain.checkpoint import save as our_save
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.restore import newest_intact, restore
from pretrain.config import EngineConfig, OptimizerConfig
from pretrain.engine.deepspeed import build_engine, start_distributed
from pretrain.engine.partitions import copy_masters_to_model, local_fragments
from pretrain.state import TrainState

KINDS = ("killed", "disk full", "cut", "bit flipped", "missing", "manifest torn")
OUTCOMES = {0: "right", 1: "wrong"}  # by the exit code of the process that loads; all others mean "refused"
HANG_SECONDS = 60
SIZE = 512  # 6 MB of weights and moments


class Ours:
    """What a run does."""

    index = ("checkpoints/step-00000002/manifest.json",)
    files = (*index, "checkpoints/step-00000002/rank-00000.safetensors")

    def save(self, engine: Any, run: Path, step: int) -> bool:
        saver = our_save.Saver(run, keep_last=2)
        saver.begin(engine, Manifest(TrainState(step), 1, {"training": ""}, [], {}, None))
        return saver.finish()

    def load(self, engine: Any, run: Path) -> bool:
        checkpoint, _ = newest_intact(run)
        return checkpoint is not None and bool(restore(engine, checkpoint, Manifest.load(checkpoint)))


class DeepSpeed:
    """`save_checkpoint` and `load_checkpoint`, which go by the file `latest`."""

    index = ("latest", "step-2/mp_rank_00_model_states.pt")
    files = (index[1], "step-2/zero_pp_rank_0_mp_rank_00_optim_states.pt")

    def save(self, engine: Any, run: Path, step: int) -> bool:
        return bool(engine.save_checkpoint(str(run), tag=f"step-{step}"))

    def load(self, engine: Any, run: Path) -> bool:
        return engine.load_checkpoint(str(run))[0] is not None


class Dcp:
    """`dcp.save` into a folder for each step, `dcp.load` from the newest folder."""

    index = ("2/.metadata",)
    files = (*index, "2/__0_0.distcp")

    def save(self, engine: Any, run: Path, step: int) -> bool:
        return bool(dcp.save(held_by(engine), checkpoint_id=run / str(step), no_dist=True))

    def load(self, engine: Any, run: Path) -> bool:
        dcp.load(held_by(engine), checkpoint_id=max(run.iterdir()), no_dist=True)
        copy_masters_to_model(engine)
        return True


Tool = Ours | DeepSpeed | Dcp
TOOLS: dict[str, Tool] = {"ours": Ours(), "DeepSpeed, `latest`": DeepSpeed(), "torch dcp, newest folder": Dcp()}


def is_saved(tool: Tool, run: Path) -> bool:
    """Say whether a tool has done its last act in saving the newer checkpoint."""
    last = run / tool.index[0]
    return last.read_text() == "step-2" if last.name == "latest" else last.exists()


def held_by(engine: Any) -> dict[str, Tensor]:
    """Return the engine's own masters and moments, by name."""
    return {f"{kind} of {part.name}": part.view(kind) for part in local_fragments(engine) for kind in part.kinds}


def state_of(engine: Any) -> list[Tensor]:
    """Return all that a load must bring back: masters, moments and the model's own weights."""
    return [*held_by(engine).values(), *(weight.detach().view(-1) for weight in engine.module.parameters())]


def bits_of(engine: Any) -> Tensor:
    """Return a copy of the state, as bits."""
    return torch.cat(state_of(engine)).view(torch.int32)


def in_child(work: Callable[[], bool], kill_after: float | None = None) -> tuple[int, float]:
    """Do the work in a forked process, which may be killed so many seconds after its begin.

    Returns:
        Its exit code (0 for true, 1 for false, 2 for an error; minus the signal that ended it), and its seconds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        signal.alarm(HANG_SECONDS)
        os.write(writing, b"begun")
        with suppress(BaseException):  # torch's CheckpointException is no Exception
            code = int(not work())
        os.close(writing)
        os._exit(code)
    os.close(writing)
    os.read(reading, 5)
    started = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    os.read(reading, 1)  # its end
    seconds = time.perf_counter() - started
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != -signal.SIGALRM, "a child process hung"
    return code, seconds


def harm(path: Path, kind: str, chance: random.Random) -> None:
    """Harm a file."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    if kind == "bit flipped":
        data[place] ^= 1 << chance.randrange(8)
    else:
        data[place:] = bytes(len(data) - place) if kind == "manifest torn" else b""
    path.write_bytes(data)
    if kind == "missing":
        path.unlink()


class Trial:
    """A tool, the runs it has saved undisturbed (up to step 1, and up to step 2), and what became of its faults."""

    def __init__(self, tool: Tool, engine: Any, work: Path) -> None:
        self.tool, self.engine, self.work = tool, engine, work
        (work / "0").mkdir(parents=True)
        self.chance = random.Random(0)
        self.states: dict[int, Tensor] = {}
        self.seconds: list[float] = []  # of undisturbed saves
        self.outcomes = Counter[tuple[str, str]]()
        self.left = Counter[tuple[str, str]]()  # by disturbed saves

    def save(self, step: int, rounds: int = 5) -> None:
        """Save the engine, as often as it takes to know the time, and prove that it is found again."""
        self.states[step] = bits_of(self.engine)
        for _ in range(rounds):
            run = self.copy(step - 1)
            code, seconds = in_child(partial(self.tool.save, self.engine, run, step))
            assert code == 0
            self.seconds.append(seconds)
        run.rename(self.work / str(step))
        assert self.load(self.copy(step), (step,)) == "right"

    def copy(self, step: int) -> Path:
        """Return a fresh run that is saved up to a step."""
        run = self.work / "run"
        shutil.rmtree(run, ignore_errors=True)
        return Path(shutil.copytree(self.work / str(step), run))

    def fault(self, kind: str) -> None:
        """Let one fault happen, load, and count what came of it."""
        if kind in ("killed", "disk full"):
            run = self.copy(1)
            expected: tuple[int, ...] = (2,) if self.disturb(run, kind) else (1,)
        else:
            run, expected = self.copy(2), (1,) if isinstance(self.tool, Ours) else (1, 2)
            names = self.tool.index if kind == "manifest torn" else self.tool.files
            harm(run / self.chance.choice(names), kind, self.chance)
        self.outcomes[kind, self.load(run, expected)] += 1

    def disturb(self, run: Path, kind: str) -> bool:
        """Save the newer checkpoint, killed or onto a full disk; return whether it was saved all the same."""
        largest = max((self.work / "2" / name).stat().st_size for name in self.tool.files)
        limit, before = self.chance.randrange(largest), {*run.rglob("*")}

        def save() -> bool:
            if kind == "disk full":  # Python ignores SIGXFSZ: writes fail, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return self.tool.save(self.engine, run, 2)

        kill_after = self.chance.uniform(0, statistics.median(self.seconds)) if kind == "killed" else None
        saved = in_child(save, kill_after)[0] == 0 or is_saved(self.tool, run)
        self.left[kind, "all" if saved else "nothing" if {*run.rglob("*")} == before else "a part"] += 1
        return saved

    def load(self, run: Path, expected: tuple[int, ...]) -> str:
        """Load a run in a process of its own; return what came of it."""

        def is_right() -> bool:
            for value in state_of(self.engine):
                value.fill_(torch.nan)
            if not self.tool.load(self.engine, run):
                raise FileNotFoundError
            return any(torch.equal(bits_of(self.engine), self.states[step]) for step in expected)

        return OUTCOMES.get(in_child(is_right)[0], "refused")


def report(trials: dict[str, Trial]) -> None:
    """Print what was loaded, and what disturbed saves had left."""
    print(f"right / refused / wrong\n\n| | {' | '.join(KINDS)} | all |\n|{'---|' * (len(KINDS) + 2)}")
    for tool, trial in trials.items():
        rows = [[trial.outcomes[kind, outcome] for outcome in ("right", "refused", "wrong")] for kind in KINDS]
        rows.append([sum(column) for column in zip(*rows, strict=True)])
        print(f"| {tool} | {' | '.join(' / '.join(map(str, row)) for row in rows)} |")
    for tool, trial in trials.items():
        left = ", ".join(f"{kind} {count}x {what}" for (kind, what), count in sorted(trial.left.items()))
        print(
            f"{tool}: a save takes {1000 * statistics.median(trial.seconds):.0f} ms; of the newer one was left: {left}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    count = parser.parse_args().faults
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    start_distributed()
    config = EngineConfig(zero_stage=1, precision="fp32", global_batch_size=8, micro_batch_size=8)
    engine = build_engine(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)), config, OptimizerConfig())
    our_save.RETRY_DELAYS = (0.01, 0.01, 0.01)  # this disk stays full
    for name in ("barrier", "all_reduce"):  # a forked process lacks gloo's threads, and has nobody to talk to
        setattr(dist, name, lambda *_, **__: None)
    with tempfile.TemporaryDirectory() as work:
        trials = {name: Trial(tool, engine, Path(work) / name) for name, tool in TOOLS.items()}
        for step in (1, 2):
            engine.backward(engine(torch.randn(8, SIZE)).square().mean())
            engine.step()
            for trial in trials.values():
                trial.save(step)
        for number in range(count):
            for trial in trials.values():
                trial.fault(KINDS[number % len(KINDS)])
    report(trials)


if __name__ == "__main__":
    main()
