"""The mesh's axes: any number of ranks, what is chosen and why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bands.axes import choose_axes
from engine.config import UserError


@given(st.integers(1, 512), st.integers(1, 9), st.booleans())
def test_any_number_of_ranks_has_axes(ranks, pictures, guided):
    axes = choose_axes(ranks, pictures=pictures, guided=guided)
    assert axes.image * axes.guidance * axes.band == ranks
    assert pictures % axes.image == 0
    assert axes.guidance == 1 or guided
    assert axes.reason


@pytest.mark.parametrize(
    ("ranks", "options", "text"),
    [
        (1, {}, "1 image x 1 guidance x 1 band: one rank does it all"),
        (8, {}, "1 image x 2 guidance x 4 band: the two sides of guidance need nothing of each other"),  # noqa: E501
        (8, {"guided": False}, "1 image x 1 guidance x 8 band: there is no guidance to share out"),
        (3, {}, "1 image x 1 guidance x 3 band: 3 ranks do not fall into two equal sides of guidance"),  # noqa: E501
        (
            8,
            {"pictures": 2},
            "2 image x 2 guidance x 2 band: pictures need nothing of each other, and the two sides "
            "of guidance need nothing of each other",
        ),
        (8, {"guidance": 1}, "1 image x 1 guidance x 8 band: as asked"),
    ],
)  # fmt: skip
def test_the_choice_is_explained(ranks, options, text):
    assert str(choose_axes(ranks, **options)) == text


@pytest.mark.parametrize(
    ("ranks", "options", "sentence"),
    [
        (3, {"guidance": 2}, "start a multiple of 2 ranks"),
        (4, {"image": 3, "pictures": 3}, "start a multiple of 3 ranks"),
        (4, {"image": 2, "pictures": 3}, "cannot share out 3 pictures evenly"),
        (4, {"guidance": 2, "guided": False}, "needs a guidance scale above 1"),
    ],
)
def test_what_does_not_divide_is_refused(ranks, options, sentence):
    with pytest.raises(UserError, match=sentence):
        choose_axes(ranks, **options)
