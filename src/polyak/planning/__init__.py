"""Estimates before a run: equivalent strategies, memory and time."""
