"""The environment and the fixtures of tests/interpreted, in a process of its own as well."""

from tests.interpreted.conftest import tiny_model_dir
from tests.interpreted.test_graphs import used

__all__ = ["tiny_model_dir", "used"]
