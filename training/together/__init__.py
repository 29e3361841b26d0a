"""Many adapters trained at once over one frozen base, each as if it were alone."""
