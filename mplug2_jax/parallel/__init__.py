"""Processes, the device mesh, and the two tables that shard arrays over it by logical axis."""
