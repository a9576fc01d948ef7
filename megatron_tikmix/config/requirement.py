"""What every check of a configuration comes down to."""

from megatron_tikmix.errors import InputError


def require(condition: bool, name: str, problem: str) -> None:
    """Raise :class:`InputError` naming the field unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} {problem}")


# Reading it ------------------------------------------------------------------------------
