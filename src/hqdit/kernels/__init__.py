"""The low-bit linear operation behind one seam of backends."""
