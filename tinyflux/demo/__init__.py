"""``make demo``: the whole system, end to end, on the toy's pictures and the toy world."""
