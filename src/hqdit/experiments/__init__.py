"""The experiments behind `hqdit reproduce`: one module each, from models to a plain record."""
