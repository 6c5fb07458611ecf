"""GPU memory played by the host's: the same code allocates, describes, opens, fills and reads it."""

import ctypes

import numpy as np

from bridge.dlpack import CPU

MEMORY = {}


class Allocation:
    """What `bridge.cuda.Allocation` is, on the host. ``log`` tells of copies and waits in order."""

    def __init__(self, ordinal, size, what="hidden rows"):
        self.ordinal, self.size, self.log = ordinal, size, []
        whole = np.zeros(size + 64, np.uint8)
        self.bytes = whole[-whole.ctypes.data % 64 :][:size]
        self.address = self.bytes.ctypes.data
        MEMORY[self.handle()] = self

    def handle(self):
        return self.address.to_bytes(64, "little")

    def copy_in(self, offset, source, size):
        assert 0 <= offset and offset + size <= self.size
        self.log.append("copy")
        ctypes.memmove(self.address + offset, source, size)

    def wait(self):
        self.log.append("wait")


class Mapping:
    opened = 0

    def __init__(self, ordinal, handle):
        Mapping.opened += 1
        self.ordinal, self.owner = ordinal, MEMORY[handle]
        self.address = self.owner.address


def play(monkeypatch, module, gpus):
    """Give ``module`` these classes, and these names for its GPUs, in place of what it has of the driver's."""
    MEMORY.clear()
    Mapping.opened = 0
    played = {"Allocation": Allocation, "Mapping": Mapping, "gpus": lambda: gpus, "CUDA": CPU}
    for name in played.keys() & vars(module).keys():
        monkeypatch.setattr(module, name, played[name])
