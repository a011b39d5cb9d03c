"""The caches of the public API: in memory, saved to and loaded from the format on disk.

Encodings and each teacher's features are caches of their own; a dataset has all of its samples',
and several datasets stand beside each other by their ids.
"""
