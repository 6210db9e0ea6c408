"""Is there a GPU at all? Asked of the driver, before anything is compiled for it."""

from __future__ import annotations

import ctypes as c
from pathlib import Path

_DRIVERS = {
    "cuda": (("libcuda.so.1",), "cuInit", "cuDeviceGetCount", Path("/proc/driver/nvidia/version")),
    "hip": (
        ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"),
        "hipInit",
        "hipGetDeviceCount",
        Path("/sys/module/amdgpu/version"),
    ),
}


class DeviceError(RuntimeError):
    """There is no card that could do it, or the card or its driver failed; the message says which."""


def check_driver(backend: str) -> None:
    """Raises: DeviceError when there is no driver, or no device that it lets this process see."""
    names, init, get_count, _ = _DRIVERS[backend]
    driver = _load(names)
    if driver is None:
        raise DeviceError(f"no GPU for backend={backend!r}: {names[0]} is not there (install the card's driver)")
    count = c.c_int(0)
    status = getattr(driver, init)(0) or getattr(driver, get_count)(c.byref(count))
    if status or not count.value:
        raise DeviceError(f"no GPU for backend={backend!r}: {names[0]} finds none (status {status})")


def driver_version(backend: str) -> str | None:
    """The driver in its own words; None where they cannot be read."""
    try:
        return _DRIVERS[backend][3].read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _load(names: tuple[str, ...]) -> c.CDLL | None:
    for name in names:
        try:
            return c.CDLL(name)
        except OSError:
            continue
    return None
