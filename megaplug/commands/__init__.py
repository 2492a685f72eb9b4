"""What ``launch/*.py`` call: a person's words in, an exit code out. No other room knows these modules."""
