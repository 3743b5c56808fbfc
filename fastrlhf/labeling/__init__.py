"""People in the loop: a store of items and judgements, assignment, import and export."""
