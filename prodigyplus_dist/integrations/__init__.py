"""Adapters for training frameworks, each of which imports its framework only when it is used."""
