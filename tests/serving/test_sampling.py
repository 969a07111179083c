import pytest

from couturier.components.errors import ConfigError
from couturier.serving.sampling import MAX_SEED, Sampling


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n": 65}, {"guidance": -0.1}, {"guidance": float("nan")}, {"temperature": 9.0}, {"seed": -1}]
)
def test_a_value_outside_its_range_is_named(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*wanted"):
        Sampling(**wrong)


def test_the_bounds_themselves_are_fine():
    Sampling(n=64, guidance=0.0, temperature=0.0, seed=MAX_SEED)


def test_new_needs_likeliest():
    with pytest.raises(ConfigError, match="new is True without likeliest"):
        Sampling(new=True)
