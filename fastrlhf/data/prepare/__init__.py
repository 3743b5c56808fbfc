"""`fastrlhf data prepare`: filter, deduplicate, cap and split records, with a data card."""
