"""Exceptions that are printed as one sentence, without a traceback."""


class InputError(ValueError):
    """Bad input: one sentence that names the file or field, what is wrong, and the remedy.

    Entry points print it on one rank, without a traceback, and exit with code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot continue: one sentence that says what happened, and the remedy.

    It is raised on every rank. Entry points print it on one rank and exit with code 1.
    """


class RolloutError(TrainingError):
    """A rollout failed. It is raised on every rank, after training's state was restored."""


def require(condition: bool, name: str, problem: str) -> None:
    """Raise :class:`InputError`, naming the field, unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} {problem}")
