"""Pictures of runs, models and score maps, drawn with Matplotlib."""
