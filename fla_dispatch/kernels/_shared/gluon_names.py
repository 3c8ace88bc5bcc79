"""Gluon's names for what this project uses, which differ between releases of Triton (3.6 to 3.9)."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

#: All threads of the block wait for each other.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

#: Copies of a tile between global and shared memory by tensor descriptor.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
