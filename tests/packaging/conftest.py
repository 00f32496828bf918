"""Where kernel-builder runs the tests there is no packaging to test."""

from tests.support import REPOSITORY

collect_ignore_glob = [] if (REPOSITORY / "scripts").is_dir() else ["test_*.py"]
