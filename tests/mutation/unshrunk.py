"""A plugin of pytest: makes no failing example of Hypothesis smaller, which takes longer than to find it."""

from hypothesis import Phase, settings

settings.register_profile("unshrunk", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
