"""Comparing optimizers: a plan of runs, run safely, summed up in a table and a page."""
