"""The optimiser in the training loops of other libraries, one module for each; none is imported from here."""
