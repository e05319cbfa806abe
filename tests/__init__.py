"""Tests: behaviour against something independent."""
