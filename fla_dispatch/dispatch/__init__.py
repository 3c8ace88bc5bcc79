"""The dispatcher: handles, plans, the one autograd.Function, the torch.library bridge, and explain.

Importing it registers every room and its library ops, so that nothing is left to be registered inside a trace. Variant
modules stay unimported until a plan needs them.
"""

from .bound import BoundHandle
from .bridge import load_bridges
from .explanation import Explanation, explain
from .handle import OpHandle, op, ops, use

load_bridges()

__all__ = ["BoundHandle", "Explanation", "OpHandle", "explain", "op", "ops", "use"]
