"""The student, and the frozen models that it learns from."""
