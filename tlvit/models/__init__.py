"""The models as Flax modules, and the table of their names."""
