"""The command line: arguments in, the work elsewhere, one answer out."""
