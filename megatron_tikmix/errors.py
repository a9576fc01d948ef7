"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input: one sentence that names the file or field, what is wrong, and the remedy.

    Entry points print it on one rank, without a traceback, and exit with code 2.
    """
