"""What any picture may ask for, wherever it is drawn."""

MAX_STEPS = 1000
MAX_SIDE = 1024  # latent units
