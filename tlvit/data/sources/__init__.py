"""Sources of encoded, labeled images: TFDS data sets, class folders, digit scenes."""
