"""The one exception family for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave; its text is one sentence naming field, value and fix.

    The command line prints that sentence without a traceback and exits with code 2.
    """
