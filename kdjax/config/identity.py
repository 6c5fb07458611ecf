"""Which runs are one and the same: what two configurations may differ in and still compute the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kdjax.config.groups import Config
from kdjax.config.read import to_dict
from kdjax.errors import UserError

# What may differ between the run that saved and the run that goes on: where things go, not what is computed.
FREE = {"output", "overwrite", "colocate", "log", "checkpoint", "mesh", "generate"} | {
    f"{group}.{key}"
    for group, keys in {
        "student": "remat attention",
        "train": "accumulate eval_every eval_rows eval_functions offload compilation_cache",
        "data": "workers on_bad_row",
        "teacher": "engine tp pp dp ep mem_fraction args threads lookahead batches_per_call start_timeout timeout "
        "restarts preflight resident",
        "rollout": "engine engines tp mem_fraction args threads bucket_bytes start_timeout timeout restarts resident "
        "show_every max_k3 on_long_prompt",
    }.items()
    for key in keys.split()
}


def refuse_other_config(saved: dict[str, Any], config: Config) -> None:
    """Raise UserError when a checkpoint was written by a configuration that computes something else."""
    differing = sorted(_differences(saved, to_dict(config)))
    if differing:
        raise UserError(
            f"{config.output} holds a checkpoint of another configuration (differs in {', '.join(differing)}); "
            "restore those values, choose another output, or start anew with overwrite=true"
        )


def identity(config: Config) -> str:
    """A word for all in ``config`` that decides what is computed: equal for runs that may go on from each other."""

    def kept(value: Any, prefix: str) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: kept(v, f"{prefix}{k}.") for k, v in sorted(value.items()) if f"{prefix}{k}" not in FREE}

    return hashlib.sha256(json.dumps(kept(to_dict(config), "")).encode()).hexdigest()[:16]


def _differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {*a, *b} if f"{prefix}{k}" not in FREE]
        return {d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}{k}.")}
    return set() if a == b else {prefix.rstrip(".")}
