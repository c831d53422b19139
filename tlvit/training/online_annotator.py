"""The annotator inside the training step: dense logits of the augmented images, in place of score maps."""

import jax
from jax.sharding import Mesh

from tlvit.checkpoints.model_info import ModelInfo
from tlvit.models.functional import Net
from tlvit.ops.normalize import normalize
from tlvit.ops.resize import resize_pixels
from tlvit.shapes import Float32, Num
from tlvit.training.mesh import batch_sharding, map_devices
from tlvit.types import Array, PyTree


def online_logits(
    net: Net, info: ModelInfo, arrays: tuple[PyTree, PyTree], images: Num[Array, "B H W 3"], mesh: Mesh
) -> Float32[Array, "B h w L"]:
    """The annotator's logits of every cell of the images, for which nothing is differentiated.

    The images are resized to the annotator's image size and normalized as it was trained. All devices of the
    mesh divide the images, also those of the axis `model`, which have the same images: the annotator needs no
    tensor parallelism, and convolutional networks have none.

    Args:
      net: the annotator's computation, with dense logits.
      info: its image size and preprocessing.
      arrays: its parameters and statistics.
      images: pixels from 0 to 255, augmented, before random erasing and mixing.
      mesh: the devices.
    """

    def score(arrays: tuple[PyTree, PyTree], images: Array) -> Array:
        pixels = resize_pixels(images, info.image_size)
        pixels = normalize(pixels, info.preprocessing.mean, info.preprocessing.std)
        return net.bind(*arrays).dense_logits(pixels)

    axes = mesh.axis_names if images.shape[0] % mesh.devices.size == 0 else batch_sharding(mesh).spec[0]
    logits = map_devices(score, mesh, axes)(*jax.lax.stop_gradient((arrays, images)))
    if "model" in mesh.shape:
        logits = jax.lax.with_sharding_constraint(logits, batch_sharding(mesh))
    return logits
