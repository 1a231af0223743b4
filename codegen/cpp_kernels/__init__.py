"""Kernels in C++: headers that generated text is put together from, their compilation and launchers."""
