"""All Triton code of the project: one room per recurrence, `_shared` for parts that more than one room uses."""
