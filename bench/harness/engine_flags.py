"""What engine_process.py takes beside the flags of ``prefixd serve``.

A file of its own: whoever imports engine_process.py has its standard output redirected.
"""

from __future__ import annotations

__all__ = ["UNGROUPED"]

UNGROUPED = "--ungrouped"
"""a prefix is read again for each sequence of a step"""
