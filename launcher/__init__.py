"""How a job starts: the command line, the demo, the report."""
