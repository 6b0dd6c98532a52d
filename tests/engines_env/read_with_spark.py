"""Reads every table of an output with the pyspark of its own environment; prints JSON.

    python read_with_spark.py <output> <tables.json>

`tables.json`: table → partition levels. Per table: rows, columns with their types, and of each
column the number of its values and one figure: the sum of numbers, the latest instant in µs, the
last text, for vectors the sum of lengths and first elements.
"""

import json
import sys
from pathlib import Path

from pyspark import __version__
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as f


def facts(frame: DataFrame) -> dict[str, object]:
    """What can be compared with another engine's reading."""
    picks = [f.count(f.lit(1)).alias("rows")]
    for name, kind in frame.dtypes:
        column = f.col(f"`{name}`")
        picks.append(f.count(column).alias(f"{name}:count"))
        if kind == "array<float>":
            value = f.sum(f.size(column) + column[0].cast("double"))
        elif kind.startswith("array"):
            value = f.sum(f.size(column).cast("double"))
        elif kind in ("int", "bigint", "float", "double"):
            value = f.sum(column.cast("double"))
        elif kind == "boolean":
            value = f.sum(column.cast("int").cast("double"))
        elif kind == "timestamp":
            value = f.max(f.unix_micros(column))
        else:
            value = f.max(column.cast("string"))
        picks.append(value.alias(f"{name}:value"))
    found = frame.agg(*picks).collect()[0].asDict()
    return {
        "rows": found.pop("rows"),
        "types": dict(frame.dtypes),
        "counts": {n: found[f"{n}:count"] for n in frame.columns},
        "values": {n: found[f"{n}:value"] for n in frame.columns},
    }


def main(output: str, tables: dict[str, list[str]]) -> None:
    """Prints {"version": …, "tables": {name: facts}}."""
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    found = {}
    for name, levels in tables.items():
        root = f"{output}/v1/{name}"
        glob = "/".join([root, *(f"{level}=*" for level in levels), "*.parquet"])
        found[name] = facts(spark.read.option("basePath", root).parquet(glob))
    print(json.dumps({"version": __version__, "tables": found}))
    spark.stop()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")))
