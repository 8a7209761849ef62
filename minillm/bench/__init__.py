"""Measurements: real runs beside predictions, with everything a reader needs to judge them written down.

May import every other room; nobody imports this one.
"""
