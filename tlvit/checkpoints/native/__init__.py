"""tlvit's own checkpoints. Orbax is used in this folder only.

`checkpoints/` in a workdir has a folder for each saved step, with the training state, a JSON record and the
score of the step. A model folder has the arrays of one model and its ModelInfo. Both have checksums.
"""

from tlvit.checkpoints.native.inference import load_model, restore_for_inference, save_model_folder
from tlvit.checkpoints.native.run import Checkpoints

__all__ = ["Checkpoints", "load_model", "restore_for_inference", "save_model_folder"]
