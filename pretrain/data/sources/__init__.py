"""Where images come from before they are written as shards: folders, tables, tars and scikit-learn's digits."""
