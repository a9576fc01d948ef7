"""Exceptions that are printed as one sentence, without a traceback."""


class InputError(ValueError):
    """Bad input: one sentence that names the file or field, what is wrong, and the remedy.

    Entry points print it on one rank, without a traceback, and exit with code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on: one sentence with what happened and the remedy.

    Raised on every rank alike. Entry points print it on one rank and exit with code 1.
    """


class RolloutError(TrainingError):
    """A rollout failed: raised on every rank alike, with training's state put back."""


def require(condition: bool, name: str, problem: str) -> None:
    """Raise :class:`InputError` naming the field unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} {problem}")
