"""The CPU's own kernels: C++ that is compiled once, at the first start, and called through ctypes."""
