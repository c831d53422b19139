"""What was published about the models: ImageNet accuracies with their sources, and where the weights are."""

import dataclasses

LVVIT = "Jiang et al. 2021, arXiv:2104.10858, and the README of zihangJiang/TokenLabeling"
T2T = "Yuan et al. 2021, arXiv:2101.11986, and the README of yitu-opensource/T2T-ViT"
DEIT = "Touvron et al. 2021, arXiv:2012.12877, and README_deit.md of facebookresearch/deit"
DEIT3 = "Touvron et al. 2022, arXiv:2204.07118, and README_revenge.md of facebookresearch/deit"
TEACHER = "Touvron et al. 2021, arXiv:2012.12877: the teacher of DeiT"
NFNET = "Brock et al. 2021, arXiv:2102.06171 (F6 trained with SAM)"

# (place, name of the release) of the published weights.
TOKEN_LABELING = "github.com/zihangJiang/TokenLabeling"
LVVIT_1_0 = (TOKEN_LABELING, "1.0")
LVVIT_1_1 = (TOKEN_LABELING, "1.1")
LVVIT_SEG = (TOKEN_LABELING, "v1.1-seg")
LVVIT_DRIVE = (f"Google Drive, linked in issue 23 of {TOKEN_LABELING}", "")
T2T_MAIN = ("github.com/yitu-opensource/T2T-ViT", "main")
FACEBOOK = ("dl.fbaipublicfiles.com/deit, linked in the READMEs of github.com/facebookresearch/deit", "")
TIMM_DNF = ("github.com/huggingface/pytorch-image-models", "v0.1-dnf-weights")


@dataclasses.dataclass(frozen=True)
class Published:
    """The published result of a model at an image size.

    Attributes:
      model: a name in `tlvit.list_models()`.
      side: image height and width in pixels.
      top1: ImageNet top-1 accuracy in percent; None for models of another task.
      source: where the accuracy is published.
      file: name of the file of the weights, empty if it is not known.
      release: the place of the file and the name of the release, which may be empty.
    """

    model: str
    side: int
    top1: float | None
    source: str
    file: str
    release: tuple[str, str]


