"""Export for other engines: programs ``encode`` and ``decode_step``, as ONNX or StableHLO. Read ``programs.py`` first.

``encode`` runs once per batch, ``decode_step`` once per token. The search between the tokens belongs to the engine.
"""
