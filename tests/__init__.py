"""Tests of the whole project; they mirror its tree."""

import pytest

pytest.register_assert_rewrite("tests.support.training")
