"""From prompts to pictures: one at a time or many at once, in pure torch."""
