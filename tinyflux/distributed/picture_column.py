"""A Parquet file's column of pictures, of which a row group is in memory at a time."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.sources.parquet import picture_bytes
from tinyflux.storage.remote import open_filesystem


class PictureColumn:
    """Pictures of a Parquet file at a path or a URL, alone or as the Hub's ``bytes``.

    Args:
        file: its place.
        key: the column's name.

    Raises:
        OSError: it cannot be read; ``ValueError`` where it is no Parquet.
    """

    def __init__(self, file: str, key: str):
        system, path = open_filesystem(file)
        self._file, self._key = pq.ParquetFile(path, filesystem=system), key
        groups = self._file.metadata
        rows = [groups.row_group(at).num_rows for at in range(groups.num_row_groups)]
        self._ends = np.cumsum(rows)
        self._group, self._pictures = -1, pa.chunked_array([], type=pa.binary())

    def read(self, rows: Sequence[int]) -> Iterator[bytes]:
        """The pictures of the rows, one after the other; ascending rows read each group once."""
        for row in rows:
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group != self._group:
                table = self._file.read_row_group(group, columns=[self._key])
                self._group, self._pictures = group, table[self._key]
            # No bytes are no picture, as whoever opens it says.
            yield picture_bytes(self._pictures[row - int(self._ends[group])]) or b""
