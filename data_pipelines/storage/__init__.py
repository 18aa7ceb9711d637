"""Paths and their files, local or in an object store: one layer, with retries and two kinds of errors."""
