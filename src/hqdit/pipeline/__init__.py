"""The verbs: plan, quantize, save, load."""
