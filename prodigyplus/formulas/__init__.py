"""The formulas of the papers: pure functions on tensors, which know neither options nor processes."""
