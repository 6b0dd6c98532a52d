"""Makes two buckets and uploads the demo's archive.

python make_archive.py ENDPOINT VIDEOS TABLES
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import s3fs

from vidbatch.demo import make_archive


def main(argv: list[str]) -> None:
    """Keys and secret come from the environment; what is there already stays."""
    endpoint, videos, tables = argv
    fs = s3fs.S3FileSystem(client_kwargs={"endpoint_url": endpoint, "region_name": "us-east-1"})
    for bucket in (videos, tables):
        if not fs.exists(bucket):
            fs.mkdir(bucket)
    with tempfile.TemporaryDirectory() as folder:
        for path in make_archive(Path(folder)):
            key = f"{videos}/{path.relative_to(folder)}"
            if not fs.exists(key):
                fs.put_file(str(path), key)
            print(key)


if __name__ == "__main__":
    main(sys.argv[1:])
