"""What libraries say that means nothing to whoever runs a command, kept off the screen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """For as long as a command runs.

    Orbax and grain log through absl what they also raise, and raising is what the commands show. After a save that
    failed, asyncio complains that tensorstore calls back into a loop that is closed. Everything else is let through.
    """
    absl, hook = logging.getLogger("absl"), sys.unraisablehook
    level = absl.level
    absl.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda seen: None if _is_late_callback(seen.exc_value) else hook(seen)
    try:
        yield
    finally:
        absl.setLevel(level)
        sys.unraisablehook = hook


def _is_late_callback(error: Any) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
