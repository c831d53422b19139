"""Decodes and augments single images inside tf.data and keeps track of their geometry."""
