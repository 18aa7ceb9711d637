"""Where arrays live: the mesh, and the two tables from logical axes to mesh axes."""
