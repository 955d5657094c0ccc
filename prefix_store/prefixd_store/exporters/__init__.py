"""Prefixes as other libraries load them. One module a format."""

from prefixd_store.exporters.peft import export_peft

__all__ = ["export_peft"]
