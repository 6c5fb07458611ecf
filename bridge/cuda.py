"""GPU memory that two processes share: plain allocations, their IPC handles, and what the driver says is free.

Speaks to the driver itself, through ctypes, so that the trainer needs no torch for it and the allocation belongs to no
framework's allocator: JAX's and torch's own blocks cannot be exported, or move. GPUs are matched by UUID, never by rank
or ordinal, since two processes may number them differently.
"""

import ctypes
import functools
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from bridge.errors import EngineError

HANDLE_BYTES = 64
_DEFAULT_STREAM = ctypes.c_void_p(None)
_PEER_ACCESS = 1  # cuIpcOpenMemHandle: reach other GPUs over NVLink where need be


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_byte * HANDLE_BYTES)]


IPC_UNIT = 2**21  # what is smaller shares a block with others, and its handle opens the whole block


class Allocation:
    """`size` zeroed bytes or a few more for `what` on GPU `ordinal`, freed when nothing refers to this any more."""

    def __init__(self, ordinal: int, size: int, what: str = "hidden rows"):
        """raises EngineError where the GPU has not so much free"""
        self.ordinal, self.size = ordinal, -(-size // IPC_UNIT) * IPC_UNIT
        pointer = ctypes.c_uint64()
        with _on(ordinal):
            try:
                _call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(self.size))
            except EngineError as error:
                raise EngineError(
                    f"{size / 2**30:.2f} GiB of {what} do not fit on GPU {ordinal} "
                    f"({memory(ordinal)[0] / 2**30:.2f} GiB free): leave it more, as by XLA_PYTHON_CLIENT_MEM_FRACTION "
                    f"or a smaller mem_fraction of the engines there"
                ) from error
            self.address = pointer.value
            _call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(self.size))
            _call("cuCtxSynchronize")

    def handle(self) -> bytes:
        """what another process opens with `Mapping`"""
        handle = _Handle()
        with _on(self.ordinal):
            _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.address))
        return bytes(handle)

    def copy_in(self, offset: int, source: int, size: int) -> None:
        """start copying `size` bytes from address `source` on the same GPU to `offset`; `wait` for them"""
        with _on(self.ordinal):
            target = ctypes.c_uint64(self.address + offset)
            _call("cuMemcpyDtoDAsync_v2", target, ctypes.c_uint64(source), ctypes.c_size_t(size), _DEFAULT_STREAM)

    def wait(self) -> None:
        """return when everything that was copied in has arrived"""
        with _on(self.ordinal):
            _call("cuStreamSynchronize", _DEFAULT_STREAM)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            with _on(self.ordinal):
                _call("cuMemFree_v2", ctypes.c_uint64(self.address))


class Mapping:
    """Another process's `Allocation`, for as long as this object lives. The owner must outlive it."""

    def __init__(self, ordinal: int, handle: bytes):
        self.ordinal = ordinal
        pointer = ctypes.c_uint64()
        with _on(ordinal):
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), _Handle.from_buffer_copy(handle), _PEER_ACCESS)
        self.address = pointer.value

    def __del__(self) -> None:
        if hasattr(self, "address"):
            with _on(self.ordinal):
                _call("cuIpcCloseMemHandle", ctypes.c_uint64(self.address))


def gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees, in its own order; none without a driver"""
    if _driver() is None:
        return []
    count = ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(count))
    return [_uuid(ordinal) for ordinal in range(count.value)]


def memory(ordinal: int) -> tuple[int, int]:
    """free and total bytes of a GPU, as the driver counts them: what frameworks hold in reserve is not free

    A context is needed to ask, a few hundred MB, and goes again unless this process has one there already.
    """
    free, total, device = ctypes.c_size_t(), ctypes.c_size_t(), _device(ordinal)
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        with _current(context):
            _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    finally:
        _call("cuDevicePrimaryCtxRelease_v2", device)
    return free.value, total.value


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def _call(name: str, *arguments: object) -> None:
    driver = _driver()
    if driver is None:
        raise EngineError("no NVIDIA driver answers here (libcuda.so.1), so there is no GPU memory to share")
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise EngineError(f"the NVIDIA driver's {name} failed: {(text.value or b'?').decode()} ({status})")


def _on(ordinal: int) -> AbstractContextManager[None]:
    """the GPU's primary context, which frameworks in this process use too, made current for a moment"""
    return _current(_context(ordinal))


@contextmanager
def _current(context: ctypes.c_void_p) -> Iterator[None]:
    _call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _context(ordinal: int) -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device(ordinal))
    return context


def _device(ordinal: int) -> ctypes.c_int:
    device = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
    return device


def _uuid(ordinal: int) -> str:
    raw = (ctypes.c_ubyte * 16)()
    _call("cuDeviceGetUuid", ctypes.byref(raw), _device(ordinal))
    return str(uuid.UUID(bytes=bytes(raw)))
