"""DeepDISC photo-z at scale: survey images in, a catalogue with a redshift density for every object out."""

__version__ = "0.1.0"
