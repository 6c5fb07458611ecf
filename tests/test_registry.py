"""Names in a configuration: registered words, files, and what is said of the rest."""

import pytest

from kdjax.errors import UserError
from kdjax.registry import Registry


@pytest.fixture
def losses():
    registry = Registry("divergence", "distill.loss")
    registry.register("jsd")(min)
    registry.register("kl")(max)
    return registry


def test_by_name_and_by_file(losses, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine():\n    return 5\n")
    assert losses.get("kl") is max
    assert losses.get(f"{file}:mine")() == 5
    assert losses.get(f"{file}:mine") is losses.get(f"{file}:mine")


def test_unknown_names_list_the_known(losses, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(): ...\n")
    with pytest.raises(UserError, match=r"distill.loss: no divergence 'jds'; did you mean 'jsd'\? known: jsd, kl"):
        losses.get("jds")
    with pytest.raises(UserError, match="nowhere.py is not a file"):
        losses.get("nowhere.py:f")
    with pytest.raises(UserError, match="has no 'yours'; it defines mine"):
        losses.get(f"{file}:yours")


def test_a_name_is_given_once(losses):
    losses.register("kl")(max)  # the same object again, as when a module is reloaded
    with pytest.raises(ValueError, match="'kl' is already registered"):
        losses.register("kl")(sum)
