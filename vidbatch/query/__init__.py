"""What analysts use: the views over an output's tables, DuckDB on them, and the output's README.

views   what is current, as SQL text: the content of `<output>/views/duckdb.sql`
duck    the same views in a DuckDB connection, on disk and in buckets
readme  the text of `<output>/README.md`
"""

from vidbatch.query.duck import QueryResult, connect, result_table, sql
from vidbatch.query.readme import output_readme, readme_and_views
from vidbatch.query.views import views_sql

__all__ = [
    "QueryResult",
    "connect",
    "output_readme",
    "readme_and_views",
    "result_table",
    "sql",
    "views_sql",
]
