"""jepa: the thin training stack on top of jepa_kernels."""
