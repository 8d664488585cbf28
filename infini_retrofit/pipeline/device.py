"""Device and number type of a run, and the processor's memory allocator.

Knows no stage and no model.
"""

import ctypes
import os
import sys
from collections.abc import Callable

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def pick_device() -> torch.device:
    """Return this process's GPU if there is one, else the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if has_bfloat16 else torch.float32


def start_run() -> tuple[torch.device, torch.dtype]:
    """Pick device and number type, print both and tune the allocator."""
    device = pick_device()
    dtype = pick_dtype(device)
    print(f"computing on {device.type} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    if device.type == "cpu":
        _keep_freed_memory()
        if dtype is torch.float32:
            note = "no bfloat16 products: the README names its minutes too"
            print(f"this processor has {note}", file=sys.stderr)
    return device, dtype


def return_freed_memory() -> None:
    """Return to the system the freed memory that glibc keeps after `start_run`."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of large tensors.

    By default glibc maps every large tensor anew. The system then clears its pages, which takes
    longer than some operations.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc; None without glibc or without this function."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
