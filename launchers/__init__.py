"""The command ``armd``, and the jobs of a run on Slurm or on this machine."""
