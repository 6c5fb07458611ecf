"""Where do compiled programs go, who decides, and does a second start find them?"""

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kdjax.config import from_dict
from kdjax.config.identity import identity
from kdjax.errors import UserError
from kdjax.training.compiled import keep_compiled

KEYS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def untold(tmp_path, monkeypatch):
    """jax as it is outside the tests, which give it a folder of their own, and a user with an empty cache folder"""
    before = {key: getattr(jax.config, key) for key in KEYS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache"
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def refuse(line: str) -> None:
    raise AssertionError(line)


def test_what_jax_was_told_stands():
    told = jax.config.jax_compilation_cache_dir
    assert told and keep_compiled("auto", refuse) == keep_compiled(None, refuse) == Path(told)
    assert jax.config.jax_compilation_cache_dir == told


def test_programs_go_to_the_users_cache_folder_and_to_another_when_asked(untold, tmp_path):
    assert keep_compiled(None, refuse) is None and jax.config.jax_compilation_cache_dir is None
    assert keep_compiled("auto", refuse) == untold / "kdjax" / "jax"
    assert (untold / "kdjax" / "jax").stat().st_mode & 0o077 == 0
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert list((untold / "kdjax" / "jax").glob("jit__lambda*"))
    other = tmp_path / "other"
    assert keep_compiled(str(other), refuse) == other
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x + 2).lower(1.0).compile()
    assert len(list(other.glob("jit__lambda*-cache"))) == 1
    assert keep_compiled("auto", refuse) == other  # an earlier run in this process


def test_a_folder_that_cannot_be_made_costs_the_cache_or_is_refused(untold, tmp_path):
    (tmp_path / "cache").write_text("a file")
    said = []
    assert keep_compiled("auto", said.append) is None and jax.config.jax_compilation_cache_dir is None
    assert len(said) == 1 and "Not a directory" in said[0]
    with pytest.raises(UserError, match=r"train.compilation_cache: .*cache/here cannot be made"):
        keep_compiled(str(tmp_path / "cache" / "here"), refuse)


def test_a_run_may_resume_with_another_cache():
    values = {"student": {"path": "s"}, "data": {"train": [{"path": "x"}]}}
    one, other = from_dict(values), from_dict(values | {"train": {"compilation_cache": None}})
    assert one.train.compilation_cache == "auto" and identity(one) == identity(other)
