"""Processes that compile side by side: each job once, its result for whoever asks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Iterator, Sequence

from .precompile import CompileJob
from .proof import Verdict
from .worker import JobError, Lost, NotStarted, Worker


class Crew:
    """Some workers behind a queue of compile jobs; a job that kills or blocks its process costs that job."""

    def __init__(self, count: int, plugins: Sequence[str], limit: float) -> None:
        self._plugins, self._limit = ("triton", *plugins), limit  # imported before the clock of the first job starts
        self._pool = concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="compile")
        self._own = threading.local()
        self._workers: list[Worker] = []
        self._jobs: dict[CompileJob, concurrent.futures.Future[int | Verdict | None]] = {}
        self._free = threading.Event()
        self._free.set()

    @property
    def count(self) -> int:
        """Jobs so far."""
        return len(self._jobs)

    def submit(self, job: CompileJob, arch: str) -> None:
        """Queue a job unless it is known."""
        if job not in self._jobs:
            self._jobs[job] = self._pool.submit(self._compile, job, arch)

    def result(self, job: CompileJob, patience: float | None = None) -> int | Verdict | None:
        """Bytes of shared memory of a compiled launch, or the verdict on its failure; waits for it, else raises TimeoutError.

        None where no process came up to compile it.
        """
        return self._jobs[job].result(None if patience is None else max(0.0, patience))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing compiles meanwhile: the host that launches what is timed has its cores for itself."""
        self._free.clear()
        workers = list(self._workers)
        for worker in workers:
            worker.hold()
        try:
            yield
        finally:
            for worker in workers:
                worker.release()
            self._free.set()

    def _compile(self, job: CompileJob, arch: str) -> int | Verdict | None:
        self._free.wait()
        worker: Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = Worker(self._plugins)
            self._workers.append(worker)
        try:
            (shared,) = worker.run("compile", {"job": job, "arch": arch}, self._limit)
        except NotStarted:
            return None
        except Lost as error:
            return Verdict(error.status, f"while compiling: {error.detail}")
        except JobError as error:
            return Verdict("compile_error" if error.status == "crash" else error.status, error.detail)
        return int(shared)

    def close(self) -> None:
        """Drop what is queued and end the processes."""
        self._free.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._pool.shutdown(wait=True)
