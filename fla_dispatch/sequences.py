"""SeqInfo: where the sequences of a packed batch begin, on the device and on the host, built once per batch."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from .errors import bad_call

#: Segment lengths that SeqInfo tabulates; a variant that walks packed sequences in segments uses one of these.
SEGMENTS = (64, 128, 256, 512, 1024, 2048)


def segment_offsets(cu_seqlens: torch.Tensor, segment: int) -> torch.Tensor:
    """Cumulative numbers of segments, [N + 1] int32, from cumulative lengths; no synchronisation."""
    counts = (cu_seqlens.diff() + (segment - 1)) // segment
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def check_lengths(where: str, host: torch.Tensor, total: int) -> None:
    """Raise CallError unless host cumulative lengths start at 0, never fall and end at `total`."""
    values = host.tolist()
    fix = f"pass cumulative lengths [0, n1, n1 + n2, ..., {total}]"
    if not values or values[0] != 0:
        bad_call(where, "cu_seqlens", expected="a first entry of 0", got=f"{values[:4]}", fix=fix)
    if any(later < earlier for earlier, later in itertools.pairwise(values)):
        bad_call(where, "cu_seqlens", expected="entries that never decrease", got=f"{values[:16]}", fix=fix)
    if values[-1] != total:
        bad_call(where, "cu_seqlens", expected=f"a last entry of T = {total}", got=str(values[-1]), fix=fix)


@dataclasses.dataclass(frozen=True)
class SeqInfo:
    """Packing of a batch; tensors only, so that nothing of it is a Python number in a trace.

    cu_seqlens: [N + 1] int32 on the device of the data; host: the same on the CPU; segments: [len(SEGMENTS), N + 1] int32
    on the device, cumulative segment counts for each length in SEGMENTS, each row aligned to 16 bytes.
    """

    cu_seqlens: torch.Tensor
    host: torch.Tensor
    segments: torch.Tensor

    @classmethod
    def from_lengths(cls, lengths: list[int] | torch.Tensor, device: torch.device | str | None = None) -> SeqInfo:
        """From sequence lengths on the host, e.g. `[5, 0, 130]`."""
        lengths = torch.as_tensor(lengths, device="cpu")
        whole = lengths.numel() == 0 or not (lengths.is_floating_point() or lengths.is_complex())  # an empty list makes a float tensor
        if lengths.dim() != 1 or not whole or bool((lengths < 0).any()):
            bad_call(
                "SeqInfo",
                "lengths",
                expected="a 1-d list of whole numbers >= 0",
                got=repr(lengths.tolist()),
                fix="pass one length per sequence",
            )
        host = torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))
        return cls.from_cu_seqlens(host, device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, device: torch.device | str | None = None) -> SeqInfo:
        """From cumulative lengths [N + 1], best given on the CPU (a device tensor is copied to the host once, here)."""
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            fix = "convert it with cu_seqlens.to(torch.int32)"
            bad_call("SeqInfo", "dtype of cu_seqlens", expected="int32 or int64", got=str(cu_seqlens.dtype), fix=fix)
        host = cu_seqlens.detach().to("cpu", torch.int64, copy=True)  # a buffer that is filled anew leaves this as it is
        if host.dim() != 1 or host.numel() == 0:
            bad_call(
                "SeqInfo", "cu_seqlens", expected="shape [N + 1]", got=str(list(host.shape)), fix="pass cumulative lengths [0, ..., T]"
            )
        check_lengths("SeqInfo", host, int(host[-1]))
        if int(host[-1]) >= 2**31:
            bad_call("SeqInfo", "tokens of the pack", expected="fewer than 2^31", got=str(int(host[-1])), fix="pack fewer sequences")
        host = host.to(torch.int32)
        on_device = host.to(cu_seqlens.device if device is None else device)
        table = torch.stack([segment_offsets(on_device, s) for s in SEGMENTS])
        # rows four times as far apart as they are long begin at a multiple of 16 bytes whatever N is: a kernel is compiled for a
        # pointer that does, and again for one that does not
        return cls(on_device, host, torch.nn.functional.pad(table, (0, 3 * table.shape[1]))[:, : table.shape[1]])
