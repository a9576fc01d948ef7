"""Imported once for all worker processes: what takes seconds, and starts no thread."""

from megatron_tikmix.prepare.parts import import_indexed_dataset

import_indexed_dataset()
