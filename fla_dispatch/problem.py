"""Problem: the canonical facts of one call. Key: the same record with its sizes rounded up to the tops of buckets.

Everything that a requirement, a cost estimate or a tuner may look at is a field of Problem, so equal Keys get equal
verdicts and equal plans. Sizes that change from call to call (lengths, batch) are bucketed; sizes that are compiled into
kernels (head dims) are exact.
"""

from __future__ import annotations

import dataclasses

from .device import DeviceProfile

#: Fields that a Key rounds up; thresholds of requirements on them must fall on bucket edges.
BUCKETED = ("T", "mean_length", "BH", "N")


def length_bucket(n: int) -> int:
    """Top of the bucket of a length: 0, 1, 16, 32, 64, then powers of two. Monotone and idempotent."""
    if n <= 1:
        return n
    return max(16, 1 << (n - 1).bit_length())


def is_length_edge(n: int) -> bool:
    """Whether a threshold `<= n` cuts between two length buckets."""
    return n == length_bucket(n)


def count_bucket(n: int, units: int) -> int:
    """Bucket of a number of independent problems: exact below the device's unit count (it decides occupancy), then powers of two."""
    return n if n < units else 1 << (n - 1).bit_length()


def is_count_edge(n: int) -> bool:
    """Whether a threshold `<= n` on a count cuts between two buckets on every device: powers of two do."""
    return n > 0 and n & (n - 1) == 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """Facts about one call of a recurrence.

    T: tokens of one row (dense) or of the whole pack; mean_length: T, or T / N for a pack; N: sequences; BH: sequences
    times value heads, the number of independent states; group: value heads per query head; dtypes: role -> dtype name, for
    tensors that are present; flags: semantic options that a variant may branch on; forced: a person named the variant.
    """

    recurrence: str
    device: DeviceProfile
    dtypes: tuple[tuple[str, str], ...]
    K: int
    V: int
    group: int
    BH: int
    T: int
    N: int
    mean_length: int
    packed: bool
    initial_state: bool
    final_state: bool
    grad: bool
    flags: tuple[tuple[str, str], ...] = ()
    capture: bool = False
    deterministic: bool = False
    interpret: bool = False
    forced: bool = False

    def dtype(self, role: str) -> str | None:
        """dtype name of a role (`bfloat16`), or None if the tensor is absent."""
        return dict(self.dtypes).get(role)

    def flag(self, name: str) -> str | None:
        return dict(self.flags).get(name)

    def key(self) -> Key:
        """The Key of this problem: the same record with bucketed sizes. `problem.key().key() == problem.key()`."""
        return dataclasses.replace(
            self,
            T=length_bucket(self.T),
            mean_length=length_bucket(self.mean_length),
            BH=count_bucket(self.BH, self.device.units),
            N=count_bucket(self.N, self.device.units) if self.packed else 1,  # rows of a dense batch count in BH
        )

    def text(self) -> str:
        """Canonical text form for people and files; equal texts mean equal records on one device."""
        dtypes = ",".join(f"{role}={name}" for role, name in self.dtypes)
        flags = ",".join(f"{name}={value}" for name, value in self.flags)
        switches = "".join(
            f"&{name}"
            for name in ("packed", "initial_state", "final_state", "grad", "capture", "deterministic", "interpret", "forced")
            if getattr(self, name)
        )
        return (
            f"{self.recurrence}@{self.device.arch}?{dtypes}&K={self.K}&V={self.V}&group={self.group}&BH={self.BH}"
            f"&T={self.T}&N={self.N}&mean={self.mean_length}&{flags}{switches}"
        )


#: A Problem whose bucketed sizes are bucket tops (what `Problem.key` returns).
Key = Problem
