"""Imported first of all: Ctrl-C ends the command without a traceback, also while torch is still being imported.

`cli.main` could catch an interrupt only after the imports, which take seconds, and before the interpreter shuts down.
"""

import os
import signal
import sys
from pathlib import PurePath

INTERRUPTED = 128 + signal.SIGINT


def _is_command() -> bool:
    """Is this the process of `pvt-fast` or `python -m pvt_fast`? "-m" is its name until the module is found."""
    program = (getattr(sys, "argv", None) or [""])[0]
    return program == "-m" or PurePath(program).stem == "pvt-fast"


# not where the system ignores it (nohup, the background of a script)
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
