"""How much of a supervised run's time went into training, and where the rest went."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.files import atomic_write
from pretrain.heartbeat.beats import START
from pretrain.outcome import Outcome

GOODPUT_FILE = "goodput.json"
COMPUTE_PHASES = ("forward", "backward", "step", "report")


@dataclass
class Attempt:
    """One start of the command and how it ended.

    Attributes:
        outcome: Outcome of the attempt.
        exit_code: Exit code of the command; a launcher may have replaced the ranks' own.
        wall_seconds: Seconds from the start of the command to its end.
        phase_seconds: Seconds that rank 0 spent in each phase.
        first_step: Step of the checkpoint that the attempt started from.
        last_step: Step that the attempt reached.
        saved_step: Step of the newest checkpoint at the end of the attempt.
        world_size: Number of ranks that wrote a heartbeat; 0 if none started.
    """

    outcome: Outcome
    exit_code: int
    wall_seconds: float
    phase_seconds: dict[str, float]
    first_step: int
    last_step: int
    saved_step: int
    world_size: int = 0

    @property
    def compute_seconds(self) -> float:
        """Seconds spent on training steps, including those that were lost."""
        return sum(self.phase_seconds.get(phase, 0.0) for phase in COMPUTE_PHASES)

    @property
    def lost_seconds(self) -> float:
        """Seconds spent on training steps after the newest checkpoint, which the next attempt repeats."""
        num_steps = self.last_step - self.first_step
        num_lost = max(0, self.last_step - max(self.saved_step, self.first_step))
        return self.compute_seconds * num_lost / num_steps if num_steps else 0.0

    @property
    def seconds_since_first_step(self) -> float:
        """Seconds in all phases after the start-up."""
        return sum(seconds for phase, seconds in self.phase_seconds.items() if phase != START)


@dataclass
class Goodput:
    """Time account of all attempts.

    Attributes:
        attempts: All attempts so far, in order.
        pause_seconds: Seconds spent waiting between attempts.
    """

    attempts: list[Attempt] = field(default_factory=list)
    pause_seconds: float = 0.0

    def add(self, attempt: Attempt) -> None:
        """Count an attempt."""
        self.attempts.append(attempt)

    def add_pause(self, seconds: float) -> None:
        """Count the time between two attempts."""
        self.pause_seconds += seconds

    def shares(self) -> dict[str, float]:
        """Return the seconds spent on each kind of work; their sum is the total time."""
        total = sum(attempt.wall_seconds for attempt in self.attempts) + self.pause_seconds
        lost = sum(attempt.lost_seconds for attempt in self.attempts)
        first_start = (
            self.attempts[0].wall_seconds - self.attempts[0].seconds_since_first_step if self.attempts else 0.0
        )
        known = {
            "compute": sum(attempt.compute_seconds for attempt in self.attempts) - lost,
            "data wait": self._phase_seconds("data"),
            "save stall": self._phase_seconds("save"),
            "evaluation": self._phase_seconds("evaluate"),
            "lost work": lost,
            "first start": max(0.0, first_start),
        }
        return {**known, "restart": total - sum(known.values())}

    def report(self) -> str:
        """Return the time account as one line."""
        shares, num_restarts = self.shares(), len(self.attempts) - 1
        total = sum(shares.values())
        restarts = f"{num_restarts} {'restart' if num_restarts == 1 else 'restarts'}"
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in shares.items())
        return f"goodput {shares['compute'] / total:.1%} of {total:.0f} s, {restarts}: {parts}"

    def save(self, run_dir: Path) -> None:
        """Write the time account to goodput.json in the run folder."""
        content = {"seconds": self.shares(), "attempts": [asdict(attempt) for attempt in self.attempts]}
        atomic_write(run_dir / GOODPUT_FILE, json.dumps(content, indent=2), durable=False)

    def _phase_seconds(self, phase: str) -> float:
        return sum(attempt.phase_seconds.get(phase, 0.0) for attempt in self.attempts)
