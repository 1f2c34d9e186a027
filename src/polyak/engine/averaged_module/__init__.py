"""``averager.module``: a module that computes with the average."""
