"""Names of the lane-planar matmul's configurations on CUDA: ``"wgmma 4/2 C2 cl64"``, ``"direct t4 w16x1 C2 cl64"``.

``"wgmma 4/1 C1 cl132 + 16 wgmma 4/2 C6 cl16"`` is two launches, the second of which has the last 16 row blocks.

The library knows which there are, without a GPU; where it was not built there are none. `lane_planar/matmul_config.h`
says what names mean.
"""

from __future__ import annotations

import ctypes
import functools

from jaxzip.ffi.libraries import cuda_library

#: Most of them that are worth timing for one product.
MOST = 6


@functools.lru_cache(maxsize=256)
def configurations(rows: int, m: int, k: int) -> tuple[str, ...]:
    """For x ``[rows, K]`` and a weight ``[M, K]``: what is chosen unasked, then the best others by the kernels' models.

    Empty where there is no library, and for more rows than a configuration can be given for (256).
    """
    try:
        listed = cuda_library().jaxzip_lane_planar_configs
    except ImportError:
        return ()
    return tuple(_text(listed, m, k, rows, MOST).splitlines())


def problem(config: str, rows: int, m: int, k: int, *, batch_invariant: bool, raw: bool) -> str:
    """Why this configuration cannot be given for a product; empty if it can, or if no library is there to say so."""
    try:
        why = cuda_library().jaxzip_lane_planar_config_problem
    except ImportError:
        return ""
    return _text(why, config.encode(), m, k, rows, ctypes.c_bool(batch_invariant), ctypes.c_bool(raw))


def _text(function, *arguments) -> str:
    """What a C function writes: its last arguments are a buffer and its size, it returns the text's length."""
    buffer = ctypes.create_string_buffer(1024)
    length = function(*arguments, buffer, len(buffer))
    if length >= len(buffer):
        raise RuntimeError(f"{function.__name__} has {length} bytes to say, expected fewer than {len(buffer)}")
    return buffer.value.decode(errors="replace")
