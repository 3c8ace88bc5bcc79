"""What must be equal for a timing to apply: the device, Triton, the assembler, and how launches are timed.

An environment is a directory of a store, so a new driver of the same device keeps its records, a new compiler starts with
none, and going back finds the old ones again. Driver and torch versions are recorded with each record, not keyed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import settings

if TYPE_CHECKING:
    import torch

    from ..device import DeviceProfile
    from ..problem import Problem

REGIMES = ("eager", "graph")


@dataclasses.dataclass(frozen=True)
class Environment:
    """slug: `h200-sm90-132u-144g`; triton: `3.6.0` or `none`; compiler: `ptxas12.8.93`, or `bundled` where it comes with Triton alone;
    regime: `eager` (host time included) or `graph` (replay of a captured graph)."""

    slug: str
    triton: str
    compiler: str
    regime: str = "eager"

    @property
    def directory(self) -> str:
        """Path of this environment's records below the root of a store: `<slug>/<toolchain>-<regime>`."""
        return f"{self.slug}/triton{self.triton}-{self.compiler}-{self.regime}"

    @property
    def arch(self) -> str:
        """The architecture in the slug: `sm90`."""
        return self.slug.rsplit("-", 3)[1] if self.slug.count("-") >= 3 else ""

    @classmethod
    def parse(cls, directory: str) -> Environment | None:
        """The environment that a directory belongs to, or None: `Environment.parse(e.directory) == e`."""
        found = re.fullmatch(r"([a-z0-9_.+-]+)/triton([a-z0-9_.+]+)-([a-z0-9_.+]+)-(eager|graph)", directory)
        return cls(*found.groups()) if found else None

    def differences(self, other: Environment) -> dict[str, tuple[str, str]]:
        """Fields that differ: name -> (here, there)."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return {name: (here, there) for name, here, there in pairs if here != there}


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def memory_class(size: int) -> int:
    """GiB of a device, rounded so that reserved memory and drivers do not change it: to 1, 4 or 16 GiB by size."""
    gib = size / (1 << 30)
    step = 1 if gib < 15 else 4 if gib < 62 else 16
    return step * round(gib / step)


def device_slug(device: DeviceProfile) -> str:
    """`<name>-<arch>-<units>u-<memory>g`; partitions of a device (MIG, compute partitions) differ in name, units or memory."""
    if device.kind == "cpu":
        name = _plain(f"cpu_{platform.machine()}")
    else:
        name = _plain(re.sub(r"\b(nvidia|amd|intel|instinct|corporation)\b|\((r|tm)\)", "", device.name, flags=re.I)) or device.vendor
    return f"{name}-{device.arch}-{device.units}u-{memory_class(device.memory_bytes)}g"


@functools.cache
def triton_version() -> str:
    """The installed Triton's version without a local part, or `none`; imports nothing."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return _numbers(importlib.metadata.version(name).split("+")[0])
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _numbers(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]", "_", text.lower())


@functools.cache
def _assembler_version(path: str) -> str:
    """`12.8.93` of the ptxas at a path; `unknown` where it does not run."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    found = re.search(r"V(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def compiler_version(device: DeviceProfile) -> str:
    """What turns Triton's output into machine code: `ptxas<version>` for NVIDIA; elsewhere it is part of Triton (`bundled`).

    Finds the assembler where Triton looks for it, without importing Triton.
    """
    package = importlib.util.find_spec("triton")
    if device.vendor == "cpu" or package is None or not package.submodule_search_locations:
        return "none"
    if device.vendor != "nvidia":
        return "bundled"
    folder = Path(package.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    suffix = ".exe" if sys.platform == "win32" else ""
    own = settings.current.ptxas
    if int(device.arch[2:]) >= 100 and (folder / f"ptxas-blackwell{suffix}").exists():
        own = settings.current.ptxas_blackwell or str(folder / f"ptxas-blackwell{suffix}")
    return f"ptxas{_assembler_version(own or str(folder / f'ptxas{suffix}'))}"


def regime_of(problem: Problem) -> str:
    """The timing regime that a problem's records belong to."""
    return "graph" if problem.capture else "eager"


def current(device: torch.device | DeviceProfile, regime: str = "eager") -> Environment:
    """The environment of a device in this process; a DeviceProfile may be of a device that is not here.

    Torch variants alone run on a CPU, so neither Triton nor a compiler is part of its environment.
    """
    from ..device import DeviceProfile, profile

    found = device if isinstance(device, DeviceProfile) else profile(device)
    return _current(found, regime, settings.current.ptxas, settings.current.ptxas_blackwell)


@functools.cache
def _current(device: DeviceProfile, regime: str, ptxas: str | None, ptxas_blackwell: str | None) -> Environment:
    if regime not in REGIMES:
        raise ValueError(f"regime: expected one of {', '.join(REGIMES)}, got {regime!r}. To fix: name one of these.")
    triton = "none" if device.vendor == "cpu" else triton_version()
    return Environment(device_slug(device), triton, compiler_version(device), regime)


@functools.cache
def versions() -> dict[str, str]:
    """Versions that a record mentions and no key holds."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "fla-dispatch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
