"""The student as a diffusers pipeline, and its export for people without this package."""
