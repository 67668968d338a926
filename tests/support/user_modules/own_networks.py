"""A user's network functions for `model.name`, some of which are invalid."""

from torch import nn


def build(num_classes, width=4):
    network = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, num_classes, 1))
    network.mean, network.std, network.size_divisor = (127.5,) * 3, (127.5,) * 3, 8
    return network


def as_mapping(num_classes):
    class Network(nn.Conv2d):
        def forward(self, image):
            return {"out": super().forward(image)}

    return Network(3, num_classes, 1)


def fixed(num_classes):
    class Network(nn.Conv2d):
        def forward(self, image):
            assert image.shape[2:] == (64, 64), "not 64 pixels"
            return super().forward(image)

    return Network(3, num_classes, 1)


def no_network(num_classes):
    return "a network"


def wrong(num_classes):
    return nn.Conv2d(3, num_classes + 1, 1)
