"""Errors that a user can cause. The command line prints their message without a traceback."""


class UserError(ValueError):
    """An input cannot be used. The message says what was given, what is allowed and what to do."""


class UsageError(UserError):
    """A flag or a configuration key is wrong. The command line exits with 2 instead of 1."""


class CheckpointError(UserError):
    """A checkpoint cannot be used. The message names the file, the tensor, the expected and the actual value."""
