"""Damage checkpoints in 300 runs and check what is loaded, compared with DeepSpeed's checkpoints and torch's dcp.

    python benchmarks/torn.py                           # one rank on the CPU, two to three minutes

A run has an older and a newer checkpoint. The newer one is damaged in one of six ways:

- killed: the process that saves it is killed by SIGKILL at a random moment during the save;
- disk full: during the save, the kernel refuses all writes beyond a random byte of a file;
- truncated, bit flipped, missing: one of its files is damaged after the save, at a random byte;
- manifest torn: after the save, all bytes from a random one on become zero in our `manifest.json`, in DeepSpeed's
  `latest` or model file, or in dcp's `.metadata`.

Then a process whose weights and moments are all NaN loads the run. Ours and DeepSpeed choose the checkpoint themselves;
dcp loads the newest folder. There are three outcomes:

- right: it loads the newest intact state, bit for bit: weights, fp32 masters and moments. After an interrupted save,
  that is the newer checkpoint if the save returned or had taken its last action (renaming the folder, writing `latest`
  or `.metadata`), otherwise the older one. After damage to a file it is the older one; for DeepSpeed and dcp the newer
  one counts as well, because some bytes of their files are unused.
- refused: it fails with an error, or the process dies; a person has to choose a checkpoint.
- wrong: it silently loads anything else.
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
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process would wait for threads that exist only in its parent

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

KINDS = ("killed", "disk full", "truncated", "bit flipped", "missing", "manifest torn")
OUTCOMES = {0: "right", 1: "wrong"}  # by exit code of the loading process; any other code means "refused"
HANG_SECONDS = 60
SIZE = 512  # width of both layers: 6 MB of weights and moments


class Ours:
    """Save and load as a training run does."""

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
    """Save and load with `save_checkpoint` and `load_checkpoint`, which use the file `latest`."""

    index = ("latest", "step-2/mp_rank_00_model_states.pt")
    files = (index[1], "step-2/zero_pp_rank_0_mp_rank_00_optim_states.pt")

    def save(self, engine: Any, run: Path, step: int) -> bool:
        return bool(engine.save_checkpoint(str(run), tag=f"step-{step}"))

    def load(self, engine: Any, run: Path) -> bool:
        return engine.load_checkpoint(str(run))[0] is not None


class Dcp:
    """Save with `dcp.save` into one folder per step, and load with `dcp.load` from the newest folder."""

    index = ("2/.metadata",)
    files = (*index, "2/__0_0.distcp")

    def save(self, engine: Any, run: Path, step: int) -> bool:
        return bool(dcp.save(masters_and_moments(engine), checkpoint_id=run / str(step), no_dist=True))

    def load(self, engine: Any, run: Path) -> bool:
        dcp.load(masters_and_moments(engine), checkpoint_id=max(run.iterdir()), no_dist=True)
        copy_masters_to_model(engine)
        return True


Tool = Ours | DeepSpeed | Dcp
TOOLS: dict[str, Tool] = {"ours": Ours(), "DeepSpeed, `latest`": DeepSpeed(), "torch dcp, newest folder": Dcp()}


def is_saved(tool: Tool, run: Path) -> bool:
    """Return whether a tool has taken the last action of saving the newer checkpoint."""
    last = run / tool.index[0]
    return last.read_text() == "step-2" if last.name == "latest" else last.exists()


def masters_and_moments(engine: Any) -> dict[str, Tensor]:
    """Return views of the engine's fp32 masters and moments, by name."""
    return {f"{kind} of {part.name}": part.view(kind) for part in local_fragments(engine) for kind in part.kinds}


def state_of(engine: Any) -> list[Tensor]:
    """Return views of everything that a load must restore: masters, moments and the model's weights."""
    return [*masters_and_moments(engine).values(), *(weight.detach().view(-1) for weight in engine.module.parameters())]


def bits_of(engine: Any) -> Tensor:
    """Return a copy of the engine's state as int32 bit patterns."""
    return torch.cat(state_of(engine)).view(torch.int32)


