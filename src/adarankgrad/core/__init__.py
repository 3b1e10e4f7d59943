"""Pure functions on tensors: the numerics that every optimizer here is made of.

Nothing in this package logs, prints, keeps state or knows what a module is.

Shape legend, used throughout:

- ``matrix (*batch, m, n)``: a gradient or weight seen from the side that is projected; the basis
  always stands on the left (`projection.Layout` transposes where it must).
- ``basis (*batch, m, r)``: orthonormal columns, r is the rank.
- ``coords (*batch, r, n)``: ``basis.mT @ matrix``, the gradient in the basis; Adam's moments have
  the same shape.
"""
