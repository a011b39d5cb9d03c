"""Folders on disks and at URLs, and what of the latter is kept on this machine's disk."""
