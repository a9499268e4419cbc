"""CUDA C++: csrc/, compiled into one module whose functions are the launchers. Contracts as everywhere."""
