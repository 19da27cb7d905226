"""The number of cores that this process may use. It imports no torch, because torch reads the number of threads."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "<microseconds> <period>", or "max <period>" without a quota


def available_cores() -> int:
    """Return the number of cores, which the process's affinity and a container's CPU quota may limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = CPU_QUOTA.read_text().partition(" ") if CPU_QUOTA.exists() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
