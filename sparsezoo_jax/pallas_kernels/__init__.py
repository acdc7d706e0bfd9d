"""One folder per operation: its definition in plain JAX, and the kernels that must agree with it."""
