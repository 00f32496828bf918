"""Tests that need a patched library. ``Tree.pytest`` runs them; by themselves they are not collected."""
