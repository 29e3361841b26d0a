"""The operators as Triton kernels, for CUDA; Triton's interpreter runs them on a CPU in tests."""
