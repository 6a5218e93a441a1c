"""What a low-bit number is; pure Python, no torch."""
