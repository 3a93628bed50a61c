"""What to run next: search spaces, samplers, pruners, studies, summaries. Nothing here starts anything."""
