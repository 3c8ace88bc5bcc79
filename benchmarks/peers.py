"""Ours, FLA, FlashQLA and PyTorch's SDPA in one run on the same inputs: eager and CUDA-graph time, memory, host time, error.

    FLA_FLASH_QLA=0 python -m benchmarks.peers --out results [--cases delta] [--ops gated_delta,kda] [--seconds 420]

Each (case, library) is a cell; peer_cells says what the libraries are. Cells run one after the other in a process of their own, which is
started again when a cell breaks it or takes too long. Before that, parallel processes fill Triton's cache; FLA's autotuners then choose at
exactly each case's shape, with 30 ms of samples for each config. SDPA is measured once for each shape. results/peers.json (of another set
of cases than the scalar ones peers_SET.json) is written after every cell.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import pathlib
import queue
import time
from multiprocessing.connection import Connection
from typing import Any

from .common import copy_bandwidth, machine, write
from .peer_cells import SDPA, Case, compile_case, describe, measure, still_there

RETENTION_LENGTHS = (128, 512, 2048, 8192, 16384)
SCALAR = (
    Case("retention", (4, 4096, 16, 128)),
    Case("linear_attn normalized", (4, 4096, 16, 128)),
    Case("simple_gla", (4, 4096, 16, 128)),
    *(Case("retention", (8, T, 32, 128)) for T in RETENTION_LENGTHS),
    Case("retention", (1, 32768, 8, 128)),
    Case("retention", (8, 2048, 32, 64)),
    Case("lightning_attn", (4, 4096, 16, 128)),
    *(Case(op, (B, 1, 32, 128), decode=True) for op in ("retention", "simple_gla") for B in (256, 1)),
    *(Case("mamba2", (B, 16384 // B, 64, 64), state=128) for B in (1, 8)),
)
GATED_SHAPES = ((4, 4096, 16, 128), (8, 2048, 32, 128), (1, 8192, 32, 128), (1, 32768, 8, 128), (8, 2048, 32, 64))
DELTA = (
    *(Case("gated_delta", shape) for shape in GATED_SHAPES),
    Case("gated_delta", (1, 64, 16, 128)),  # the host's time
    *(Case(op, (4, 4096, 16, 128)) for op in ("delta", "kda", "comba")),
    *(Case(op, (B, 1, 32, 128), decode=True) for op in ("gated_delta", "kda") for B in (256, 1)),
)
ALL = (*SCALAR, *DELTA)


def smaller(case: Case) -> Case:
    """For any CPU."""
    return case._replace(shape=(2, min(case.shape[1], 70), 2, 16), state=min(case.state, 32))


CASES = {
    "scalar": SCALAR,
    "delta": DELTA,
    "all": ALL,
    "small": (SCALAR[0], SCALAR[2], SCALAR[3], SCALAR[-2], DELTA[0], DELTA[5], *(c for c in ALL if c.decode and c.shape[0] == 1)),
    "tiny": tuple(dict.fromkeys(map(smaller, ALL))),
}
SHARDS = 8


def cells(cases: list[Case]) -> list[tuple[Case, str]]:
    """What is measured, in order; SDPA with the first case of each shape."""
    found, seen = [], set()
    for case in cases:
        softmax = case.shape not in seen
        found += [(case, name) for name in ("ours", *case.peers) if softmax or name not in SDPA]
        seen |= {case.shape} if SDPA.keys() <= set(case.peers) else set()
    return found


# ---- filling the compiler's cache ----


def compile_jobs(cases: list[Case]) -> list[tuple[str, Case, int, int]]:
    """Ours and FlashQLA's each; FLA's in shards, once for cases whose kernels are the same (lengths, constant decays)."""
    fla: dict[Any, Case] = {}
    for case in cases:
        if "fla" not in case.peers:
            continue
        op = "retention" if case.op == "lightning_attn" else case.op
        B, _, H, D = case.shape
        fla.setdefault((op, case.decode, None if case.decode else B, H, D), case)
    jobs = [("fla", case, shard, SHARDS) for case in fla.values() for shard in range(1 if case.decode else SHARDS)]
    jobs = [(name, case, shard, 1 if case.decode else shards) for name, case, shard, shards in jobs]
    return jobs + [(name, case, 0, 1) for case in cases for name in ("ours", *case.peers) if name != "fla" and name not in SDPA]


def _compile(jobs: Any, device: str) -> None:
    while True:
        try:
            name, case, shard, shards = jobs.get(timeout=0.5)
        except queue.Empty:
            return
        try:
            compile_case(name, case, shard, shards, device)
        except Exception as error:  # a refusal, which the cell will report
            print(f"  compiling {name} {case.text} {shard}: {describe(error)[:160]}", flush=True)
            still_there(device)


def compile_all(jobs: list[tuple[str, Case, int, int]], processes: int, device: str, limit: float) -> str:
    """Run all jobs in parallel processes, replacing those that die; what is not done after `limit` seconds is left to the cells."""
    context = multiprocessing.get_context("spawn")
    begin, waiting, died = time.monotonic(), context.Queue(), 0
    for job in jobs:
        waiting.put(job)
    workers: list[Any] = []
    while time.monotonic() - begin < limit:
        died += sum(worker.exitcode not in (0, None) for worker in workers)
        workers = [worker for worker in workers if worker.is_alive()]
        for _ in range(min(processes - len(workers), waiting.qsize())):
            workers.append(context.Process(target=_compile, args=(waiting, device), daemon=True))
            workers[-1].start()
        if not workers:
            break
        time.sleep(0.2)
    for worker in workers:
        worker.kill()
        worker.join()
    left = waiting.qsize()
    waiting.cancel_join_thread()
    return f"{len(jobs)} jobs in {time.monotonic() - begin:.0f} s, {left} not begun, {len(workers)} processes cut, {died} died"


# ---- the process that measures ----


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("flash-linear-attention", "fla-core", "flash_qla", "tilelang"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def serve(connection: Connection, device: str, rep: int) -> None:
    """Answer each job, (library, case) or None for what the machine is, with (what, value) pairs and then None."""
    while True:
        job = connection.recv()
        if job is None:
            found: Any = [("machine", {**machine(), **versions()}), ("copy_bandwidth", copy_bandwidth())] if device == "cuda" else []
        else:
            name, case = job
            found = measure(name, case, device, rep)
        try:
            for pair in found:
                connection.send(pair)
        except Exception as error:  # said, and then this process ends, for nothing is known of its state
            connection.send(("problem", {"cell": f"failed: {describe(error)}"}))
            raise
        connection.send(None)


class Worker:
    """The measuring process, started when it is needed and again after it died."""

    def __init__(self, device: str, rep: int) -> None:
        self._arguments = device, rep
        self._process: multiprocessing.process.BaseProcess | None = None

    def ask(self, job: tuple[str, Case] | None, limit: float) -> dict[str, Any]:
        """What is known of a job after at most `limit` seconds; problems by direction."""
        found: dict[str, Any] = {"problems": {}}
        end = time.monotonic() + limit
        try:
            if self._process is None:
                self._start()
            self._connection.send(job)
            while True:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    found["problems"]["cell"] = f"cut after {limit:.0f} s"
                    self.stop()
                    return found
                pair = self._connection.recv()
                if pair is None:
                    return found
                what, value = pair
                if what == "problem":
                    found["problems"] |= value
                else:
                    found[what] = value
        except (EOFError, OSError):
            code = self.stop()
            found["problems"].setdefault("cell", f"the process died, exit code {code}")
            return found

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()

    def stop(self) -> int | None:
        if self._process is None:
            return None
        self._process.join(0.5)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._process = None
        return code


def judged(case: Case, name: str, cell: dict[str, Any], bandwidth: float | None) -> dict[str, Any]:
    """A row: the cell and what it is judged by, at the bandwidth that a copy reaches in this run; eager times over their floor."""
    row: dict[str, Any] = {**case._asdict(), "library": name, **({} if name in SDPA else case.promises), **cell}
    if bandwidth and "floor_bytes" in row:
        for direction, fewest in zip(("forward", "both"), row["floor_bytes"], strict=True):
            row[f"{direction}_floor_ms"] = floor = fewest / bandwidth * 1e3
            if f"{direction}_ms" in row:
                row[f"{direction}_over_floor"] = row[f"{direction}_ms"] / floor
    return row


def line(case: Case, row: dict[str, Any]) -> str:
    """A row for the terminal."""

    def number(what: str, width: int, form: str = ".4g") -> str:
        value = row.get(what)
        return f"{'-' if value is None else format(value, form):>{width}}"

    worst = row.get("errors", {})
    gradient = max((e for n, e in worst.items() if n.startswith("d")), default=None)
    shown = [number(f"{d}_{w}", 9) for d in ("forward", "both") for w in ("ms", "graph_ms", "host_us")]
    shown += [number(f"{d}_over_floor", 9, ".2f") for d in ("forward", "both")]
    shown += [number(what, 9, ".0f") for what in ("both_peak_mib", "bound_mib")]
    shown += [f"{'-' if e is None else format(e, '.1e'):>9}" for e in (worst.get("o"), gradient)]
    said = "; ".join(f"{what} {text}" for what, text in row["problems"].items())
    return f"{case.text:40}{row['library']:12}{''.join(shown)}  {said[:160]}"


HEAD = f"{'case':40}{'library':12}" + "".join(
    f"{h:>9}"
    for h in ("fwd ms", "graph", "host us", "f+b ms", "graph", "host us", "f/floor", "fb/floor", "peak MiB", "bound", "err o", "err grad")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--cases", choices=CASES, default="scalar", help="tiny: sizes for any CPU, to try the command")
    parser.add_argument("--ops", default="", help="only these ops, as the first column names them; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of repetition per timing")
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    parser.add_argument("--compile-seconds", type=float, default=180, help="after which compiling is left to the cells")
    parser.add_argument("--limit", type=float, default=75, help="seconds of a cell")
    parser.add_argument("--seconds", type=float, default=450, help="of the whole run; cells beyond are not reached")
    given = parser.parse_args()
    begin = time.monotonic()
    name_of_results = "peers" if given.cases == "scalar" else f"peers_{given.cases}"
    os.environ.setdefault("FLA_FLASH_QLA", "0")
    os.environ["FLA_CACHE_RESULTS"] = "0"  # choices of the compiling processes must not be taken for measured ones
    ops = [op for op in given.ops.split(",") if op]
    cases = [case for case in CASES[given.cases] if not ops or case.op in ops or case.op.split()[0] in ops]
    compiling = compile_all(compile_jobs(cases), given.processes, given.device, min(given.compile_seconds, given.seconds / 2))
    print(f"compiled: {compiling}", flush=True)
    worker = Worker(given.device, given.rep)
    facts = {"machine": {"device": given.device}, **worker.ask(None, 60), "compiling": compiling}
    print(facts["machine"], HEAD, sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    for case, name in cells(cases):
        left = given.seconds - (time.monotonic() - begin)
        cell = worker.ask((name, case), min(given.limit, left)) if left > 2 else {"problems": {"cell": "not reached"}}
        rows.append(judged(case, name, cell, facts.get("copy_bandwidth")))
        print(line(case, rows[-1]), flush=True)
        write(given.out, name_of_results, **facts, seconds=time.monotonic() - begin, rows=rows)
    worker.stop()


if __name__ == "__main__":
    main()
