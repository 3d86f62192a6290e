"""One step: its order (``rule``), how many tensors take it at once (``driver``), and its groups' numbers."""
