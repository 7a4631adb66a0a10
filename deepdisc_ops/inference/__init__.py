"""From a mosaic to a catalogue with trained members."""
