"""What the commands share: options from a dataclass, and errors as one sentence."""

import sys
from collections.abc import Callable
from typing import Annotated, TypeVar

import tyro
from diffusers.utils import logging
from safetensors import SafetensorError

from .errors import PrivacyError

SettingsT = TypeVar("SettingsT")

_MENDABLE = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    MemoryError,
    PrivacyError,
    SafetensorError,
)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells use it."""


def run(
    prog: str,
    settings_type: type[SettingsT],
    command: Callable[[SettingsT], int | None],
    args: list[str] | None = None,
) -> int:
    """Parse the options and run ``command``; returns the exit status.

    Options that do not exist, and errors that a user can mend, end in status 2 and a sentence.
    """
    settings = tyro.cli(Annotated[settings_type, tyro.conf.OmitArgPrefixes], prog=prog, args=args)
    logging.disable_progress_bar()
    try:
        return command(settings) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except _MENDABLE as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 2
