"""The private records: read from files, and the rows that are drawn of them for a step."""
