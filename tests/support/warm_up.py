"""Work that each run repeats. Importing this module does it once, before runs are forked."""

from composer.utils import collect_env

from model import build_composer_model

# Composer starts another Python process to find the processor's name, which it only records.
collect_env.get_cpu_model = lambda: "the processor of a test"
# Python caches which of the metrics' classes are sequences or mappings.
build_composer_model(num_classes=3, backbone_arch="resnet50", backbone_weights=None)
