"""Hypothesis profiles; `long` tries twenty times as many inputs as `short`."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "short",
    derandomize=True,
    max_examples=50,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=1000)
settings.load_profile("short")
