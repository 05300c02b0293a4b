"""Command line, configuration and Ray: what runs where."""
