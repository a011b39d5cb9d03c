"""The toy pictures, and small frozen models that are trained on them."""
