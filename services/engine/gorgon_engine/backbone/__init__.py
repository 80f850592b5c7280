"""The frozen target model: what it computes for a batch of rows, whichever kernels do it."""
