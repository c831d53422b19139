"""A stand-in for timm, where it cannot be imported: two models, with the functions and attributes of timm."""

import copy
import types

import torch
from torch import nn

CONFIG = {
    "input_size": (3, 32, 32), "mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7), "crop_pct": 0.8,
    "crop_mode": "center", "num_classes": 6, "fixed_input_size": False,
}  # fmt: skip


class Conv(nn.Module):
    """Stride 8, mean, norm and classifier, as in timm's convolutional networks."""

    def __init__(self, num_classes=6):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 10
        self.conv = nn.Conv2d(3, 10, 8, stride=8)
        self.fc = nn.Linear(10, num_classes)

    def forward_features(self, x):
        return torch.relu(self.conv(x))

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class ChannelsLast(Conv):
    """The features are [B, h, w, C], as in Swin."""

    def forward_features(self, x):
        return super().forward_features(x).permute(0, 2, 3, 1)

    def forward_head(self, x):
        return self.fc(x.mean((1, 2)))


class ViT(nn.Module):
    """Class and distillation token, positions, a mixing of tokens, norm, two classifiers."""

    def __init__(self, num_classes=6, img_size=(32, 32)):
        super().__init__()
        self.num_classes, self.num_features, self.num_prefix_tokens = num_classes, 12, 2
        self.patch_embed = nn.Conv2d(3, 12, 8, stride=8)
        self.patch_embed.grid_size = (img_size[0] // 8, img_size[1] // 8)
        self.prefix = nn.Parameter(torch.randn(1, 2, 12))
        self.mix = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.head, self.head_dist = nn.Linear(12, num_classes), nn.Linear(12, num_classes)

    def forward_features(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        return self.norm(x + self.mix(x.mean(1, keepdim=True)))

    def forward_head(self, x):
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


MODELS = {
    "tiny_conv": (Conv, "fc"),
    "tiny_swin": (ChannelsLast, "fc"),
    "tiny_vit": (ViT, ("head", "head_dist")),
}
TAGS = ("tiny_conv.a1_in1k", "tiny_conv.a2_in1k")


class Config:
    def __init__(self, values):
        self.values = values

    def to_dict(self):
        return copy.deepcopy(self.values)


def get_pretrained_cfg(name):
    base, _, tag = name.partition(".")
    if tag and name not in TAGS:
        raise RuntimeError(f"Invalid pretrained tag ({tag}) for {base}.")
    return Config({**CONFIG, "classifier": MODELS[base][1], "fixed_input_size": base == "tiny_vit"})


def create_model(name, *, pretrained, num_classes=6, pretrained_cfg_overlay=None, **options):
    torch.manual_seed(0)
    model = MODELS[name.partition(".")[0]][0](num_classes, **options)
    model.pretrained_cfg = get_pretrained_cfg(name).to_dict()
    assert pretrained
    state = (pretrained_cfg_overlay or {}).get("state_dict")
    if state is None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.")
    model.load_state_dict(state)
    return model


def module():
    """The package, for sys.modules."""
    timm = types.ModuleType("timm")
    timm.is_model, timm.list_models = MODELS.__contains__, lambda: list(MODELS)
    timm.list_pretrained = lambda pattern: [tag for tag in TAGS if tag.startswith(pattern.rstrip("*"))]
    timm.get_pretrained_cfg, timm.create_model = get_pretrained_cfg, create_model
    timm.data = types.ModuleType("timm.data")
    timm.data.resolve_model_data_config = lambda model: model.pretrained_cfg
    timm.data.infer_imagenet_subset = lambda model: None
    return timm
