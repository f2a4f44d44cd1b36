"""The first-layer operation: operator schema, choice of a backend, PyTorch definition, native libraries."""
