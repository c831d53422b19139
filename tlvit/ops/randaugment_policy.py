"""RandAugment's policy string and the ranges of its fifteen operations, for the host and the device.

The policy is Cubuk et al. 2019 (arXiv:1909.13719) in the variant of the published recipes, whose string is
`rand-m9-n2-mstd0.5-inc1`.
"""

import dataclasses
import re

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)

# Strength of the operations at magnitude 10. At magnitude m it is m / 10 of that.
MAX_MAGNITUDE = 10.0
ROTATE_DEGREES = 30.0
SHEAR = 0.3
TRANSLATE = 0.45  # of the width or height
ENHANCE = 0.9  # color, contrast, brightness, sharpness: the factor is 1 - or + this, at least MIN_ENHANCE
MIN_ENHANCE = 0.1
POSTERIZE_BITS = 4  # 4 bits are kept at magnitude 0, none at 10
SOLARIZE = 256  # the threshold goes from 256 down to 0
SOLARIZE_ADD = 110  # added to values below SOLARIZE_ADD_BELOW
SOLARIZE_ADD_BELOW = 128

FILL = (124, 116, 104)  # ImageNet's mean color, for pixels from outside of the image


@dataclasses.dataclass(frozen=True)
class AugmentPolicy:
    """A parsed policy string.

    Attributes:
      magnitude: M, 0 to 10.
      layers: n, number of operations drawn for an image, with replacement. Each is applied with
        `probability`.
      noise: S, standard deviation of the magnitude of each operation, which is clipped to [0, 10].
      probability: probability that a drawn operation is applied, in [0, 1].
    """

    magnitude: float
    layers: int = 2
    noise: float = 0.0
    probability: float = 0.5


def parse_policy(text: str) -> AugmentPolicy | None:
    """`rand-mM-nN-mstdS-inc1` in any order of its pieces; n is 2 and mstd 0 where they are left out.

    Returns:
      The policy, or None for "" (no RandAugment).

    Raises:
      ValueError: names the piece that is wrong.
    """
    if not text:
        return None
    first, *pieces = text.split("-")
    if first != "rand":
        raise ValueError(f"RandAugment policy {text!r} begins with {first!r} instead of 'rand'")
    values = {}
    for piece in pieces:
        match = re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", piece)
        if not match:
            raise ValueError(
                f"RandAugment policy {text!r} has the piece {piece!r}; known are mM, nN, mstdS and inc1"
            )
        name, value = match.group(1), float(match.group(2))
        if name in values:
            raise ValueError(f"RandAugment policy {text!r} gives {name!r} twice: {piece!r}")
        high = {"m": MAX_MAGNITUDE, "n": 15, "mstd": 100, "inc": 1}[name]
        whole = name in ("n", "inc")
        if value > high or (whole and (value < 1 or value != int(value))):
            kind = f"a whole number from 1 to {high}" if whole else f"from 0 to {high:g}"
            raise ValueError(f"RandAugment policy {text!r}: {piece!r} is not {kind}")
        values[name] = value
    for name, example in (("m", "m9"), ("inc", "inc1")):
        if name not in values:
            raise ValueError(
                f"RandAugment policy {text!r} lacks a piece like {example!r}; "
                "the operations here are the ones that grow with the magnitude (inc1)"
            )
    return AugmentPolicy(values["m"], int(values.get("n", 2)), values.get("mstd", 0.0))
