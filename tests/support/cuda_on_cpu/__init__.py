"""The CUDA kernels run on the CPU: csrc/cuda compiled by a plain C++ compiler against the header in this folder."""
