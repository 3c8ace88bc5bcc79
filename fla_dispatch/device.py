"""The only place that asks what device this is: one frozen profile per device index, read on first use.

`profile(torch.device)` describes a device that is here, `hypothetical("sm90")` one that is not. Ceilings (bandwidth,
matrix rate) are planning figures for cost estimates; measured ceilings belong to tuning records.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re

import torch

from . import settings
from .errors import UnknownNameError, nearest


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """Facts about one device.

    arch: `sm90`, `gfx942`, `xe`, `cpu`; units: multiprocessors or compute units; shared_bytes: shared memory one block
    may use; bandwidth: bytes per second of device memory; matrix_rate: dense bf16 operations per second;
    vector_rate: float32 operations per second outside the matrix units.
    """

    kind: str  # cuda | xpu | cpu (ROCm devices are of kind cuda, as in torch)
    vendor: str  # nvidia | amd | intel | cpu
    arch: str
    name: str
    units: int
    shared_bytes: int
    memory_bytes: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    present: bool = True

    @property
    def is_gpu(self) -> bool:
        return self.vendor != "cpu"

    @property
    def arch_number(self) -> int:
        """90 for `sm90`; -1 where the arch has no order of its own."""
        return int(self.arch[2:]) if self.vendor == "nvidia" else -1


# Planning figures per architecture: (vendor, name, units, shared bytes per block, memory, bandwidth, matrix, vector).
# Shared memory is the documented opt-in maximum per block; the H200's bandwidth is a measured copy.
_KNOWN: dict[str, tuple[str, str, int, int, int, float, float, float]] = {
    "sm80": ("nvidia", "A100", 108, 166_912, 80 << 30, 1.7e12, 250e12, 19e12),
    "sm86": ("nvidia", "RTX 3090 / A10", 82, 101_376, 24 << 30, 0.85e12, 70e12, 30e12),
    "sm89": ("nvidia", "RTX 4090 / L4", 128, 101_376, 24 << 30, 0.9e12, 160e12, 60e12),
    "sm90": ("nvidia", "H200", 132, 232_448, 141 << 30, 4.28e12, 790e12, 60e12),
    "sm100": ("nvidia", "B200", 148, 232_448, 180 << 30, 7.0e12, 1800e12, 75e12),
    "sm103": ("nvidia", "B300", 148, 232_448, 280 << 30, 7.0e12, 1800e12, 75e12),
    "sm120": ("nvidia", "RTX 5090", 170, 101_376, 32 << 30, 1.6e12, 200e12, 100e12),
    "gfx90a": ("amd", "MI250", 104, 65_536, 64 << 30, 1.3e12, 150e12, 22e12),
    "gfx942": ("amd", "MI300X", 304, 65_536, 192 << 30, 4.2e12, 900e12, 80e12),
    "gfx950": ("amd", "MI355X", 256, 163_840, 288 << 30, 6.5e12, 1800e12, 80e12),
    "xe": ("intel", "Data Center GPU Max", 128, 131_072, 128 << 30, 2.5e12, 400e12, 30e12),
    "cpu": ("cpu", "CPU", 1, 0, 0, 2e10, 2e11, 1e11),
}


def known_archs() -> list[str]:
    """Architectures that `hypothetical` can describe."""
    return sorted(_KNOWN)


def _from_table(row: str, **changes: object) -> DeviceProfile:
    """The table's row as a profile, with the fields that are known better."""
    vendor, name, units, shared, memory, bandwidth, matrix, vector = _KNOWN[row]
    kind = {"cpu": "cpu", "intel": "xpu"}.get(vendor, "cuda")
    base = DeviceProfile(kind, vendor, row, name, units, shared, memory, bandwidth, matrix, vector)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@functools.cache
def hypothetical(arch: str) -> DeviceProfile:
    """A device that need not be here: `sm90`, `gfx942`, `cpu`, ..."""
    if arch not in _KNOWN:
        raise UnknownNameError(
            f"device: unknown architecture {arch!r}; {nearest(arch, list(_KNOWN))}. "
            "To fix: name one of these, or leave the device out to use the one that is here."
        )
    return _from_table(arch, present=arch == "cpu")


def _family(arch: str) -> str:
    """The table row that a device without a row of its own plans with."""
    if arch in _KNOWN:
        return arch
    if arch.startswith("sm"):
        number = int(arch[2:])
        older = [a for a in _KNOWN if a.startswith("sm") and int(a[2:]) <= number]
        return max(older, key=lambda a: int(a[2:])) if older else "sm80"
    if arch.startswith("gfx"):
        return "gfx950" if arch >= "gfx950" else "gfx942" if arch >= "gfx94" else "gfx90a"
    return "xe"


@functools.cache
def _profile(kind: str, index: int) -> DeviceProfile:
    if kind == "cpu":
        threads = torch.get_num_threads()
        return _from_table("cpu", units=threads, matrix_rate=4e10 * threads, vector_rate=2e10 * threads)
    if kind == "cuda":
        p = torch.cuda.get_device_properties(index)
        gcn = getattr(p, "gcnArchName", "") if torch.version.hip else ""
        arch = re.split(":", gcn)[0] if gcn else f"sm{p.major}{p.minor}"
        shared = getattr(p, "shared_memory_per_block_optin", 0)
        known = {"shared_bytes": shared} if shared and not gcn else {}
        return _from_table(_family(arch), arch=arch, name=p.name, units=p.multi_processor_count, memory_bytes=p.total_memory, **known)
    if kind == "xpu":
        x = torch.xpu.get_device_properties(index)
        return _from_table("xe", name=x.name, units=x.gpu_subslice_count, memory_bytes=x.total_memory)
    return _from_table("cpu", name=kind, present=False)  # meta and other devices without a machine behind them


def profile(device: torch.device) -> DeviceProfile:
    """The profile of a torch device (cached per index)."""
    index: int | None = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" else 0
    return _profile(device.type, index)


def default_device() -> torch.device:
    """The device a command uses when none is named: the first accelerator, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", 0)
    return torch.device("cpu")


@functools.cache
def package_version(name: str) -> tuple[int, ...] | None:
    """The installed version of a distribution as numbers, or None; imports nothing."""
    names = (name, "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu") if name == "triton" else (name,)
    for candidate in names:
        try:
            text = importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter in this process."""
    return settings.current.interpret
