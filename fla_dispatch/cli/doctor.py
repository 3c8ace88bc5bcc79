"""`fla-dispatch doctor`: devices, versions and which variants can run here, each red row with one remedy.

Imports no triton: availability is read from the variants' requirements and from whether their modules can be found. A
variant that is not written for this device is information; a *finding* is something that ought to work here and does
not, and findings alone make the exit code 1.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import platform
from pathlib import Path

import torch

from .. import registry
from ..device import DeviceProfile, default_device, package_version, profile
from ..problem import Problem
from ..requirements import Refusal, RefusalCode
from . import output

#: Oldest versions that are supported; pyproject.toml has the same ranges, and a test compares them.
OLDEST = {"torch": (2, 9), "triton": (3, 5)}

#: Files that the drivers make when a GPU is present, and what reads it.
DRIVER_FILES = {"/dev/nvidia0": "an NVIDIA GPU", "/dev/kfd": "an AMD GPU"}

#: Codes that speak of this installation rather than of the device or of the problem.
BROKEN = (RefusalCode.PACKAGE_MISSING, RefusalCode.PACKAGE_VERSION, RefusalCode.IMPORT_ERROR)

LENGTHS = (16384, 1024, 64, 1)
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant on this device: the directions it can run in, and if none, why not and what to do."""

    recurrence: str
    variant: str
    available: bool
    trains: bool
    why: str = ""
    remedy: str = ""
    broken: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is expected to work here and does not."""

    what: str
    remedy: str


def versions() -> dict[str, str | None]:
    """Versions of what matters, read without importing it."""
    triton = package_version("triton")
    try:
        library = importlib.metadata.version("fla-dispatch")
    except importlib.metadata.PackageNotFoundError:
        library = "not installed (run from its source)"
    return {
        "fla-dispatch": library,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": ".".join(map(str, triton)) if triton else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def devices() -> list[DeviceProfile]:
    """Every accelerator, then the CPU."""
    found = [profile(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [profile(torch.device("xpu", i)) for i in range(torch.xpu.device_count())]
    return [*found, profile(torch.device("cpu"))]


def environment_findings(
    gpus: int, have: dict[str, tuple[int, ...] | None], driver_files: dict[str, str], cuda_build: bool, hip_build: bool
) -> list[Finding]:
    """What is wrong with the installation as a whole; facts come as arguments, so that a test can state them.

    gpus: GPUs that torch sees; have: versions of torch and triton; driver_files: the driver files that exist.
    """
    found = []
    for path, gpu in driver_files.items():
        if not gpus:
            built = hip_build if "AMD" in gpu else cuda_build
            remedy = (
                "check that the driver matches torch's version and that this user may open the device"
                if built
                else f"install a torch build for {gpu.split(' ')[1]} GPUs"
            )
            found.append(Finding(f"{path} says that {gpu} is present, but torch sees no GPU", remedy))
    for name, oldest in OLDEST.items():
        version, wanted = have.get(name), ".".join(map(str, oldest))
        if version is None and (name != "triton" or gpus):
            found.append(Finding(f"{name} is not installed", f"pip install '{name}>={wanted}'"))
        elif version is not None and version < oldest and (name != "triton" or gpus):
            shown = ".".join(map(str, version))
            found.append(Finding(f"{name} {shown} is older than {wanted}", f"pip install --upgrade '{name}>={wanted}'"))
    return found


def _module_refusal(variant: registry.Variant) -> Refusal | None:
    """Why the variant's module cannot be imported. Triton's modules are looked for only, torch's are imported."""
    if variant.language == "torch":
        loaded = variant.load()
        return loaded if isinstance(loaded, Refusal) else None
    try:
        spec = importlib.util.find_spec(variant.module)
    except ImportError as error:
        spec, text = None, str(error)
    else:
        text = "no such module"
    if spec is not None:
        return None
    return Refusal(RefusalCode.IMPORT_ERROR, "module", text, f"{variant.module} to be found", "reinstall fla-dispatch")


