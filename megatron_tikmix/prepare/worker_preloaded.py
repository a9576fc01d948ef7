"""Imports megatron-core in the fork server, once for all worker processes.

It is a separate module, since a fork server can only be told to import modules, and must not start
threads.
"""

from megatron_tikmix.prepare.parts import import_indexed_dataset

import_indexed_dataset()
