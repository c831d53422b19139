"""Augmentation of single images inside tf.data: decoding, cropping, resizing, RandAugment, and their geometry."""
