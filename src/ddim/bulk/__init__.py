"""Many pictures in files: exactly so many, each from its own seed, by any number of processes, and gone on with after
any interruption.

    picture i comes from seed + i
    batch b is pictures b B to (b + 1) B - 1; the last one is filled up with further seeds, whose pictures are dropped

Networks round a little differently for batches of different sizes. Batches are the same for every number of processes
and after every restart, and so are the bytes.

What is done is seen from the files that are there, which are written whole: there is no list that could be wrong. The
manifest beside them says what they are pictures of: other settings are refused, not mixed in.

`manifest` is that file, `targets` are the kinds of output, `run` paints.
"""

from ddim.bulk.run import Result, sample_many

__all__ = ["Result", "sample_many"]
