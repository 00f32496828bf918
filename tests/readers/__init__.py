"""Other tools read what we export: their own code runs, in environments of their own."""
