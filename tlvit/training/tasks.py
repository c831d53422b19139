"""The tasks by name."""

from tlvit.training.classification import CLASSIFICATION
from tlvit.training.segmentation import SEGMENTATION
from tlvit.training.task import Task

TASKS: dict[str, Task] = {"classification": CLASSIFICATION, "segmentation": SEGMENTATION}
