"""What several tests share."""

import pkgutil

import pytest

# The asserts in here then say what differs, as those of the tests do.
pytest.register_assert_rewrite(*[f"support.{m.name}" for m in pkgutil.iter_modules(__path__)])
