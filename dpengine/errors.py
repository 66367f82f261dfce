"""The protocol error, and checks of numeric arguments that name argument, rule and value."""

import math
from numbers import Real


class PrivacyError(RuntimeError):
    """The privacy protocol was broken: going on would void the guarantee."""


def positive(**values: float) -> None:
    """Raise ValueError for any value that is not finite and > 0."""
    for name, value in values.items():
        _number(name, value)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number > 0, got {value}")


def not_negative(**values: float) -> None:
    """Raise ValueError for any value that is not finite and >= 0."""
    for name, value in values.items():
        _number(name, value)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def positive_int(**values: int) -> None:
    """Raise ValueError for any value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


def probability(**values: float) -> None:
    """Raise ValueError for any value outside (0, 1]."""
    for name, value in values.items():
        _number(name, value)
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "_STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
)
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch.fx.experimental")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, had no memory left. Known without importing torch."""
    if isinstance(error, PrivacyError):  # which has words of its own
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def is_of_compiler(error: BaseException) -> bool:
    """Whether the pass could not be recorded or compiled. Known without importing torch."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    return any(module.startswith(_COMPILERS) for module in modules)


def mend(error: BaseException) -> str | None:
    """A sentence for a failure of the machine, or of what a model is made of; None for others."""
    first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line}); to finetune, give a smaller --physical-batch-size, or "
            "--max-memory, or --gradient-checkpointing, none of which changes epsilon; elsewhere "
            "ask for less at once"
        )
    if is_of_compiler(error):
        cause = next((line for line in str(error).splitlines() if "ompiler" in line), first_line)
        return (
            f"the training pass cannot be compiled here ({cause.strip()}); install a C++ compiler, "
            "or give --compile eager, which is slower and changes nothing else"
        )
    if isinstance(error, OverflowError):
        cause = error.args[-1] if error.args else "overflow"
        return f"a number is too large to compute with ({cause}); give one nearer to 1"
    if isinstance(error, RuntimeError) and "meta tensor" in str(error):
        return "a tensor of the base model is missing from its files; fetch or export it again"
    return None


def printable(text: str, keep: str = "") -> str:
    """``text`` with each character that is no letter, sign or space written as its escape."""
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )
