"""Tensor names of other projects, and the parameters of ours that they fill."""
