"""One-time work of every run. Importing this module does it once, before runs are forked."""

import functools

from composer.utils import collect_env

from model import build_composer_model
from segmentation.classes import distinct_colors
from training.config import resolve

# Composer would start a Python process just to log the processor's name.
collect_env.get_cpu_model = lambda: "the processor of a test"
# For each checkpoint, Composer would read the metadata of its package.
collect_env.get_composer_commit_hash = functools.cache(collect_env.get_composer_commit_hash)
# Building a model fills Python's cache of which classes are sequences or mappings.
build_composer_model(num_classes=3, backbone_arch="resnet50", backbone_weights=None)
resolve({}, with_data=False)  # Build the schema of the config.
distinct_colors(3)  # Fill OpenCV's table for the conversion to CIELAB.
