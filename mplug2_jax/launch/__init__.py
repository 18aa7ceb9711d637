"""Start runs on several processes: on this machine, on SLURM, GKE and Cloud TPU machines."""
