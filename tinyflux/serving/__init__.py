"""Pictures on request: over HTTP, or for a list of prompts."""
