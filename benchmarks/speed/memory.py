"""The memory of this process, in MiB: what is resident, and the most that was since the peak was last set back.

    VmRSS    resident now
    VmHWM    its largest value; writing 5 to /proc/self/clear_refs sets it back to VmRSS        (proc(5), Linux)
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> float:
    """What is resident now."""
    return _read("VmRSS")


def reset_peak(device: str = "cpu") -> None:
    """Give freed memory back, and let the peak begin at what is in use now.

    Raises:
        OSError: the system has no such file, or does not let it be written.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    # Freed blocks stay with the C library and would count as used.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5", encoding="ascii")


def peak(device: str = "cpu") -> float:
    """The most that was in use since `reset_peak`: of the process, or of tensors on the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return _read("VmHWM")


def in_use(device: str = "cpu") -> float:
    """What is in use now, as `peak` counts it."""
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else resident()


def _read(name: str) -> float:
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
