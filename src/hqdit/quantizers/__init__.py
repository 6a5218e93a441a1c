"""From a tensor to codes and scales."""
