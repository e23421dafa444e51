"""Settings of every test: property tests draw the same examples each run, and a slow machine fails none of them."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "engrampool",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("engrampool")
