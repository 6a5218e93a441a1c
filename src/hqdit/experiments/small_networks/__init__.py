"""Small networks that are no diffusion transformers: trained here, quantized by the same rotation and quantizer."""
