"""The backend for GPUs: kernels in Triton, which is not a dependency and is imported when a kernel first runs."""
