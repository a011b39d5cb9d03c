"""How good pictures are: feature extractors, metrics over their features, and the record."""
