"""What ``format="auto"`` means: the smallest format for storage, and for execution the one with the fastest kernels.

    storage (checkpoints, arrays kept on the host)           tca-tbe
    execution on a device that a backend has named           that backend's format: lane-planar on Hopper GPUs
    execution elsewhere                                      tca-tbe
    fp16, fp32, fp8                                          the dtype's own format (they have one each)
    another dtype                                            raw

Backends say what they are fast at with :func:`prefer`; nothing here names one.
"""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np

#: Takes the fewest bytes of the formats that decode fast.
STORAGE = "tca-tbe"
BF16 = np.dtype(ml_dtypes.bfloat16)
#: The formats of dtypes that have one only, everywhere.
_OWN = {
    np.dtype(np.float16): "split-fp16",
    np.dtype(np.float32): "split-fp32",
    np.dtype(ml_dtypes.float8_e4m3fn): "window-fp8-e4m3fn",
    np.dtype(ml_dtypes.float8_e5m2): "window-fp8-e5m2",
}
#: Dtypes that some format shrinks.
DTYPES = (BF16, *_OWN)
_CUDA_NAMES = ("cuda", "gpu")  # JAX calls the platform of CUDA devices "gpu"


@dataclasses.dataclass(frozen=True)
class Preference:
    """A format that is fast on a platform, or on its devices of one ``compute_capability`` only."""

    format: str
    platform: str
    compute_capability: tuple[int, int] | None

    def applies(self, device: jax.Device) -> bool:
        """Whether ``device`` is one of those."""
        names = _CUDA_NAMES if self.platform in _CUDA_NAMES else (self.platform,)
        if device.platform not in names:
            return False
        return self.compute_capability is None or self.compute_capability == _capability(device)


_preferences: list[Preference] = []


def prefer(format: str, *, platform: str, compute_capability: tuple[int, int] | None = None) -> None:
    """Says that ``format`` is the fastest on these devices; called by backends, the last one wins.

    Args:
      format: a name of ``jaxzip.formats``.
      platform: "cpu", "cuda", ...
      compute_capability: of CUDA devices, ``(9, 0)`` for instance; ``None`` for all of them.
    """
    preference = Preference(format, platform, compute_capability)
    if preference in _preferences:
        _preferences.remove(preference)
    _preferences.insert(0, preference)


def for_storage(dtype: np.dtype) -> str:
    """The format for arrays of ``dtype`` that are kept rather than computed with; the same on every machine."""
    return STORAGE if np.dtype(dtype) == BF16 else _OWN.get(np.dtype(dtype), "raw")


def choose(dtype: np.dtype, device: jax.Device | None = None, *, otherwise: str | None = None) -> str:
    """The format for computing with arrays of ``dtype`` on ``device``; ``None``: where this process runs by default.

    Knows only what loaded backends have said, see ``jaxzip.ops.registry.load_backends``; ``otherwise`` is for devices
    of which none has said anything (``None``: :func:`for_storage`).
    """
    stored = for_storage(dtype)
    if np.dtype(dtype) != BF16:
        return stored
    if _preferences:
        device = default_device() if device is None else device
        for preference in _preferences:
            if preference.applies(device):
                return preference.format
    return otherwise or stored


def default_device() -> jax.Device:
    """The device of computations that name none."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen


def _capability(device: jax.Device) -> tuple[int, int] | None:
    """(9, 0) of "9.0"; ``None`` for devices that have none, or another maker's."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
