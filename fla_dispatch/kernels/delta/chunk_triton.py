"""`chunk_triton`: the inverse of every chunk at once, then one pass over time with the state in registers (equations (6) and (7)).

Forward writes the inverses and outputs alone: no u, no state but the last.
"""

from __future__ import annotations

from .chunks.forward import run_forward
from .chunks.host import prepare
from .chunks.inverse import run_inverse
from .configs import ChunkConfig
from .recurrence import Options, Outputs, Tensors, empty_outputs


def forward(config: ChunkConfig, t: Tensors, o: Options) -> Outputs:
    out = Outputs(*empty_outputs(t, o))
    c = prepare(t, o, config)
    inverse, gates = run_inverse(c)
    run_forward(c, inverse, gates, config.warps, o=out.o, state=out.state if o.final_state else None)
    return out
