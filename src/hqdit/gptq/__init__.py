"""Weight rounding that minimises the layer's output error."""
