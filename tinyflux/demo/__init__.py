"""``make demo``: the whole system, end to end, on OpenMoji pictures and the toy world."""
