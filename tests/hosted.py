"""A SGLangEngine around a fake of SGLang's own engine: nothing is started."""

from typing import Any

from bridge.sglang_engine import SGLangEngine


def hosted(fake: Any) -> SGLangEngine:
    """what drives SGLang, over ``fake``, which answers as ``sglang.Engine`` would"""
    made = object.__new__(SGLangEngine)
    made._engine, made._calls, made._updating = fake, 0, False
    return made
