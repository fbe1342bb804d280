"""The ends of the launcher, beside a usage error (exit code 2, raised by argparse).

Exception
 ├─ ArgumentError  a combination of flags that can't be served: exit code 1
 ├─ LaunchError    something failed at start or while serving: exit code 1
 └─ Stopped        the end in good order: exit code 0
"""

from __future__ import annotations


class ArgumentError(Exception):
    """A combination or a value that can't be served; printed as TGI prints it."""

    def __str__(self) -> str:
        return f'ArgumentValidation("{self.args[0]}")'


class LaunchError(Exception):
    """The text says what failed and what to do."""


class Stopped(Exception):
    """The text says why."""

    def __init__(self, reason: str = "Stopped by a signal") -> None:
        super().__init__(reason)
