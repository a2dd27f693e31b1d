"""Bulk sampling into files: any number of processes, one seed per image, resumable after any interrupt.

    image i comes from seed + i
    batch b holds images b B to (b + 1) B - 1; the last one is sampled in full size, its surplus images are dropped

Networks round differently for batches of different sizes. Batches are the same for every number of processes and after
every restart, and therefore so are the bytes.

Progress is read from the files present, which are written atomically, so that no list of them can be wrong. The
manifest beside them records the settings of the images: a run with other settings is refused.

`manifest` reads and writes that file, `targets` are the kinds of output, `run` samples.
"""

from ddim.bulk.run import BulkResult, sample_many

__all__ = ["BulkResult", "sample_many"]
