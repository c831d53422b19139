"""Reads images and score maps from disk into batches. This is the only part of tlvit that uses TensorFlow."""

import os

# TensorFlow reads these when it is imported. They silence its start-up messages and turn off oneDNN, which
# reading does not use and which warns about float16.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

try:
    import tensorflow as tf
except ModuleNotFoundError as error:
    if error.name != "tensorflow":
        raise
    message = 'tlvit.data reads images with TensorFlow, which is not installed: pip install "tlvit[tf]"'
    raise ModuleNotFoundError(message, name="tensorflow") from error

# TensorFlow reserves all memory of every accelerator that it sees, so the accelerators are hidden from it
# before it runs anything.
for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)
