"""Kernels: the only code that knows a device's instructions."""
