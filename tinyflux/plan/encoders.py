"""FLOPs of the published encoders and teachers, and how long they take."""

from typing import NamedTuple

from tinyflux.distributed.config import Speed

MEASURED_SIDE = 512


class Flops(NamedTuple):
    """Of one sample at 512 x 512 pixels.

    Attributes:
        convolutions, products: grow with the pixels.
        attention: of image tokens; grows with the pixels' square.
    """

    convolutions: float
    products: float
    attention: float = 0.0

    def at(self, pixels: int) -> "Flops":
        """Of a picture of so many pixels."""
        times = pixels / MEASURED_SIDE**2
        return Flops(times * self.convolutions, times * self.products, times**2 * self.attention)

    def seconds(self, speed: Speed) -> float:
        """That a process of this speed takes for them."""
        return (
            self.convolutions / speed.convolutions
            + (self.products + self.attention) / speed.products
        )


# Counted by torch: either VAE's encoder and decoder; SD1.5's UNet for one of the ten times, down to
# its middle (Lune), and whole with the rows of its attention made once more, as on a GPU (Sol);
# T5-base at 128 tokens and CLIP, which know no pixels.
VAE = Flops(1074.6e9, 8.6e9, 34.4e9)
DECODER = Flops(2472.0e9, 8.6e9, 34.4e9)
LUNE = Flops(115.2e9, 97.0e9, 49.2e9)
SOL = Flops(443.0e9, 222.9e9, 162.6e9)
TEXT = Flops(0.0, 35.6e9)
