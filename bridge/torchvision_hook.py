"""Any program of a CPU environment can import torchvision, as transformers does for most of its models.

    python -m bridge.torchvision_hook      # once, as `make setup` does: from now on this module is imported at start

It imports nothing more until somebody asks for torchvision. See `bridge.sglang_platform.mend_torchvision` for why.
"""

import sys
import sysconfig
from importlib.abc import MetaPathFinder
from pathlib import Path


class Finder(MetaPathFinder):
    """Finds nothing: what it does is done before the others look for torchvision."""

    def find_spec(self, name, path=None, target=None) -> None:
        if name == "torchvision":
            from bridge.sglang_platform import mend_torchvision

            mend_torchvision()


def install() -> Path:
    """write the file that has every Python of this environment import this module; returns its path"""
    path = Path(sysconfig.get_path("purelib")) / "kdjax_torchvision.pth"
    # An environment may outlive the package, and what stands in the way of every start must not fail.
    name, room = __spec__.name, __spec__.parent
    path.write_text(
        f"import importlib.util as u; u.find_spec({room!r}) and u.find_spec({name!r}) and __import__({name!r})\n"
    )
    return path


if __name__ == "__main__":
    print(install())
else:
    sys.meta_path.insert(0, Finder())
