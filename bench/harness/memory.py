"""What a process holds in memory, as the kernel counts it (proc_pid_status(5))."""

from __future__ import annotations

from pathlib import Path

__all__ = ["status_bytes"]


def status_bytes(field: str, pid: int | None = None) -> int:
    """``VmRSS``: in RAM now; ``VmHWM``: its peak. Of this process unless a ``pid`` is given."""
    lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
