"""Explain a quantized model as plain records."""
