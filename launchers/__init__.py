"""The front door: starts a run on Slurm or on this machine."""
