"""The detection and redshift network, built on detectron2."""
