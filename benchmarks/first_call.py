"""How long the first training call takes: FLA's, ours without and with records, and ours after a warmup.

    FLA_FLASH_QLA=0 python -m benchmarks.first_call --out results [--limit 300] [--only ours]

Each row is a process of its own with an empty Triton cache (the last takes over what warmup left) and without the device's shipped
records, as on a device that has none; "shipped records" is the package as it is. Seconds are those of the call, imports and CUDA
context done. FLA's autotuners are as FLA sets them. first_call.json (with --only: first_call_ours.json or first_call_fla.json) is
written after every row; a process that is cut leaves what it had measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

SHAPE = (8, 4096, 16, 128)
ROOT = pathlib.Path(__file__).resolve().parent.parent


# ---- in the process that calls ----


def child(library: str, op: str, backward: bool, no_jit: bool, shape: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    """Seconds of the first and second call; those of the first are printed as soon as they are known."""
    import torch

    import fla_dispatch as fd
    from fla_dispatch.testing import assert_no_jit

    from .peer_cells import Case, inputs_of, training
    from .peer_cells import library as call_of

    call, x = call_of(library, Case(op, shape)), training(inputs_of(Case(op, shape), device))
    do, leaves = torch.randn_like(x.args[2]), list(x.leaves().values())
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seconds = []
    with assert_no_jit() if no_jit else contextlib.nullcontext():
        for _ in range(2):
            sync()
            begin = time.perf_counter()
            with torch.set_grad_enabled(backward):
                o = call(x)[0]
                if backward:
                    torch.autograd.grad(o, leaves, do)
            sync()
            seconds.append(time.perf_counter() - begin)
            print(json.dumps({"first_s": seconds[0]}), flush=True)
    explained = fd.op(op).explain(*x.args, **x.kwargs) if library == "ours" else None
    why = None if explained is None else f"{explained.tier}: {explained.forward}, {explained.backward}"
    return {"first_s": seconds[0], "second_s": seconds[1], "choice": why}


# ---- in the process that starts them ----


def bare_copy(to: pathlib.Path) -> pathlib.Path:
    """This source without shipped records; it is what a process started there imports."""
    for name in ("fla_dispatch", "benchmarks"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__", "results"))
    return to


def last_document(text: str) -> dict[str, Any] | None:
    """The last JSON object that begins a line and is whole."""
    found = None
    for start in re.finditer(r"^\{", text, re.MULTILINE):
        with contextlib.suppress(ValueError):
            found = json.JSONDecoder().raw_decode(text, start.start())[0]
    return found


def run(arguments: list[str], where: pathlib.Path, caches: pathlib.Path, limit: float) -> dict[str, Any]:
    """The JSON document that a process prints last, its wall seconds and how many kernels are in its Triton cache then.

    After `limit` seconds the process and what it started end, and a problem says so beside what it had printed.
    """
    env = os.environ | {"TRITON_CACHE_DIR": str(caches / "triton"), "FLA_DISPATCH_CACHE_DIR": str(caches / "records")}
    caches.mkdir(parents=True, exist_ok=True)
    begin, cut = time.monotonic(), False
    with subprocess.Popen([sys.executable, *arguments], cwd=where, env=env, text=True, stdout=-1, stderr=-1, start_new_session=True) as p:
        try:
            out, err = p.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            cut = True
            _end(p)
            out, err = p.communicate()
        except BaseException:  # this run is cut itself: what it started shall not outlive it
            _end(p)
            raise
    found: dict[str, Any] = {"wall_s": time.monotonic() - begin}
    found["compiled"] = len(list((caches / "triton").rglob("*.cubin")))
    document = last_document(out)
    if cut:
        found["problem"] = f"cut after {limit:.0f} s"
    elif p.returncode or document is None:
        found["problem"] = (err.strip().splitlines() or ["no JSON printed"])[-1][:300]
    return (document or {}) | found | ({} if cut or p.returncode == 0 else {"exit_code": p.returncode})


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--limit", type=float, default=300, help="seconds of a process")
    parser.add_argument("--only", choices=("ours", "fla"), help="only these rows")
    parser.add_argument("--shape", default=",".join(map(str, SHAPE)), help="B,T,H,D")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", nargs=2, metavar=("LIBRARY", "OP"), help=argparse.SUPPRESS)
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-jit", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    B, T, H, D = map(int, given.shape.split(","))
    if given.child:
        library, op = given.child
        print(json.dumps(child(library, op, not given.forward, given.no_jit, (B, T, H, D), given.device)))
        return
    os.environ.setdefault("FLA_FLASH_QLA", "0")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as `timeout` ends it
    call = ["-m", "benchmarks.first_call", "--shape", given.shape, "--device", given.device, "--child"]
    cli = ["-m", "fla_dispatch"]
    warm = [*cli, "warmup", "--op", "retention", "--train", "--device", given.device, "--json"]
    warm += ["--batch", str(B), "--length", str(T), "--heads", str(H), "--head-dim", str(D)]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        bare = bare_copy(top / "bare")
        ours = [*call, "ours", "retention"]
        plan: list[tuple[str, list[str], pathlib.Path, str]] = [
            ("ours, no records", ours, bare, "a"),
            ("ours, shipped records", ours, ROOT, "b"),
            ("fla-dispatch warmup", warm, bare, "c"),
            ("ours after warmup, under assert_no_jit", [*ours, "--no-jit"], bare, "c"),
            ("FLA retention", [*call, "fla", "retention"], bare, "d"),
            ("FLA simple_gla, forward", [*call, "fla", "simple_gla", "--forward"], bare, "e"),
        ]
        for label, arguments, where, caches in plan:
            if given.only and (given.only == "fla") != label.startswith("FLA "):
                continue
            row = run(arguments, where, top / caches, given.limit)
            if "calls" in row:
                listed = run([*cli, "cache", "list", "--tier", "user", "--json"], bare, top / caches, 60)
                row["records"] = len(listed.get("records", ()))
            rows[label] = row
            print(f"{label:42}", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            save(given, rows)


def save(given: argparse.Namespace, rows: dict[str, Any]) -> None:
    content, name = {"shape": given.shape, "processes": rows}, "first_call" + (f"_{given.only}" if given.only else "")
    if given.device == "cuda":
        from .common import write

        write(given.out, name, **content)
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{name}.json").write_text(json.dumps({"setup": {"device": given.device}, **content}, indent=1) + "\n")


if __name__ == "__main__":
    main()
