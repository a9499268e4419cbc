"""CUDA C++: csrc/ compiled into one module whose functions launch the kernels; contracts as in ops/."""
