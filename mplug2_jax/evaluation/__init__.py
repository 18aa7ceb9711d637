"""Running a checkpoint over held-out data, on any mesh, and scoring what it says."""
