"""The one error that a person can mend: its text is a single line that names the fault and the mend."""


class UserError(Exception):
    """Bad input or an impossible request. The commands print it without a traceback and leave with exit code 2."""
