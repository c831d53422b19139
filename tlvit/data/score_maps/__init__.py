"""Score maps on disk: format, reader, writer, import of the published files."""
