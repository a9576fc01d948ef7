"""Number types that carry their range: the parser of the configuration checks them, and
:func:`check_ranges` does where a section is built in Python.
"""

import math
import numbers
import re
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from megatron_tikmix.errors import InputError

if TYPE_CHECKING:  # they are numbers to whoever reads a section
    PositiveInt = int
    NonNegativeInt = int
    AtLeast4 = int
    AtLeast8 = int
    AtLeast16 = int
    Seed = int
    PositiveFloat = float
    NonNegativeFloat = float
    OpenUnitInterval = float
    FromZeroToBelowOne = float
else:
    from jsonargparse.typing import (
        NonNegativeInt,
        OpenUnitInterval,
        PositiveInt,
        restricted_number_type,
    )

    AtLeast4 = restricted_number_type("AtLeast4", int, [(">=", 4)])
    AtLeast8 = restricted_number_type("AtLeast8", int, [(">=", 8)])
    AtLeast16 = restricted_number_type("AtLeast16", int, [(">=", 16)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
    # jsonargparse's own admit infinity.
    PositiveFloat = restricted_number_type(
        "FinitePositiveFloat", float, [(">", 0), ("<", math.inf)]
    )
    NonNegativeFloat = restricted_number_type(
        "FiniteNonNegativeFloat", float, [(">=", 0), ("<", math.inf)]
    )
    FromZeroToBelowOne = restricted_number_type("FromZeroToBelowOne", float, [(">=", 0), ("<", 1)])

__all__ = [
    "AtLeast4",
    "AtLeast8",
    "AtLeast16",
    "FromZeroToBelowOne",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "check_ranges",
    "out_of_range",
]


def check_ranges(name: str, section: Any) -> None:
    """Refuse a number outside the range of its field's type; make the others plain numbers.

    Args:
        name: the section's name in the configuration; empty for the top level.
        section: a dataclass.

    Raises:
        InputError: names the first such field, its value and the range.
    """
    for field, hint in get_type_hints(type(section)).items():
        if _has_range(hint) and hasattr(section, field):
            key = f"{name}.{field}" if name else field
            # A frozen section's numbers too are made plain.
            object.__setattr__(section, field, _plain(key, hint, getattr(section, field)))


def _has_range(hint: Any) -> bool:
    return hasattr(hint, "_restrictions") or any(map(_has_range, get_args(hint)))


def _plain(key: str, hint: Any, value: Any) -> Any:
    """Return `value` with plain numbers, if `hint` admits it."""
    arms = get_args(hint) if not hasattr(hint, "_restrictions") else ()
    if get_origin(hint) is dict:
        return {each: _plain(key, arms[1], v) for each, v in value.items()}
    if arms:  # a union
        if value is None and type(None) in arms:
            return None
        fitting = [arm for arm in arms if (get_origin(arm) is dict) == isinstance(value, dict)]
        if fitting:
            return _plain(key, fitting[0], value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InputError(f"{key} ({value!r}) must be a number")
    if hint._type is int and not float(value).is_integer():
        raise InputError(f"{key} ({value}) must be a whole number")
    try:
        return hint._type(hint(value))
    except ValueError:
        raise InputError(out_of_range(key, value, hint._expression)) from None


def out_of_range(key: str, value: Any, restriction: str) -> str:
    """Return the sentence for a value outside its range.

    Args:
        restriction: jsonargparse's expression of the range, `v>0 and v<1`.
    """
    comparisons = {">": "above", ">=": "at least", "<": "below", "<=": "at most"}
    parts = re.findall(r"v(>=|<=|>|<)(\S+)", restriction)
    words = [f"{comparisons[sign]} {bound.removesuffix('.0')}" for sign, bound in parts]
    finite = ["finite" if word == "below inf" else word for word in words]
    return f"{key} ({value}) must be {' and '.join(finite)}"
