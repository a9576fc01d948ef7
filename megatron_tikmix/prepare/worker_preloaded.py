"""Imports megatron-core in the fork server, once for all worker processes.

A module of its own, since importing a module is all that a fork server can be asked to do, and it
must start no thread.
"""

from megatron_tikmix.prepare.parts import import_indexed_dataset

import_indexed_dataset()
