"""Values that depend on private records: computed with, and not looked at."""

from typing import Any, Generic, NoReturn, TypeVar

from ..errors import PrivacyError

T = TypeVar("T")


class Private(Generic[T]):
    """A value that depends on private records.

    It cannot be formatted, logged, compared, counted, used as a condition, copied or saved:
    each of these raises PrivacyError, which says nothing of the value. ``reveal`` gives it to what
    the guarantee covers, the mechanism itself; a test lists every place in the package that calls
    it. ``repr`` is a constant, so that tracebacks of other errors can be printed.
    """

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """The value. Nothing that it is part of may leave but through noise."""
        return self._value

    def __repr__(self) -> str:
        return "Private()"

    def _refuse(self, *_: Any) -> NoReturn:
        raise PrivacyError(
            "a value that depends on private records cannot be formatted, logged, compared, copied "
            "or saved; release it through a noisy query that is charged, or not at all"
        )

    __str__ = __format__ = __bytes__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __bool__ = __int__ = __float__ = __complex__ = __index__ = _refuse
    __len__ = __iter__ = __contains__ = __getitem__ = __array__ = _refuse
    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse
