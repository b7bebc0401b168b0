"""Checks of arguments: what passes, what is refused, and the error that names the argument."""

import re

import numpy as np
import pytest
import torch

from treedecode.common import validation

NAN = float("nan")
INTS = [0, 3, -2, 10**20, np.int32(3), np.uint8(3)]
NOT_INTS = [True, False, np.True_, 1.0, np.float64(1), NAN, "1", None, [1]]
NUMBERS = [*INTS, 0.5, float("inf"), np.float32(0.5)]
NOT_NUMBERS = [True, np.False_, "0.5", None, [0.5], 1j]


def refused(error, message, check, *args):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check("size", *args)


@pytest.mark.parametrize("value", INTS)
def test_integers(value):
    result = validation.integer("size", value)
    assert result == value
    assert type(result) is int


@pytest.mark.parametrize("value", NOT_INTS)
def test_no_integers(value):
    refused(TypeError, f"size: expected an int, got {value!r}", validation.integer, value)
    refused(TypeError, f"size: expected an int, got {value!r}", validation.int_in, value, -9)
    refused(ValueError, f"size: expected an int >= 1, got {value!r}", validation.positive_int, value)
    refused(ValueError, f"size: expected an int >= 0, got {value!r}", validation.int_at_least, value, 0)


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers(value):
    assert validation.number("size", value) == value
    assert validation.number_in("size", value, -2) == value


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_no_numbers(value):
    refused(TypeError, f"size: expected a number, got {value!r}", validation.number, value)
    refused(TypeError, f"size: expected a number, got {value!r}", validation.number_in, value, 0, 1)


def test_lower_bounds_of_integers():
    for value in (1, np.int64(1)):
        assert validation.positive_int("size", value) == 1
        assert type(validation.positive_int("size", value)) is int
    assert validation.int_at_least("size", -3, -3) == -3
    refused(ValueError, "size: expected an int >= 1, got 0", validation.positive_int, 0)
    refused(ValueError, "size: expected an int >= 4, got 3", validation.int_at_least, 3, 4)


def test_ranges_of_integers():
    assert validation.int_from_to("size", 3, 1, 3) == 3
    for value in (0, 4, 1.5, True, "2"):
        refused(ValueError, f"size: expected an int from 1 to 3, got {value!r}", validation.int_from_to, value, 1, 3)


def test_ranges():
    for value in (2, 5):
        assert validation.int_in("size", value, 2, 5) == value
        assert validation.number_in("size", value, 2, 5) == value
    for check in (validation.int_in, validation.number_in):
        refused(ValueError, "size: expected a number from 2 to 5, got 6", check, 6, 2, 5)
        refused(ValueError, "size: expected a number >= 2, got 1", check, 1, 2)
    refused(ValueError, "size: expected a number from 0 to 0.5, got 0.75", validation.number_in, 0.75, 0, 0.5)


def test_nan_is_a_number_and_in_no_range():
    assert np.isnan(validation.number("size", NAN))
    refused(ValueError, "size: expected a number >= 0, got nan", validation.number_in, NAN, 0)
    refused(ValueError, "size: expected a number, got nan", validation.number_in, NAN, -float("inf"))


def test_one_of():
    validation.one_of("size", "b", ("a", "b"))
    refused(ValueError, "size: expected one of 'a', 'b', got 'c'", validation.one_of, "c", ("a", "b"))


@pytest.mark.parametrize("ids", [[0, 9], (0, 9), np.array([0, 9], np.uint8), torch.tensor([0, 9])])
def test_token_ids(ids):
    tokens = validation.token_ids("prompt", ids, 10)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [0, 9]


def test_no_token_ids_are_an_empty_row():
    for ids in ([], np.array([]), torch.tensor([])):
        tokens = validation.token_ids("prompt", ids, 10)
        assert (tokens.shape, tokens.dtype) == ((0,), np.int64)


@pytest.mark.parametrize("ids", [5, [[1, 2]], [1.0], [1, True], [[1], [2, 3]], ["a"], None, np.array([True])])
def test_what_is_no_row_of_token_ids(ids):
    message = f"size: expected a string or token ids, got {validation.shown(ids)}"
    refused(TypeError, message, validation.token_ids, ids, 10)


@pytest.mark.parametrize("outside", [-1, 10, 2**40])
def test_token_ids_outside_of_the_vocabulary(outside):
    message = f"size: expected token ids from 0 to 9, got {outside}"
    refused(ValueError, message, validation.token_ids, [3, outside], 10)


def test_ints_per_branch():
    for value in (4, [4, 4, 4], np.array([4, 4, 4], np.int32)):
        array = validation.ints_per_branch("counts", value, 3)
        assert array.dtype == np.int64
        assert array.tolist() == [4, 4, 4]
        array[0] = 5  # a copy: neither shared between branches nor with the argument
        assert array.tolist() == [5, 4, 4]
    assert validation.ints_per_branch("counts", [], 0).tolist() == []
    refused(TypeError, "size: expected an int, or one for each branch, got 1.5", validation.ints_per_branch, 1.5, 3)
    refused(TypeError, "size: expected an int, or one for each branch, got True", validation.ints_per_branch, True, 3)
    refused(
        ValueError,
        "size: expected an int, or 3, one for each branch, got [1, 2]",
        validation.ints_per_branch,
        [1, 2],
        3,
    )


def test_long_values_are_cut():
    assert validation.shown([1, 2]) == "list [1, 2]"
    assert len(validation.shown("x" * 500)) == 80
