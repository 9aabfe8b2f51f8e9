"""Ebbtide beside what users would pick instead, on the very same work."""
