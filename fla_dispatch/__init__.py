"""Linear attention and state-space recurrences behind one call."""
