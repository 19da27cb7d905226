"""Notice that another rank has failed, and tell all ranks through the run folder.

A failed rank leaves the others waiting in their next collective: with NCCL for ten minutes, with some launchers for
good. Each rank looks after the processes on its own machine, and the rank that examines all heartbeats looks for those
that report an error.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from pretrain.heartbeat.beats import LEAVE, Beat, read_beat, write_order
from pretrain.heartbeat.processes import is_alive, neighbors, read_processes


class Peers:
    """The other ranks of a run, as far as their failure concerns this rank.

    Args:
        run_dir: Run folder, which lists the processes of all ranks if it was claimed.
        rank: Rank of this process.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        processes = read_processes(run_dir)
        self._run_dir = run_dir
        # An order that is left over from an earlier start names another process.
        self._order = f"{LEAVE}\n{processes[0] if processes else ''}\n"
        self._neighbors = neighbors(processes, rank)

    def find_failure(self, order: str, beats: Sequence[Beat]) -> str:
        """Return why the run cannot go on, the same on all ranks; an empty string if it can.

        Args:
            order: Current order; LEAVE if another rank has noticed the failure first.
            beats: Last heartbeats of all ranks if this rank examines them, else none.
        """
        if order.startswith(self._order):
            return order.removeprefix(self._order)
        failed = next((beat for beat in beats if beat.has_failed), None)
        reason = _describe(failed) if failed else self._find_lost()
        if reason:
            self.tell_all(reason)
        return reason

    def tell_all(self, reason: str) -> None:
        """Order all ranks to leave. A full disk must not keep this rank from doing so itself."""
        with contextlib.suppress(OSError):
            write_order(self._run_dir, self._order + reason)

    def _find_lost(self) -> str:
        """Return a description of a rank on this machine whose process is gone, unless it ended without an error."""
        for rank, pid in [*self._neighbors.items()]:
            if not is_alive(pid):
                del self._neighbors[rank]
                beat = read_beat(self._run_dir, rank)
                if beat is None:
                    return f"rank {rank} (process {pid}) ended before its first heartbeat"
                if beat.has_failed or not beat.has_ended:
                    return _describe(beat)
        return ""


def _describe(beat: Beat) -> str:
    if beat.has_ended:
        return f"{beat} ended in step {beat.step} ({beat.outcome})"
    return f"{beat} died in phase {beat.phase} of step {beat.step}"
