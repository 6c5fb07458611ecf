"""The one error an engine or the pool between engines can end in."""


class EngineError(RuntimeError):
    """an engine failed, died or missed a deadline; the text names which engine, what was asked and where its log is"""
