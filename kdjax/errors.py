"""The one error that a person can mend: its text is a single line that names the fault and the mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or an impossible request. The commands print it without a traceback and leave with exit code 2."""


def first_line(error: BaseException) -> str:
    """What any error says, in one line: the first of its text, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
