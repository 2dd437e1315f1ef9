"""What shows a report to people and to CI: one file a format, each a function from ``Report`` to text."""
