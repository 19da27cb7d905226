"""Tasks for worker processes, which import them from here."""

import os
import time
from pathlib import Path


def note_and_sleep(folder: Path, number: int) -> int:
    """Leave a file with the process ID, then sleep for a minute."""
    (folder / str(os.getpid())).touch()
    time.sleep(60)
    return number
