"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the parameter and the remedy; the command line prints it and exits non-zero."""
