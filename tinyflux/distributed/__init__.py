"""Ray and DeepSpeed around the library."""
