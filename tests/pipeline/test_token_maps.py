"""Token maps against hand-made tokens whose principal directions are known."""

import numpy as np

from featurestore.token_maps import principal_maps


def test_tokens_that_differ_along_one_direction_go_from_black_to_full_in_the_first_colour():
    ramp = np.linspace(-1, 1, 2 * 4 * 3 * 3, dtype=np.float32).reshape(2, 4, 3, 3, 1)
    tokens = ramp * np.array([3.0, 4.0], np.float32)  # one direction, (0.6, 0.8)
    red = principal_maps(tokens)[..., 0].astype(int)
    assert red.min() == 0
    assert red.max() == 255
    assert (np.diff(red.reshape(-1)) >= 0).all()


def test_an_outlier_token_does_not_grey_out_the_others():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(1, 16, 8, 8, 6)).astype(np.float32)
    tokens[0, 0, 0, 0] = 1000
    others = principal_maps(tokens)[0, 1:].reshape(-1, 3)
    assert others[:, 1].std() > 40  # the second component spans its colours


def test_constant_tokens_and_narrow_encoders_give_a_map_and_no_warning():
    with np.errstate(all="raise"):
        maps = principal_maps(np.ones((1, 2, 2, 2, 2), np.float16))
    assert maps.shape == (1, 2, 2, 2, 3)
    assert not maps[..., 2].any()
