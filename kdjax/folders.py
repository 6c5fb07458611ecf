"""Where is a model? Every path and hub id that a user names is turned into a local folder here, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from kdjax.errors import UserError, first_line

# Python files are fetched for models that bring their own code; it runs with trust_remote_code only.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path_or_id: str | Path, weights: bool = True) -> Path:
    """The local folder of a model: a folder as it is, a hub id through huggingface_hub's cache.

    ``weights=False`` fetches configuration and tokenizer only. Raises UserError where neither exists.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"model: {name} is neither a folder nor a hub id (owner/name)")
    patterns = _PATTERNS if weights else _PATTERNS[1:]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model: no folder {name}, and the hub does not give it: {first_line(error)}") from None