def in_child(work: Callable[[], bool], kill_after: float | None = None) -> tuple[int, float]:
    """Run a function in a forked process.

    Args:
        work: Function to run.
        kill_after: Seconds after which the process is killed by SIGKILL, or None to let it end.

    Returns:
        Exit code (0 if the function returned true, 1 if false, 2 after an error, minus the number of the signal that
        ended the process) and duration in seconds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        signal.alarm(HANG_SECONDS)
        os.write(writing, b"start")
        with suppress(BaseException):  # torch's CheckpointException is not an Exception
            code = int(not work())
        os.close(writing)
        os._exit(code)
    os.close(writing)
    os.read(reading, 5)
    started = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    os.read(reading, 1)  # returns when the child has ended and its end of the pipe is closed
    seconds = time.perf_counter() - started
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != -signal.SIGALRM, "a child process hung"
    return code, seconds


def damage(path: Path, kind: str, generator: random.Random) -> None:
    """Damage a file in the given way, at a random byte."""
    data = bytearray(path.read_bytes())
    offset = generator.randrange(len(data))
    if kind == "bit flipped":
        data[offset] ^= 1 << generator.randrange(8)
    else:
        data[offset:] = bytes(len(data) - offset) if kind == "manifest torn" else b""
    path.write_bytes(data)
    if kind == "missing":
        path.unlink()


class Trial:
    """All faults of one tool, and their outcomes.

    Args:
        tool: Tool that saves and loads.
        engine: Engine to save and to load into.
        work: Folder for its runs; the folders "1" and "2" hold the intact runs up to step 1 and step 2.
    """

    def __init__(self, tool: Tool, engine: Any, work: Path) -> None:
        self.tool, self.engine, self.work = tool, engine, work
        (work / "0").mkdir(parents=True)
        self.generator = random.Random(0)
        self.states: dict[int, Tensor] = {}
        self.seconds: list[float] = []  # durations of undisturbed saves
        self.outcomes = Counter[tuple[str, str]]()
        self.written = Counter[tuple[str, str]]()  # by interrupted saves: kind, and how much of the checkpoint

    def save(self, step: int, rounds: int = 5) -> None:
        """Save the engine `rounds` times to learn how long a save takes, and check that it can be loaded."""
        self.states[step] = bits_of(self.engine)
        for _ in range(rounds):
            run = self.copy(step - 1)
            code, seconds = in_child(partial(self.tool.save, self.engine, run, step))
            assert code == 0
            self.seconds.append(seconds)
        run.rename(self.work / str(step))
        assert self.load(self.copy(step), (step,)) == "right"

    def copy(self, step: int) -> Path:
        """Return a fresh copy of the intact run up to a step."""
        run = self.work / "run"
        shutil.rmtree(run, ignore_errors=True)
        return Path(shutil.copytree(self.work / str(step), run))

    def run_fault(self, kind: str) -> None:
        """Inject one fault, load the run and count the outcome."""
        if kind in ("killed", "disk full"):
            run = self.copy(1)
            expected: tuple[int, ...] = (2,) if self.interrupt_save(run, kind) else (1,)
        else:
            run, expected = self.copy(2), (1,) if isinstance(self.tool, Ours) else (1, 2)
            names = self.tool.index if kind == "manifest torn" else self.tool.files
            damage(run / self.generator.choice(names), kind, self.generator)
        self.outcomes[kind, self.load(run, expected)] += 1

    def interrupt_save(self, run: Path, kind: str) -> bool:
        """Kill the save of the newer checkpoint or fill its disk; return whether the checkpoint is complete anyway."""
        largest = max((self.work / "2" / name).stat().st_size for name in self.tool.files)
        limit, before = self.generator.randrange(largest), {*run.rglob("*")}

        def save() -> bool:
            if kind == "disk full":  # Python ignores SIGXFSZ: writes fail, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return self.tool.save(self.engine, run, 2)

        kill_after = self.generator.uniform(0, statistics.median(self.seconds)) if kind == "killed" else None
        saved = in_child(save, kill_after)[0] == 0 or is_saved(self.tool, run)
        self.written[kind, "complete" if saved else "absent" if {*run.rglob("*")} == before else "partial"] += 1
        return saved

    def load(self, run: Path, expected: tuple[int, ...]) -> str:
        """Load a run in another process and return the outcome: right, refused or wrong."""

        def is_right() -> bool:
            for value in state_of(self.engine):
                value.fill_(torch.nan)
            if not self.tool.load(self.engine, run):
                raise FileNotFoundError
            return any(torch.equal(bits_of(self.engine), self.states[step]) for step in expected)

        return OUTCOMES.get(in_child(is_right)[0], "refused")


def report(trials: dict[str, Trial]) -> None:
    """Print the outcomes, and how much interrupted saves had written."""
    print(f"right / refused / wrong\n\n| | {' | '.join(KINDS)} | all |\n|{'---|' * (len(KINDS) + 2)}")
    for tool, trial in trials.items():
        rows = [[trial.outcomes[kind, outcome] for outcome in ("right", "refused", "wrong")] for kind in KINDS]
        rows.append([sum(column) for column in zip(*rows, strict=True)])
        print(f"| {tool} | {' | '.join(' / '.join(map(str, row)) for row in rows)} |")
    for tool, trial in trials.items():
        written = ", ".join(f"{kind} {count}x {amount}" for (kind, amount), count in sorted(trial.written.items()))
        milliseconds = 1000 * statistics.median(trial.seconds)
        print(f"{tool}: a save takes {milliseconds:.0f} ms; newer checkpoint after an interrupted save: {written}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300, help="number of faults per tool, spread over the six kinds")
    count = parser.parse_args().faults
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    start_distributed()
    config = EngineConfig(zero_stage=1, precision="fp32", global_batch_size=8, micro_batch_size=8)
    engine = build_engine(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)), config, OptimizerConfig())
    our_save.RETRY_DELAYS = (0.01, 0.01, 0.01)  # retries wait less, because the disk stays full
    # A forked process lacks gloo's threads; with one rank, collectives have nothing to do.
    for name in ("barrier", "all_reduce"):
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
                trial.run_fault(KINDS[number % len(KINDS)])
    report(trials)


if __name__ == "__main__":
    main()
