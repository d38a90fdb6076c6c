"""What several tests share."""

import pkgutil

import pytest

# Makes asserts in these modules show what differs, as in the tests.
pytest.register_assert_rewrite(*[f"support.{m.name}" for m in pkgutil.iter_modules(__path__)])
