"""The CPU's own kernels: C++ compiled once, at the first start, and called through ctypes."""
