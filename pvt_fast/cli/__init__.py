"""The command `pvt-fast`. Imported before everything else, for `interrupt`: so the rest is imported when it runs."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, unless given the process's own; its exit status."""
    from .command import main as run

    return run(arguments)
