"""Memory that another process writes, handed to JAX or torch as an array without a copy (DLPack 0.8).

A view speaks the protocol by itself, through ctypes, so that the trainer needs no torch and bfloat16, which NumPy's own
exporter does not know, works as well. Whoever imports the view keeps its owner alive until the array is gone.
"""

import ctypes
import math

ALIGNMENT = 64  # JAX copies memory that starts anywhere else

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_TYPE_CODES = {"float32": 2, "bfloat16": 4}  # kDLFloat, kDLBfloat
CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
_FRESH = b"dltensor"  # a consumer that takes the tensor over renames the capsule


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


# What an importer holds: the struct, its shape and strides, the owner of the memory; by the struct's address.
_held: dict[int, tuple] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    if _held is not None:  # an array that outlives the interpreter's modules
        _held.pop(address, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _forget(capsule: int) -> None:
    # Runs when the capsule dies; the name tells whether anyone took over the tensor.
    if _is_valid(capsule, _FRESH):
        _delete(_get_pointer(capsule, _FRESH))


_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class DLPackView:
    """A dense row-major array at `address` that belongs to `owner`. Each importer gets a capsule of its own.

    device: DLPack's type and number of the device that views it. Any of JAX's CPU devices may view host memory.
    """

    def __init__(
        self, owner: object, address: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int] = (CPU, 0)
    ):
        """raises ValueError where `address` is not 64-byte aligned: an importer would copy instead of viewing"""
        if address % ALIGNMENT:
            raise ValueError(
                f"memory at {address:#x} is {address % ALIGNMENT} bytes past a {ALIGNMENT}-byte boundary and could "
                f"only be copied: take the rows from HiddenPool.lease, which aligns them"
            )
        self.owner, self.address, self.shape, self.dtype, self.device = owner, address, shape, dtype, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None) -> object:
        # No stream has to wait: whoever wrote the memory said so only once it was written.
        if copy or (dl_device is not None and tuple(dl_device) != self.device):
            raise BufferError("this memory is viewed where it lies: no copy and no other device")
        rank = len(self.shape)
        shape = (ctypes.c_int64 * rank)(*self.shape)
        strides = (ctypes.c_int64 * rank)(*(math.prod(self.shape[axis + 1 :]) for axis in range(rank)))
        tensor = _Tensor(
            self.address, *self.device, rank, _TYPE_CODES[self.dtype], 8 * ITEM_BYTES[self.dtype], 1, shape, strides, 0
        )
        managed = _Managed(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _held[address] = (managed, shape, strides, self.owner)
        return _new_capsule(address, _FRESH, ctypes.cast(_forget, ctypes.c_void_p))
