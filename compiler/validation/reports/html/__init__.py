"""The report as one HTML page, which loads nothing and runs nothing."""
