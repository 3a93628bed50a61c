"""The one error type that reaches a user as a sentence."""


class UserError(ValueError):
    """Bad input: the message says what is wrong and what to do.

    The command line prints it and exits with 2.
    """
