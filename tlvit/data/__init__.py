"""Reading images and score maps from disk into batches: the only part of tlvit that uses TensorFlow."""

import os

# Read when TensorFlow is imported: its start-up chatter; and oneDNN, which reading does not use and which
# complains about float16.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

try:
    import tensorflow as tf
except ModuleNotFoundError as error:
    if error.name != "tensorflow":
        raise
    message = 'tlvit.data reads images with TensorFlow, which is not installed: pip install "tlvit[tf]"'
    raise ModuleNotFoundError(message, name="tensorflow") from error

# TensorFlow takes all memory of every accelerator it sees, so JAX's are hidden before anything else of it
# runs.
for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)
