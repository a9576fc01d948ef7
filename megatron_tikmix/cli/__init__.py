"""The commands of ``tikmix``, one module each: ``build_parser()`` and ``main(argv) -> int``.

:mod:`megatron_tikmix.cli.main` lists them. A command raises InputError for bad input; the exit code
is for what it found.
"""
