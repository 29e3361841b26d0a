"""Data sets made on the spot from packages that ship the source of one."""
