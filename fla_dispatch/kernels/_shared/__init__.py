"""Parts used by more than one room. Rooms import from here, never from each other."""
