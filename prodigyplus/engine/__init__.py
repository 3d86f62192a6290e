"""One step: its order (``rule``), what runs at the same time (``driver``), and the numbers of groups."""
