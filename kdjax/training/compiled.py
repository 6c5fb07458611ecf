"""Compiled programs are kept on disk, so that a run that starts or resumes does not compile what it has before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

from kdjax.errors import UserError

AUTO = "auto"
LEAST_SECONDS = 0.1  # of compiling: jax leaves out all below one second, and a start is made of many such programs


def keep_compiled(setting: str | None, tell: Callable[[str], None]) -> Path | None:
    """Let jax keep what it compiles from now on; returns the folder, None where nothing is kept.

    Programs are found by what they compute, jax's version and the device, so a folder may serve many runs, and may be
    deleted at any time. Whoever can write to it can make jax run what they like: a new folder is its owner's alone.

    Args:
        setting: ``train.compilation_cache``: a folder; ``auto``, the user's cache folder unless jax was told of one
            (``JAX_COMPILATION_CACHE_DIR``, ``jax.config``), which then stands; None leaves jax as it is.
        tell: takes a line where the user's cache folder cannot be written; the run then goes on without.

    Raises UserError where a folder that the configuration names cannot be made.
    """
    told = jax.config.jax_compilation_cache_dir
    if setting is None or (setting == AUTO and told):
        return Path(told) if told else None
    folder = platformdirs.user_cache_path("kdjax", appauthor=False) / "jax" if setting == AUTO else Path(setting)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"{folder} cannot be made ({error.strerror})"
        if setting != AUTO:
            raise UserError(f"train.compilation_cache: {why}; name another folder, auto or null") from None
        tell(f"compiled programs are not kept: {why}; train.compilation_cache names another folder")
        return None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    compilation_cache.set_cache_dir(str(folder))
    compilation_cache.reset_cache()  # an earlier run in this process may have used another folder
    return folder
