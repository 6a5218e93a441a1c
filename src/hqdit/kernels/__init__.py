"""The low-bit linear operation and what surrounds it, behind one seam of backends."""
