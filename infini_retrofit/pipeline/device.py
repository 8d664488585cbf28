"""Where and in which number type a run computes.

Knows no stage and no model.
"""

import ctypes
import os
import sys
from collections.abc import Callable

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD, _LARGEST_INT = 1 << 30, (1 << 31) - 1


def pick_device() -> torch.device:
    """Return this process's GPU where there is one, else the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Tell whether the processor has bfloat16 products (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def start_run() -> tuple[torch.device, torch.dtype]:
    """Pick device and number type, say so on stderr, and set the allocator up for tensors."""
    device = pick_device()
    dtype = pick_dtype(device)
    print(f"computing on {device.type} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    if device.type == "cpu":
        _keep_freed_memory()
        if dtype is torch.float32:
            print(
                "this processor has no bfloat16 products: expect about five times the time "
                "that the README names",
                file=sys.stderr,
            )
    return device, dtype


def return_freed_memory() -> None:
    """Give the system back what was freed and `start_run` lets glibc keep.

    What is resident then is what is used. Without glibc nothing changes.
    """
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors instead of returning it to the system.

    By default every tensor above a threshold is mapped anew, and the system spends more time on
    clearing its pages than some operations take. Without glibc nothing changes.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc; None where there is no glibc, or none with this function."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
