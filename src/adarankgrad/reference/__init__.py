"""One plain float64 file a method, equation by equation: the oracle that tests compare with.

Nothing here is fast, and nothing here is imported by the rest of the package.
"""
