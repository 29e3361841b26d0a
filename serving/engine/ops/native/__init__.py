"""The operators and the forward pass in C++: built where they run, called through ctypes."""
