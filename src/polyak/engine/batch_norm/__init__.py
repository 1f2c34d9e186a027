"""Normalisation statistics measured anew for an average."""
