"""Small helpers, a subject a module."""
