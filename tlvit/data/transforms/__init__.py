"""From encoded bytes to pixels of the final size, with their geometry, inside tf.data."""
