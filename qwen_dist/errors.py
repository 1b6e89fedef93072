"""The errors a user can cause: one readable line each, shown without a traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used: the message says what was given, what is allowed and what to do."""


class UsageError(UserError):
    """A flag or a configuration key is wrong; the command line exits with 2 instead of 1."""


class CheckpointError(UserError):
    """The checkpoint cannot be used as it is; the message names file, tensor, what was expected and what was found."""
