"""A process that may die: it runs jobs (jobs.py) one at a time, and an abort, a hang or an illegal access costs one candidate.

The parent is `Worker`: it starts a fresh interpreter, sends it jobs and passes on the events that they yield; a process that
ends or falls silent becomes a `Lost` error, and the next job starts another process. `Inline` runs jobs in this process, for
callers that trust their candidates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch

from .records import Status

#: Seconds in which a fresh process must have imported torch and the plug-ins.
START = 120.0

#: Seconds in which a process must have ended once it was told to.
END = 20.0

#: Seconds between looks at whether a silent process is held.
POLL = 1.0


class Lost(Exception):
    """The process ended or fell silent. status: crash | timeout."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status: Status = status
        self.detail = detail


class NotStarted(Lost):
    """The process never served: no job's fault."""


class JobError(Exception):
    """A job raised outside any candidate: the job itself is wrong, or its inputs do not fit the device."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status: Status = status
        self.detail = detail


class Worker:
    """A process for jobs, started when the first one comes. plugins: modules that it imports first (they register variants)."""

    def __init__(self, plugins: Sequence[str] = ()) -> None:
        self.plugins = tuple(plugins)
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stderr: Any = None
        self._ready = False
        self._held = False

    def start(self) -> None:
        """Start the process without waiting for it."""
        ours, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        threads = torch.get_num_threads()  # the environment of a CPU counts them
        served = f"serve({theirs.fileno()}, {self.plugins!r}, {threads})"
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; {served}"
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", code], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=self._stderr, process_group=0,
        )  # fmt: skip
        theirs.close()
        self._pipe = ours
        self.starts += 1

    def run(self, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        """Events of a job; raises Lost when none comes for `limit` seconds or the process ends, JobError when the job fails."""
        if self._pipe is None:
            self.start()
        if not self._ready:
            try:
                self._receive(START)
            except Lost as error:
                raise NotStarted(error.status, error.detail) from None
            self._ready = True
        try:
            assert self._pipe is not None
            self._pipe.send((function, arguments))
        except OSError:
            raise self._lost("crash", "the worker is gone") from None
        while True:
            kind, *content = self._receive(limit)
            if kind == "event":
                yield content[0]
            elif kind == "error":
                raise JobError(*content)
            elif kind == "broken":
                raise self._lost("crash", "")
            else:
                return

    def hold(self) -> None:
        """Stop the process and what it has started until `release`; its time stands still too."""
        self._held = True
        self._signal(signal.SIGSTOP)

    def release(self) -> None:
        self._signal(signal.SIGCONT)
        self._held = False

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _receive(self, limit: float) -> tuple[Any, ...]:
        assert self._pipe is not None
        left = limit
        while not self._pipe.poll(min(left, POLL)):
            left -= 0.0 if self._held else min(left, POLL)
            if left <= 0:
                raise self._lost("timeout", f"nothing for {limit:.3g} s")
        try:
            message: tuple[Any, ...] = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._lost("crash", "") from None
        return message

    def _lost(self, status: Status, detail: str) -> Lost:
        """End the process and say how it ended."""
        process = self._process
        assert process is not None
        if status == "timeout":
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END)
        code = process.returncode
        if status == "crash":
            name = "did not end" if code is None else signal.Signals(-code).name if code < 0 else f"exit code {code}"
            detail = f"the process ended: {name}; {self._last_words()}"
        self.close()
        return Lost(status, detail)

    def _last_words(self) -> str:
        """The line of stderr that says most."""
        self._stderr.seek(0)
        lines = [x.strip() for x in self._stderr.read().decode(errors="replace").splitlines() if x.strip()]
        telling = [x for x in lines if x.startswith("Fatal") or "rror" in x]
        return (telling or lines or [""])[-1][:300]

    def close(self) -> None:
        """End the process; a later job starts another."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for as long as its kernel runs
                self._process.wait(END)
        if self._pipe is not None:
            self._pipe.close()
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._pipe = self._stderr = None
        self._ready = False


class Inline:
    """The same interface in this process: no isolation and no time limit."""

    starts = 0

    def __init__(self) -> None:
        from .jobs import Jobs

        self._jobs = Jobs()

    def start(self) -> None:
        """Nothing to start."""

    def run(self, function: str, arguments: dict[str, Any], limit: float) -> Iterator[Any]:
        events: list[Any] = []
        self._jobs.run(function, arguments, events.append)
        yield from events

    def close(self) -> None:
        """Nothing to end."""


class Broken(Exception):
    """Raised by a job after an error that leaves the process's device context useless; the process ends."""


def serve(descriptor: int, plugins: Sequence[str], threads: int) -> None:
    """The process's side: jobs until the pipe closes."""
    import importlib

    pipe = Connection(descriptor)
    torch.set_num_threads(threads)
    from .jobs import Jobs, classify

    for name in plugins:
        importlib.import_module(name)
    jobs = Jobs(isolated=True)
    pipe.send(("ready",))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            jobs.run(function, arguments, lambda event: pipe.send(("event", event)))
        except Broken as error:
            print(error, file=sys.stderr, flush=True)
            pipe.send(("broken",))
            pipe.close()
            os._exit(3)  # ordinary ending would wait for a device that no longer answers
        except Exception as error:  # any failure of a job is the parent's to report, with its text
            status, detail = classify(error)
            print(traceback.format_exc(), file=sys.stderr)
            pipe.send(("error", status, detail))
        else:
            pipe.send(("end",))