PUBLISHED = (
    Published("lvvit_t", 224, 79.1, LVVIT, "", LVVIT_DRIVE),
    Published("lvvit_s", 224, 83.3, LVVIT, "lvvit_s-26M-224-83.3.pth.tar", LVVIT_1_0),
    Published("lvvit_s", 384, 84.4, LVVIT, "lvvit_s-26M-384-84.4.pth.tar", LVVIT_1_0),
    Published("lvvit_m", 224, 84.0, LVVIT, "lvvit_m-56M-224-84.0.pth.tar", LVVIT_1_0),
    Published("lvvit_m", 384, 85.4, LVVIT, "lvvit_m-56M-384-85.4.pth.tar", LVVIT_1_0),
    Published("lvvit_m", 448, 85.5, LVVIT, "lvvit_m-56M-448-85.5.pth.tar", LVVIT_1_1),
    Published("lvvit_l", 448, 86.2, LVVIT, "lvvit_l-150M-448-86.2.pth.tar", LVVIT_1_0),
    Published("lvvit_l", 512, 86.4, LVVIT, "lvvit_l-150M-512-86.4.pth.tar", LVVIT_1_0),
    Published("t2t_vit_7", 224, 71.7, T2T, "71.7_T2T_ViT_7.pth.tar", T2T_MAIN),
    Published("t2t_vit_10", 224, 75.2, T2T, "75.2_T2T_ViT_10.pth.tar", T2T_MAIN),
    Published("t2t_vit_12", 224, 76.5, T2T, "76.5_T2T_ViT_12.pth.tar", T2T_MAIN),
    Published("t2t_vit_14", 224, 81.5, T2T, "81.5_T2T_ViT_14.pth.tar", T2T_MAIN),
    Published("t2t_vit_14", 384, 83.3, T2T, "83.3_T2T_ViT_14.pth.tar", T2T_MAIN),
    Published("t2t_vit_19", 224, 81.9, T2T, "81.9_T2T_ViT_19.pth.tar", T2T_MAIN),
    Published("t2t_vit_24", 224, 82.3, T2T, "82.3_T2T_ViT_24.pth.tar", T2T_MAIN),
    Published("t2t_vit_t_14", 224, 81.7, T2T, "81.7_T2T_ViTt_14.pth.tar", T2T_MAIN),
    Published("t2t_vit_t_19", 224, 82.4, T2T, "82.4_T2T_ViTt_19.pth.tar", T2T_MAIN),
    Published("t2t_vit_t_24", 224, 82.6, T2T, "82.6_T2T_ViTt_24.pth.tar", T2T_MAIN),
    Published("deit_tiny_patch16_224", 224, 72.2, DEIT, "deit_tiny_patch16_224-a1311bcf.pth", FACEBOOK),
    Published("deit_small_patch16_224", 224, 79.9, DEIT, "deit_small_patch16_224-cd65a155.pth", FACEBOOK),
    Published("deit_base_patch16_224", 224, 81.8, DEIT, "deit_base_patch16_224-b5f2ef4d.pth", FACEBOOK),
    Published("deit_base_patch16_384", 384, 82.9, DEIT, "deit_base_patch16_384-8de9b5d1.pth", FACEBOOK),
    Published("deit_tiny_distilled_patch16_224", 224, 74.5, DEIT,
              "deit_tiny_distilled_patch16_224-b40b3cf7.pth", FACEBOOK),
    Published("deit_small_distilled_patch16_224", 224, 81.2, DEIT,
              "deit_small_distilled_patch16_224-649709d9.pth", FACEBOOK),
    Published("deit_base_distilled_patch16_224", 224, 83.4, DEIT,
              "deit_base_distilled_patch16_224-df68dfff.pth", FACEBOOK),
    Published("deit_base_distilled_patch16_384", 384, 85.2, DEIT,
              "deit_base_distilled_patch16_384-d0272ac0.pth", FACEBOOK),
    Published("deit_small_patch16_LS", 224, 81.4, DEIT3, "deit_3_small_224_1k.pth", FACEBOOK),
    Published("deit_small_patch16_LS", 384, 83.4, DEIT3, "deit_3_small_384_1k.pth", FACEBOOK),
    Published("deit_base_patch16_LS", 224, 83.8, DEIT3, "deit_3_base_224_1k.pth", FACEBOOK),
    Published("deit_base_patch16_LS", 384, 85.0, DEIT3, "deit_3_base_384_1k.pth", FACEBOOK),
    Published("deit_large_patch16_LS", 224, 84.9, DEIT3, "deit_3_large_224_1k.pth", FACEBOOK),
    Published("deit_large_patch16_LS", 384, 85.8, DEIT3, "deit_3_large_384_1k.pth", FACEBOOK),
    Published("regnety_160", 224, 82.9, TEACHER, "regnety_160-a5fe301d.pth", FACEBOOK),
    Published("dm_nfnet_f0", 256, 83.6, NFNET, "dm_nfnet_f0-604f9c3a.pth", TIMM_DNF),
    Published("dm_nfnet_f1", 320, 84.7, NFNET, "dm_nfnet_f1-fc540f82.pth", TIMM_DNF),
    Published("dm_nfnet_f2", 352, 85.1, NFNET, "dm_nfnet_f2-89875923.pth", TIMM_DNF),
    Published("dm_nfnet_f3", 416, 85.7, NFNET, "dm_nfnet_f3-d74ab3aa.pth", TIMM_DNF),
    Published("dm_nfnet_f4", 512, 85.9, NFNET, "dm_nfnet_f4-0ac5b10b.pth", TIMM_DNF),
    Published("dm_nfnet_f5", 544, 86.0, NFNET, "dm_nfnet_f5-ecb20ab1.pth", TIMM_DNF),
    Published("dm_nfnet_f6", 576, 86.5, NFNET, "dm_nfnet_f6-e0f12116.pth", TIMM_DNF),
    Published("upernet_lvvit_s", 512, None, LVVIT, "upernet_lvvit_s.pth", LVVIT_SEG),
    Published("upernet_lvvit_m", 512, None, LVVIT, "upernet_lvvit_m.pth", LVVIT_SEG),
    Published("upernet_lvvit_l", 512, None, LVVIT, "upernet_lvvit_l.pth", LVVIT_SEG),
)  # fmt: skip


def find(model: str, side: int) -> Published | None:
    """What was published about a model at an image side in pixels; None if nothing was."""
    return next((p for p in PUBLISHED if (p.model, p.side) == (model, side)), None)


def sides(model: str) -> list[int]:
    """The image sides that something was published for, in pixels."""
    return [p.side for p in PUBLISHED if p.model == model]