def problems(recurrence: registry.Recurrence, device: DeviceProfile) -> list[Problem]:
    """Representative problems on a device: long to decode, two dtypes, without and with gradients."""
    op = next(op for op in map(registry.get_op, registry.op_names()) if op.recurrence == recurrence.name)
    found = []
    for dtype, length in itertools.product(DTYPES, LENGTHS):
        sizes = {name: length if name == "T" else size for name, size in op.sizes.items()}
        args, kwargs = op.example(sizes, getattr(torch, dtype), "meta")
        lowering = op.contract(*args, **kwargs)
        for grad in (False, True):
            problem = recurrence.problem(lowering.tensors, lowering.options, grad)
            found.append(dataclasses.replace(problem, device=device))
    return found


def variant_row(recurrence: str, variant: registry.Variant, representative: list[Problem]) -> Row:
    """Availability of a variant: it is there if it takes any of the problems; else the first problem's first reason counts."""
    missing = _module_refusal(variant)
    if missing is not None:
        return Row(recurrence, variant.name, False, False, missing.text(), missing.fix, broken=True)
    verdicts = [(problem, variant.static_refusals(problem)) for problem in representative]
    taken = [problem for problem, reasons in verdicts if not reasons]
    if taken:
        return Row(recurrence, variant.name, True, any(problem.grad for problem in taken))
    problem, reasons = verdicts[0]
    broken = problem.device.is_gpu and any(reason.code in BROKEN for reason in reasons)
    return Row(recurrence, variant.name, False, False, reasons[0].text(), reasons[0].fix, broken)


def variant_rows(device: DeviceProfile) -> list[Row]:
    rows = []
    for recurrence in map(registry.get_recurrence, registry.recurrence_names()):
        representative = problems(recurrence, device)
        rows += [variant_row(recurrence.name, variant, representative) for variant in recurrence.variants]
    return rows


def run(as_json: bool) -> int:
    found, here = devices(), profile(default_device())
    rows = variant_rows(here)
    gpus = sum(d.is_gpu for d in found)
    have = {name: package_version(name) for name in OLDEST}
    present = {path: gpu for path, gpu in DRIVER_FILES.items() if Path(path).exists()}
    findings = environment_findings(gpus, have, present, torch.version.cuda is not None, torch.version.hip is not None)
    findings += [Finding(f"{r.recurrence}/{r.variant} should run on {here.arch}: {r.why}", r.remedy) for r in rows if r.broken]
    if as_json:
        output.print_json(
            {
                "ok": not findings,
                "versions": versions(),
                "devices": [dataclasses.asdict(d) for d in found],
                "checked_device": here.arch,
                "variants": [dataclasses.asdict(r) for r in rows],
                "findings": [dataclasses.asdict(f) for f in findings],
            }
        )
        return 1 if findings else 0
    _print(found, here, rows, findings)
    return 1 if findings else 0


def _print(found: list[DeviceProfile], here: DeviceProfile, rows: list[Row], findings: list[Finding]) -> None:
    out = output.console()
    out.print(output.table("versions", ["what", "version"], [[name, text or "-"] for name, text in versions().items()]))
    shown = [[d.arch, d.name, str(d.units), f"{d.memory_bytes / 2**30:.0f} GiB" if d.memory_bytes else "-"] for d in found]
    out.print(output.table("devices", ["arch", "name", "units or threads", "memory"], shown))
    cells, styles = [], []
    for r in rows:
        state = "broken" if r.broken else "no" if not r.available else "runs and trains" if r.trains else "runs (no backward)"
        cells.append([r.recurrence, r.variant, state, r.why, r.remedy])
        styles.append("bold red" if r.broken else "red" if not r.available else "green")
    out.print(output.table(f"variants on {here.arch}", ["recurrence", "variant", "here", "why not", "remedy"], cells, styles=styles))
    for finding in findings:
        out.print(f"problem: {finding.what}. To fix: {finding.remedy}.", style="bold red")
    if not findings:
        out.print("all that is expected here works.", style="green")
