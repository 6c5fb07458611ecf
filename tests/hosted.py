"""A SGLangEngine around a fake of SGLang's own engine: nothing is started."""

from typing import Any

from bridge.engine import EngineSpec
from bridge.sglang_engine import SGLangEngine, replicas


def hosted(fake: Any, spec: EngineSpec = EngineSpec("sglang", "model", "float32", "cpu")) -> SGLangEngine:
    """what drives SGLang, over ``fake``, which answers as ``sglang.Engine`` would"""
    made = object.__new__(SGLangEngine)
    made._engine, made._calls, made._updating = fake, 0, False
    made._spec, made._replicas, made._eos_ids = spec, replicas(spec), frozenset()
    return made
