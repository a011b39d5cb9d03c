"""What a run will take of a cluster, before anything is spent."""
