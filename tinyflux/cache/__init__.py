"""The dataset that training reads: built once from pictures and captions, checked at every open."""
