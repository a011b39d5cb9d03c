"""What became of a run: its figures, its report, and the stages that lead there."""
