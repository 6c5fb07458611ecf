"""What an engine, or the pool between engines, can end in."""


class EngineError(RuntimeError):
    """an engine failed, died or missed a deadline; the text names which engine, what was asked and where its log is"""


class PromptError(ValueError):
    """a prompt that an engine cannot take: too long for it, or of ids that its model does not know"""
