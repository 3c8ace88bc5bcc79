"""Measuring, proving and remembering: what is chosen for a Key on a device, and the evidence for it.

records, choice    one persisted measurement, and the rule that makes a choice of its outcomes (pydantic, no torch)
environment        what must be equal for a timing to apply: device, compiler, timing regime
hashing            what must be equal for a proof to apply: the code of a variant, whatever its formatting
store              the directories of records: the user's, the site's, the shipped ones

Importing this package costs nothing, so that the hot path may watch `epoch`; its modules are imported on a plan miss.
"""

from __future__ import annotations

#: Counts changes of any store of this process (records put, stores reloaded), so that caches of plans know when they are stale.
epoch = 0
