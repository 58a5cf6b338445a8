"""Public face of the kernels."""
