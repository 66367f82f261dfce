"""What the commands share: options from a dataclass, streams, errors as sentences, Ctrl-C."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, Any, TextIO, TypeVar

import tyro
from diffusers.utils import logging
from safetensors import SafetensorError

from .errors import PrivacyError, mend, printable

SettingsT = TypeVar("SettingsT")

_MENDABLE = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    PrivacyError,
    SafetensorError,
)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells use it."""

_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def run(
    prog: str,
    settings_type: type[SettingsT],
    command: Callable[[SettingsT], int | None],
    args: list[str] | None = None,
    defaults: Callable[[SettingsT], SettingsT | None] = lambda settings: None,
) -> int:
    """Parse the options and run ``command``; returns the exit status.

    ``defaults`` may give, for what was parsed, other values for the options that were left out.

    Options that do not exist, and errors that a user can mend, end in status 2 and a sentence. What
    is printed can be printed: names of files are not ours, and may hold what moves a terminal.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has not all letters
            stream.reconfigure(errors="backslashreplace")
    options = Annotated[settings_type, tyro.conf.OmitArgPrefixes]
    logging.disable_progress_bar()
    try:
        settings = tyro.cli(options, prog=prog, args=args)
        others = defaults(settings)
        if others is not None:
            settings = tyro.cli(options, prog=prog, args=args, default=others)
        with (
            contextlib.redirect_stdout(_Printable(sys.stdout)),
            contextlib.redirect_stderr(_Printable(sys.stderr, keep="\n\r")),
        ):
            return command(settings) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        sentence = mend(error)
        if sentence is None and isinstance(error, _MENDABLE):
            sentence = str(error) or type(error).__name__
        if sentence is None:
            raise
        for line in (f"error: {sentence}", *getattr(error, "__notes__", ())):
            print(printable(line), file=sys.stderr)
        return 2


class _Printable:
    """A stream through which only what is printable passes, and the characters ``keep``."""

    def __init__(self, stream: TextIO, keep: str = "\n") -> None:
        self._stream, self._keep = stream, keep

    def write(self, text: str) -> int:
        self._stream.write(printable(text, self._keep))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Interrupt:
    """Whether a stop was asked for. A second request stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def request(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def deferred() -> Iterator[Interrupt]:
    """Inside the context, SIGINT, SIGTERM and SIGHUP only set the flag that is yielded."""
    interrupt = Interrupt()
    # One that is ignored stays so: `nohup` and background jobs rely on it.
    signals = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt.request) for number in signals}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
