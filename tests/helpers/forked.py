"""What the children of stories about forks do. Imported by the processes that fork."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def in_child(work: Callable[[], str]) -> None:
    """Fork, and hold that `work` gives the process's second argument in the child."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() == sys.argv[2] else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
