"""One-time work of every run. Importing this module does it once, before runs are forked."""

from composer.utils import collect_env

from model import build_composer_model

# Composer would start a Python process just to log the processor's name.
collect_env.get_cpu_model = lambda: "the processor of a test"
# Building a model fills Python's cache of which classes are sequences or mappings.
build_composer_model(num_classes=3, backbone_arch="resnet50", backbone_weights=None)
