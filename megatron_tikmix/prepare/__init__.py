"""From text on disk to `.bin/.idx` files and a manifest; `tikmix preprocess` is its command.

::

    sources.py   --input values -> the files of every domain and split
    readers.py   a file -> parts of it -> documents, or what is wrong with them
    parts.py     one part -> tokens in its own pair of files; the unit of work and of restarts
    publish.py   parts -> one pair for each split, and the manifest, all of it or nothing
    pipeline.py  all of that over processes and shards
"""
