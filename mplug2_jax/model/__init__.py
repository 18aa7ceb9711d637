"""The model, one file per module of the paper, on arrays and logical axis names: no mesh, data or optimizer."""
