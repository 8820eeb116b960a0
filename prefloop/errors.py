"""The one error that the command line turns into a line instead of a traceback."""


class UserError(ValueError):
    """A mistake of the user's: said in one line, with the place, what is allowed, what to do."""
