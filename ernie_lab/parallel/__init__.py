"""Models larger than one device: layers over devices, layers from disk, experts over ranks."""
