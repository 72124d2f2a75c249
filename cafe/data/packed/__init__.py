"""Pictures that are packed: in tar and zip archives and in Parquet files, read where they lie."""
