"""What the rows look like: the pre-flight report, the survey, near-duplicates, languages."""
