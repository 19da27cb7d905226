"""Keep warnings of libraries, about which a user can do nothing, out of a run's output."""

import os
import sys
import warnings


def hide_warnings() -> None:
    """Hide Python's warnings here and in processes started later, unless -W or PYTHONWARNINGS asks for them.

    Our own messages are printed, never issued as warnings.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own, such as DDP's about unused parameters
