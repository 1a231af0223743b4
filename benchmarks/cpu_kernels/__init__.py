"""Cases of `cpu_kernels.py`, one file a kernel."""
