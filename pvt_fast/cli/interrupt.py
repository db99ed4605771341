"""Imported first of all: neither Ctrl-C nor too little memory shows a traceback while the command imports torch.

`command.main` can catch either only after the imports, which take seconds, and before the interpreter shuts down.
"""

import os
import signal
import sys
from types import TracebackType

INTERRUPTED = 128 + signal.SIGINT


def _is_command() -> bool:
    """Is this the process of `pvt-fast` or `python -m pvt_fast`, not of another program that imports the package?"""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # until the module is found; its name stands before its arguments
        return sys.orig_argv[-len(arguments)].removeprefix("-m") == "pvt_fast"
    return os.path.basename(arguments[0]) == "pvt-fast"


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, MemoryError) or "failed to map segment" in str(error):
        print(f"pvt-fast: error: out of memory during the imports ({str(error) or kind.__name__})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if _is_command():
    sys.excepthook = _tell
    # not where the system ignores it (nohup, the background of a script)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
