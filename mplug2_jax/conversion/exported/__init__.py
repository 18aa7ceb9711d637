"""The program in exported folders: files in; texts, ranks and features out, without JAX. Read ``model.py`` first.

An export copies this package and all that it imports under another name, so imports within ``mplug2_jax`` are relative.
"""

CONFIG_NAME, INFERENCE = "config.json", "inference.json"
"""The sizes of the model; how it reads files and instructions, and how it searches."""
REMEDY = "copy the whole folder of the export"
