"""Finds and loads the compiled libraries, and registers their handlers with JAX once."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import pathlib
import types
from typing import NamedTuple

import jax


class Availability(NamedTuple):
    """Whether a library can be used; truthy when it can, else `reason` says why not."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


@functools.cache
def cpu_module() -> types.ModuleType:
    """The extension module. Raises ImportError when it was not built for this Python."""
    return importlib.import_module("jaxzip.ffi._cpu")


@functools.cache
def cpu_available() -> Availability:
    """Whether the CPU kernels can be loaded."""
    try:
        cpu_module()
    except (ImportError, ValueError) as e:
        return Availability(False, f"jaxzip.ffi._cpu cannot be loaded: {e}; reinstall jaxzip with a C++ compiler")
    return Availability(True, "")


@functools.cache
def register() -> None:
    """Registers the CPU handlers with JAX; later calls do nothing. Raises ImportError when there are none."""
    for name, capsule in cpu_module().handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def target_names() -> tuple[str, ...]:
    """Names of the custom calls, for `jax.export`'s safety checks."""
    return tuple(dict.fromkeys((*cpu_module().handlers(), *_CUDA_HANDLERS)))


_CUDA_HANDLERS = (
    "jaxzip_tca_tbe_decompress",
    "jaxzip_tca_tbe_matmul",
    "jaxzip_lane_planar_decompress",
    "jaxzip_lane_planar_gemm",
    "jaxzip_lane_planar_ragged_gemm",
    "jaxzip_lane_planar_take",
    "jaxzip_lane_planar_shifts",
    "jaxzip_lane_planar_counts",
    "jaxzip_lane_planar_encode",
    "jaxzip_decode_chain",
    "jaxzip_decode_layer",
)


#: What Python itself calls, see :mod:`jaxzip.ffi.cuda_configs`.
_CUDA_FUNCTIONS = ("jaxzip_lane_planar_configs", "jaxzip_lane_planar_config_problem")


def _cuda_path() -> pathlib.Path | None:
    # The package may span a source folder and an install folder (editable installs): ask for every location.
    spec = importlib.util.find_spec("jaxzip.ffi")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(folder) / "_jaxzip_cuda.so"
        if path.exists():
            return path
    return None


@functools.cache
def cuda_available() -> Availability:
    """Whether the CUDA kernels were built and load; says nothing about a GPU being there."""
    path = _cuda_path()
    if path is None:
        return Availability(
            False,
            "jaxzip was built without CUDA kernels: nvcc was not found, or JAXZIP_CUDA was OFF, when it was built",
        )
    try:
        ctypes.CDLL(str(path))
    except OSError as e:
        return Availability(False, f"{path.name} cannot be loaded: {e}")
    return Availability(True, "")


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """The CUDA kernels' library; needs no GPU. Raises ImportError when it is missing, or of another version."""
    available = cuda_available()
    if not available:
        raise ImportError(available.reason)
    library = ctypes.CDLL(str(_cuda_path()))
    missing = [name for name in (*_CUDA_HANDLERS, *_CUDA_FUNCTIONS) if not hasattr(library, name)]
    if missing:
        raise ImportError(f"{_cuda_path()} is of another version (it lacks {missing[0]}): install jaxzip again")
    return library


@functools.cache
def register_cuda() -> None:
    """Registers the CUDA handlers with JAX; later calls do nothing. Raises ImportError when one is missing."""
    library = cuda_library()
    for name in _CUDA_HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="CUDA")


@functools.cache
def compute_capabilities() -> frozenset[tuple[int, int]]:
    """Compute capabilities of this process's CUDA devices; empty where there are none."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(tuple(int(part) for part in str(device.compute_capability).split(".")) for device in devices)
