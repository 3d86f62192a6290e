"""Adapters for training frameworks, one module for each; none is imported from here."""
