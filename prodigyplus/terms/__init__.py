"""The vocabulary of the formulas: layouts, requests, the numbers of a step, stacks."""
