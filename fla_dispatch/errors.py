"""Typed errors and the one shape of a message: what, expected, got, what to do."""

from __future__ import annotations

from typing import NoReturn


class FlaDispatchError(Exception):
    """Base of every error that this library raises on purpose."""


class CallError(FlaDispatchError, ValueError):
    """A call that breaks an op's contract: wrong rank, size, dtype, device or option."""


class UnknownNameError(FlaDispatchError, ValueError):
    """A name (op, variant, mode, device, size) that nothing is registered under."""


class RefusedError(FlaDispatchError, ValueError):
    """A forced variant, or every variant, must refuse this call; the reasons are in the message."""


class RegistrationError(FlaDispatchError):
    """A room's table is wrong: a duplicate name, a threshold inside a bucket, a missing function."""


class DoubleBackwardError(FlaDispatchError, RuntimeError):
    """A gradient of a gradient was asked for; the recurrences have first derivatives only."""


class LockError(FlaDispatchError, RuntimeError):
    """A lock file that cannot be read, or whose decision cannot be made again here; the differences are in the message."""


class MissError(FlaDispatchError, RuntimeError):
    """Nothing was measured for a call's Key, and the setting `miss` is `error`."""


class JitError(FlaDispatchError, RuntimeError):
    """Something was compiled or measured where that was ruled out (`testing.assert_no_jit`, the setting `no_jit`)."""


def message(where: str, what: str, expected: str, got: str, fix: str) -> str:
    """The one wording of a refusal to compute."""
    return f"{where}: {what}: expected {expected}, got {got}. To fix: {fix}."


def bad_call(where: str, what: str, *, expected: str, got: str, fix: str) -> NoReturn:
    """Raise a CallError in the house wording."""
    raise CallError(message(where, what, expected, got, fix))


def nearest(name: str, known: list[str]) -> str:
    """A hint with the closest known names, for messages about unknown ones."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
