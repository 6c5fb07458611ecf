"""SGLang on a plain CPU: the out-of-tree platform behind the entry point `sglang.srt.platforms`.

SGLang asks every platform plugin whether it serves this machine. Ours does where there is no CUDA device: a platform
without kernels of its own makes every operator take its plain torch form, so the real engine, scheduler and batching
run on any machine. Where CUDA is available `activate` returns None and SGLang uses its own platform.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def activate() -> str | None:
    """the dotted name of the platform's class, or None where CUDA is available"""
    return None if torch.cuda.is_available() else "bridge.sglang_platform:CpuPlatform"


def mend_torchvision() -> None:
    """declare the two operators whose absence makes torchvision's CUDA wheels fail to import beside a CPU torch

    SGLang imports torchvision whether or not a model sees images. Nothing calls these operators here; declared and
    not implemented, a call would raise. Does nothing with a CUDA build of torch, which brings the real ones.
    """
    if torch.version.cuda is None:
        _declare_operators()


@functools.cache
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@functools.cache
def _cpu_platform() -> type:
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class CpuPlatform(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def is_pin_memory_available(self, device=None) -> bool:
            return False

    if "get_mha_kv_pool_cls" in vars(SRTPlatform):  # as in 0.5.17; later versions take these where none is named
        return _with_caches(CpuPlatform)
    return CpuPlatform


def _with_caches(platform: type) -> type:
    """the platform with the classes of SGLang's plain caches, which older versions have it name

    They are imported when they are asked for: the platform is made in the middle of SGLang's own import.
    """

    class CpuPlatform(platform):
        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_mla_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

            return MLATokenToKVPool

        def get_paged_allocator_cls(self) -> Callable[..., Any]:
            return _of_single_tokens

    return CpuPlatform


def _of_single_tokens(size: int, *, page_size: int, **more: Any) -> Any:
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    if page_size != 1:
        raise ValueError(f"page_size={page_size}: this SGLang has pages of one token on a CPU; leave it out")
    return TokenToKVPoolAllocator(size, **more)


def __getattr__(name: str):
    # Built on first use: sglang.srt.platforms loads this module while it is itself being imported.
    if name == "CpuPlatform":
        return _cpu_platform()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
