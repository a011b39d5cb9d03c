"""Comparisons of runs with error bars: arms by seeds, paired by position."""
