"""The kinds of networks that torchvision has, narrow enough for their symmetries to be searched."""

import functools
from collections.abc import Callable

from torch import nn
from torchvision.models import (
    ConvNeXt,
    DenseNet,
    EfficientNet,
    RegNet,
    ShuffleNetV2,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.googlenet import Inception
from torchvision.models.inception import InceptionA
from torchvision.models.maxvit import MaxVit
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.squeezenet import Fire
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.vgg import VGG, make_layers


def ended(channels: int, *layers: nn.Module) -> nn.Sequential:
    """Layers of which torchvision has no narrow network, made into one."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def resnet(block: type, **options) -> nn.Module:
    net = ResNet(block, [1, 1, 1, 1], num_classes=5, **options)
    wide = 4 * block.expansion
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    shortcut = nn.Sequential(nn.Conv2d(4, wide, 1, bias=False), nn.BatchNorm2d(wide))
    net.layer1 = nn.Sequential(block(4, 4, 1, shortcut), block(wide, 4))
    net.layer2 = net.layer3 = net.layer4 = nn.Identity()
    net.fc = nn.Linear(wide, 5)
    return net


def swin(**options) -> nn.Module:
    return SwinTransformer(
        [2, 2], 4, [2, 2], [2, 2], [2, 2], 2.0, num_classes=5, stochastic_depth_prob=0.0, **options
    )  # fmt: skip


def efficientnet() -> nn.Module:
    rows = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(2, 3, 2, 8, 8, 1),
        MBConvConfig(2, 3, 2, 8, 8, 2, 1.0, 1.0),
    ]
    return EfficientNet(rows, 0.0, 0.0, num_classes=5, last_channel=12)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (functools.partial(resnet, BasicBlock), 16),
    "resnet, bottleneck": (functools.partial(resnet, Bottleneck), 16),
    "resnet, group norm": (
        functools.partial(resnet, BasicBlock, norm_layer=functools.partial(nn.GroupNorm, 2)), 16
    ),
    "vgg": (
        lambda: VGG(
            nn.Sequential(*make_layers([4, "M", 6], True), nn.Conv2d(6, 512, 1)), 5, dropout=0.0
        ).features,
        8,
    ),
    "densenet": (lambda: DenseNet(3, (2, 2), 4, 2, num_classes=5), 32),
    "shufflenet": (lambda: ShuffleNetV2([2, 2, 1], [6, 8, 12, 16, 12], num_classes=5), 32),
    "mobilenet_v2": (
        lambda: MobileNetV2(5, 0.1, [[1, 8, 1, 1], [2, 8, 2, 2], [2, 8, 1, 1]], 8, dropout=0.0), 16
    ),
    "efficientnet": (efficientnet, 16),
    "regnet": (
        lambda: RegNet(
            BlockParams([1, 2], [8, 12], [4, 4], [1.0, 1.0], [2, 2], 0.25), num_classes=5,
            stem_width=6,
        ),
        16,
    ),
    "convnext": (
        lambda: ConvNeXt([CNBlockConfig(4, 6, 1), CNBlockConfig(6, None, 1)], num_classes=5), 16
    ),
    "vit": (lambda: VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=5), 8),
    "swin": (swin, 16),
    "swin_v2": (
        functools.partial(
            swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
        ),
        16,
    ),
    "maxvit": (
        lambda: MaxVit((32, 32), 6, 4, [8], [1], 4, 0.0, num_classes=5), 32
    ),
    "squeezenet": (lambda: ended(8, nn.Conv2d(3, 6, 3), Fire(6, 3, 4, 4)), 8),
    "googlenet": (lambda: ended(12, nn.Conv2d(3, 6, 3), Inception(6, 3, 2, 3, 2, 3, 3)), 8),
    "inception_v3": (lambda: ended(226, nn.Conv2d(3, 4, 3), InceptionA(4, 2)), 8),
}  # fmt: skip
