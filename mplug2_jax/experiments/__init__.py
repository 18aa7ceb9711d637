"""Experiments: many runs that answer one question together.

``transfer`` asks whether pretraining pays, ``scaling`` whether more of it pays more.
"""
