"""The model, one file per module of the paper. Knows arrays and logical axis names; no mesh, no data, no optimiser."""
