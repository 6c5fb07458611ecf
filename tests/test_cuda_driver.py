"""What is said to the NVIDIA driver: a stand-in with the signatures of cuda.h takes the calls, and keeps the memory."""

import ctypes
import mmap
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from types import SimpleNamespace

import numpy as np
import pytest

from bridge import cuda, dlpack
from bridge.errors import EngineError
from bridge.hidden_pool import HiddenPool

GPUS, TOTAL = 2, 64 * 2**20


class Driver:
    """Two GPUs of 64 MiB. ``contexts`` is the stack of current ones, ``held`` what is allocated, by address."""

    def __init__(self):
        self.contexts, self.held, self.opened, self.retained, self.fails = [], {}, [], [0] * GPUS, {}
        calls = {name.removeprefix("_"): getattr(self, name) for name in dir(self) if name.startswith("_cu")}
        self.library = SimpleNamespace(**{name: self._typed(name, call) for name, call in calls.items()})

    def _typed(self, name, call):
        prototype = CFUNCTYPE(c_int, *SIGNATURES[name])
        return prototype(lambda *arguments: self.fails.pop(name, 0) or call(*arguments) or 0)

    def device(self):
        return self.contexts[-1] - 1000  # everything below needs a context

    def _cuGetErrorString(self, status, text):
        text[0] = {2: b"out of memory", 201: b"invalid device context"}[status]

    def _cuDeviceGetCount(self, count):
        count[0] = GPUS

    def _cuDeviceGet(self, device, ordinal):
        device[0] = ordinal

    def _cuDeviceGetUuid(self, raw, device):
        raw.contents[:] = bytes([device + 1] * 16)

    def _cuDevicePrimaryCtxRetain(self, context, device):
        self.retained[device] += 1
        context[0] = 1000 + device

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        self.retained[device] -= 1

    def _cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context)

    def _cuCtxPopCurrent_v2(self, context):
        context[0] = self.contexts.pop()

    def _cuCtxSynchronize(self):
        self.device()

    def _cuMemGetInfo_v2(self, free, total):
        taken = sum(len(memory) for device, memory in self.held.values() if device == self.device())
        free[0], total[0] = TOTAL - taken, TOTAL

    def _cuMemAlloc_v2(self, pointer, size):
        if size > TOTAL:
            return 2
        memory = mmap.mmap(-1, size)
        memory.write(b"\xff" * size)  # a driver clears nothing
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.held[address] = self.device(), memory
        pointer[0] = address

    def _cuMemFree_v2(self, address):
        device, _ = self.held.pop(address)
        return 0 if device == self.device() else 201

    def _cuMemsetD8_v2(self, address, value, size):
        ctypes.memset(address, value, size)

    def _cuMemcpyDtoDAsync_v2(self, target, source, size, stream):
        assert stream is None  # the default one, which everything else on the device waits for
        ctypes.memmove(target, source, size)

    def _cuStreamSynchronize(self, stream):
        self.device()

    def _cuIpcGetMemHandle(self, handle, address):
        handle[0].reserved[:8] = list(address.to_bytes(8, "little", signed=True))

    def _cuIpcOpenMemHandle_v2(self, pointer, handle, flags):
        assert flags == 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only value there is
        pointer[0] = int.from_bytes(bytes(handle)[:8], "little")
        self.opened.append(pointer[0])

    def _cuIpcCloseMemHandle(self, address):
        self.opened.remove(address)


SIGNATURES = {
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetUuid": (POINTER(c_ubyte * 16), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamSynchronize": (c_void_p,),
    "cuIpcGetMemHandle": (POINTER(cuda._Handle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), cuda._Handle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
}


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: made.library)
    cuda._context.cache_clear()
    yield made
    cuda._context.cache_clear()
    assert made.contexts == []  # whatever was made current is taken back


def test_gpus_are_told_apart_by_uuid(driver):
    assert cuda.gpus() == ["01010101-0101-0101-0101-010101010101", "02020202-0202-0202-0202-020202020202"]


def test_memory_that_another_process_opens(driver):
    """zeroed, in whole units of what can be shared, on the GPU that was asked for, and gone with its last user"""
    owner = cuda.Allocation(1, 100)
    assert owner.size == cuda.IPC_UNIT and cuda.memory(1) == (TOTAL - cuda.IPC_UNIT, TOTAL)
    assert cuda.memory(0) == (TOTAL, TOTAL) and driver.retained == [0, 1]
    handle = owner.handle()
    assert len(handle) == cuda.HANDLE_BYTES
    other = cuda.Mapping(1, handle)
    source = np.arange(25, dtype=np.float32)
    owner.copy_in(128, source.ctypes.data, source.nbytes)
    owner.wait()
    seen = np.frombuffer((ctypes.c_char * 256).from_address(other.address), np.float32)
    assert seen[:32].tolist() == [0.0] * 32 and seen[32:57].tolist() == source.tolist()
    del other
    assert driver.opened == []
    del owner
    assert driver.held == {} and cuda.memory(1) == (TOTAL, TOTAL)


def test_a_gpu_that_is_full_is_named_with_what_is_free(driver):
    with pytest.raises(EngineError, match=r"0.06 GiB of weights do not fit on GPU 1 \(0.06 GiB free\): leave it more"):
        cuda.Allocation(1, TOTAL + 1, "weights")
    assert driver.held == {}


def test_what_the_driver_refuses_is_said_in_its_words(driver):
    driver.fails["cuMemGetInfo_v2"] = 201
    with pytest.raises(EngineError, match=r"cuMemGetInfo_v2 failed: invalid device context \(201\)"):
        cuda.memory(0)
    assert driver.retained == [0, 0]  # the context that was made to ask is given back


def test_a_pool_on_gpus_is_allocated_on_each_and_freed_with_it(driver):
    with HiddenPool.create(rows=64, width=8, dtype="float32", parts=2, on=[[0], [1]]) as pool:
        assert [device for device, _ in driver.held.values()] == [0, 1]
        assert [block.gpu for block in pool.spec.blocks] == cuda.gpus()
    del pool
    assert driver.held == {}


def test_a_view_of_a_gpus_memory_says_so(driver):
    """an importer is told CUDA and the number of the GPU; the stream it names needs no wait"""
    view = dlpack.DLPackView(None, 2**21, (4, 2), "bfloat16", (dlpack.CUDA, 1))
    assert view.__dlpack_device__() == (2, 1)
    capsule = view.__dlpack__(stream=1)
    tensor = dlpack._Managed.from_address(dlpack._get_pointer(id(capsule), b"dltensor")).tensor
    assert (tensor.data, tensor.device_type, tensor.device_id) == (2**21, 2, 1)
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.shape[:2]) == (4, 16, 1, [4, 2])
