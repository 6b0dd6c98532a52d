"""vidbatch: a video archive in, partitioned Parquet tables of labels and embeddings out, on Ray."""

__version__ = "0.1.0"
